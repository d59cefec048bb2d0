"""The context of a pass: data, loss, score, seed, progress, and a place for notes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from lobo_fx.contracts.candidates import Candidate
from lobo_fx.contracts.measurements import Measurements, Tensors
from lobo_fx.contracts.split import Split
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.graph.inputs import Inputs, check_tensors
from lobo_fx.graph.notes import Note, note_of
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import user_line
from lobo_fx.graph.randomness import own_generators_kept
from lobo_fx.graph.signature import Signature
from lobo_fx.plugins.registry import snake_case
from lobo_fx.report.records import Sheet
from lobo_fx.terminal.progress import track

__all__ = ["SAY_WHICH", "Context", "Data", "Evaluate", "LossFunction", "direction_of", "users_code"]

_CPU = torch.device("cpu")
Data = Iterable[Any]
LossFunction = Callable[..., torch.Tensor]
Evaluate = Callable[[nn.Module], float]


@contextlib.contextmanager
def users_code(name: str) -> Iterator[None]:
    """Turns any error in a function or data that the user passed into an `InvalidInput` that says where it happened.

    Whether gradients are recorded is as before afterwards.

    Raises:
        InvalidInput: names the argument, and the line of the user's file.
    """
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    except LoboError:
        raise
    except (Exception, SystemExit) as error:
        line = user_line("".join(traceback.format_tb(error.__traceback__)))
        where = f" at {line}" if line else ""
        raise InvalidInput(f"{name} failed{where}: {type(error).__name__}: {error}") from error


_LOSSES = {
    *("loss", "losses", "error", "errors", "perplexity", "nll", "mse", "mae", "rmse", "wer", "cer", "ber"),
    *("distance", "divergence"),
}
"""Words in the names of functions whose lower values are better."""


SAY_WHICH = "say higher_is_better=False, or True"
"""What the message tells a user of Python to do; the command line replaces it with its own options."""


def _is_loss(name: str) -> bool:
    """Whether the name of a function says that it returns a loss; `..._score` and negated losses do not count."""
    words = set(snake_case(name).split("_"))
    return bool(_LOSSES & words) and not words & {"score", "accuracy", "negative", "neg", "minus"}


def direction_of(evaluate: Evaluate | None, loss_fn: LossFunction | None, higher_is_better: bool | None) -> bool:
    """Whether a higher score is better, as stated, else True.

    Raises:
        InvalidInput: nothing is stated and `evaluate` seems to be a loss: it is the loss, or is called like one.
    """
    if higher_is_better not in (None, True, False):
        raise InvalidInput(f"higher_is_better is {higher_is_better!r}; it must be True or False")
    if higher_is_better is not None or evaluate is None:
        return higher_is_better is not False
    name = getattr(evaluate, "__name__", type(evaluate).__name__)
    given: object = evaluate  # declared with another type than loss_fn, but it may be the same function
    if given is loss_fn or _is_loss(name):
        raise InvalidInput(
            f"evaluate is '{name}', which sounds like a loss, and a higher score counts as better: "
            f"{SAY_WHICH} where it is a score after all"
        )
    return True


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything a pass may use beside the program.

    Attributes:
        signature: inputs of the program; batches are checked against it.
        calibration_data: batches for observers; may be read several times, so not a one-shot iterator.
        train_data: batches with labels.
        loss_fn: a function from outputs and labels to a scalar.
        evaluate: a function from a module to a score.
        higher_is_better: whether a higher score is better; if not, scores are negated as they are computed, so that
            a higher one is better everywhere in this package.
        original: the program before all passes; not to be changed.
        device: where the program's tensors are and where batches are moved to; the compiler works on CPU.
        seed: seeds every random draw of the passes.
        show_progress: whether long work draws a progress bar.
        made_by: name of the running pass.
        notes: notes for the report; passes add to them with `note`.
        expected: what the outputs must be after the running pass; set with `expect`.
        sheets: tables for the report; passes append to them.
        candidates: the candidates of searches; passes append to them.
        interrupted: names of passes that the user ended before their time; what follows belongs to this run alone.
        split: which rows of the calibration data are held out, the same in every read of one compilation.
        measurements: what earlier compilations in the same `workdir` measured; None without one.
    """

    signature: Signature
    calibration_data: Data | None = None
    train_data: Data | None = None
    loss_fn: LossFunction | None = None
    evaluate: Evaluate | None = None
    higher_is_better: bool = True
    original: Program | None = None
    device: torch.device = _CPU
    seed: int = 0
    show_progress: bool = True
    made_by: str = ""
    notes: list[Note] = dataclasses.field(default_factory=list)
    expected: list[Any] = dataclasses.field(default_factory=list)
    sheets: list[Sheet] = dataclasses.field(default_factory=list)
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    interrupted: list[str] = dataclasses.field(default_factory=list)
    split: Split = dataclasses.field(default_factory=Split)
    measurements: Measurements | None = None

    def note(self, reason: str, node: fx.Node | None = None, parameter: str = "") -> None:
        """Adds a note to the report, once.

        Args:
            reason: a predicate about the operator or the parameter ("stays float: …"), or a whole sentence.
            node: the operator that the note is about.
            parameter: name of the parameter that the note is about.
        """
        note = Note(reason, self.made_by, parameter=parameter) if node is None else note_of(node, reason, self.made_by)
        if note not in self.notes:
            self.notes.append(note)

    def expect(self, outputs: Any) -> None:
        """States the outputs that the program must have on the example inputs once the running pass is done."""
        self.expected.append(outputs)

    def measured(
        self,
        what: str,
        program: Program,
        measure: Callable[[], Tensors],
        settings: object = None,
        over: str = "calibration_data",
    ) -> Tensors:
        """The result of `measure`, reused from an earlier compilation in the same `workdir` if there is one.

        Args:
            what: name of the measurement, in letters.
            program: the measured program; its graph and weights are part of the key.
            measure: reads data of this context and returns tensors by name.
            settings: everything else that `measure` depends on, such as settings of the pass.
            over: the data that is read: "calibration_data", or "train_data" together with `loss_fn`.
        """
        if self.measurements is None:
            return measure()
        found, fault = self.measurements.take(what, program, over, [settings, self.seed], measure)
        if fault:
            self.note(f"{what} could not be kept for other tries: {fault}")
        return found

    def generator(self) -> torch.Generator:
        """A random generator seeded for this compilation."""
        return torch.Generator().manual_seed(self.seed)

    def calibration_batches(self, description: str = "calibrate") -> Iterator[Inputs]:
        """Calibration data as inputs of the program, one batch in memory at a time.

        Raises:
            InvalidInput: there is no data, or a batch does not fit the program or holds NaN or infinity.
        """
        if self.calibration_data is None:
            raise InvalidInput("calibration_data= is needed: a DataLoader or a list of batches")
        empty = True
        for index, batch in self._read("calibration_data", description):
            empty = False
            yield self._bind("calibration_data", index, batch)
        if empty:
            raise InvalidInput("calibration_data is empty: it must yield at least one batch, each time it is read")

    def split_batches(self, description: str = "calibrate") -> Iterator[tuple[Inputs, bool]]:
        """Calibration data split into rows for fitting and held-out rows; one batch in memory at a time.

        Every fourth of the first 64 rows is held out, then every eighth, in the order in which rows are first read.
        Rows are recognised by their content, so a row stays on its side in every read, even if a loader shuffles, and
        equal rows are one row. Where the batch of the program is not free, a batch counts as a row.

        Returns:
            Batches, each with whether it is held out.

        Raises:
            InvalidInput: as `calibration_batches`.
        """
        for inputs in self.calibration_batches(description):
            count = self.signature.count_rows(inputs)
            held_out = [self.split.of(row) for row in self.signature.rows(inputs)]
            for part in (False, True):
                rows = [row for row in range(count) if held_out[row] is part]
                if rows:
                    yield inputs if len(rows) == count else self.signature.take_rows(inputs, rows), part

    def fitting_batches(self, description: str = "calibrate") -> Iterator[Inputs]:
        """Calibration data without the rows that are held out."""
        return (inputs for inputs, held_out in self.split_batches(description) if not held_out)

    def held_out_batches(self, rows: int = 32) -> list[Inputs]:
        """The first held-out rows of the calibration data, as batches; empty where no row can be held out."""
        found: list[Inputs] = []
        quiet = dataclasses.replace(self, show_progress=False)
        for inputs, held_out in quiet.split_batches():
            found += [inputs] if held_out else []
            if sum(map(self.signature.count_rows, found)) >= rows:
                break
        return found

    def training_batches(self, description: str = "train") -> Iterator[tuple[Inputs, Any]]:
        """Training data as inputs of the program, each with the rest of its batch: the label, all labels, or None.

        Raises:
            InvalidInput: there is no data, or a batch does not fit the program.
        """
        if self.train_data is None:
            raise InvalidInput("train_data= is needed: batches of inputs and labels")
        empty = True
        for index, batch in self._read("train_data", description):
            empty = False
            yield self._bind("train_data", index, batch), self._labels(batch)
        if empty:
            raise InvalidInput("train_data is empty: it must yield at least one batch, each time it is read")

    def _labels(self, batch: object) -> Any:
        """The labels of a batch: everything beside the inputs; None where there is nothing else."""
        if isinstance(batch, Mapping):
            rest = [value for name, value in batch.items() if name not in self.signature.names]
        else:
            taken = 1 if self.signature.is_nested(batch) else len(self.signature.names)
            rest = list(batch[taken:]) if isinstance(batch, (tuple, list)) else []
        return rest[0] if len(rest) == 1 else rest or None

    def require(self, needs: Iterable[str], user: str) -> None:
        """Refuses to start when data or a function that a pass needs is missing or does not fit.

        Raises:
            InvalidInput: names what is missing and who needs it.
        """
        wanted = tuple(needs)
        for need in wanted:
            value = getattr(self, need)
            if need == "loss_fn" and self.signature.gives_loss:
                continue
            if value is None:
                raise InvalidInput(f"{user} needs {need}=; pass it to lobo_fx.compile")
            if need not in ("calibration_data", "train_data"):
                continue
            if not isinstance(value, Iterable):
                raise InvalidInput(f"{need} is a {type(value).__name__}; expected a DataLoader or a list of batches")
            with users_code(need), own_generators_kept(value):
                one_shot, first = iter(value) is value, next(iter(value), value)
            if one_shot:
                raise InvalidInput(
                    f"{need} is a one-shot iterator ({type(value).__name__}); pass a DataLoader or a list, "
                    "which can be read again"
                )
            if first is value:
                raise InvalidInput(f"{need} is empty: it must yield at least one batch")
            self._bind(need, 0, first)
            labelled = "loss_fn" in wanted and self.loss_fn is not None
            if need == "train_data" and labelled and self._labels(first) is None:
                raise InvalidInput("train_data, batch 0 holds no label beside the inputs")

    def _read(self, source: str, description: str) -> Iterator[tuple[int, object]]:
        """The user's batches, numbered; errors of the user's loader are reported as such."""
        batches = enumerate(track(getattr(self, source), description, self.show_progress))
        while True:
            with users_code(source):
                found = next(batches, None)
            if found is None:
                return
            yield found

    def loss(self, outputs: Any, labels: object) -> torch.Tensor:
        """The loss of `loss_fn`, or the model's own without one; differentiable.

        Raises:
            InvalidInput: `loss_fn` fails, or gives no scalar that depends on the outputs.
        """
        if self.loss_fn is None:
            source, loss = "the model's own loss", outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss
        else:
            source = "what loss_fn returned"
            with users_code("loss_fn"):
                loss = self.loss_fn(outputs, labels)
        wrong = torch.is_grad_enabled() and not getattr(loss, "requires_grad", False)
        if wrong or not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise InvalidInput(f"{source} must be a scalar tensor that depends on the outputs")
        return loss.reshape(())

    def score(self, program: Program) -> float | None:
        """The user's score of a copy of the program, which `evaluate` may change freely; None without `evaluate`.

        Raises:
            InvalidInput: `evaluate` fails, or returns no number.
        """
        return None if self.evaluate is None else self.score_of(program.clone().module)

    def score_of(self, module: nn.Module) -> float:
        """The user's score of a module, which `evaluate` may change; negated where lower is better.

        Raises:
            InvalidInput: `evaluate` fails, or returns no number.
        """
        assert self.evaluate is not None
        with users_code("evaluate"):
            score: object = self.evaluate(module)
        if isinstance(score, torch.Tensor | np.ndarray) and math.prod(score.shape) == 1:
            score = score.item()
        if not isinstance(score, numbers.Real):  # NumPy's scalars are, too
            raise InvalidInput(f"evaluate returned a {type(score).__name__}; expected a number")
        if math.isnan(score):
            raise InvalidInput("evaluate returned NaN, which is no better or worse than any score")
        return float(score) if self.higher_is_better else -float(score)

    def _bind(self, source: str, index: int, batch: object) -> Inputs:
        try:
            inputs = self.signature.bind_batch(batch)
        except InvalidInput as error:
            raise InvalidInput(f"{source}, batch {index}: {error}") from None
        check_tensors(inputs, f"{source}, batch {index}")
        for tensor in inputs.tensors:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InvalidInput(f"{source}, batch {index} holds NaN or infinity")
        return inputs.to(self.device)
