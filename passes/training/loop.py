"""The training loop: one for every pass that trains, on one process or many, interrupted or not."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lobo_fx.content import checksum_of, checksum_of_data
from lobo_fx.contracts.context import SAY_WHICH, Context, users_code
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.randomness import own_generators, own_generators_kept, random_state_kept
from lobo_fx.passes.training.checkpoint import Checkpoint, Identity
from lobo_fx.passes.training.learning_rate import JUDGES, best_rate
from lobo_fx.passes.training.objective import Objective, frozen_parts, trainable
from lobo_fx.passes.training.optimizers import make_optimizer, make_schedule
from lobo_fx.passes.training.training_pass import TrainingPass
from lobo_fx.report.records import Sheet
from lobo_fx.terminal.progress import training_bar

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Loop", "Trained", "train"]

_BETWEEN = 300.0
"""Seconds between checkpoints within an epoch."""
_INTERRUPTED = "interrupted"


@dataclasses.dataclass
class Trained:
    """The record of a training: it grows while the training runs, and a checkpoint holds it beside tensors.

    Attributes:
        rate: the highest learning rate.
        rate_from: how the rate was chosen.
        batches: how many batches were seen.
        epoch_starts: the number of the first batch of each epoch begun.
        losses: mean loss of each whole epoch.
        scores: scores of `evaluate` before training, and after each whole epoch.
        best: epochs done when the score was best; 0 is before training.
        stopped: why training ended before its time; empty if it did not.
        done: whether training has ended.
        seconds: time spent.
        partial: sum of the losses of the epoch that is running.
    """

    rate: float = 0.0
    rate_from: str = ""
    batches: int = 0
    epoch_starts: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    best: int = 0
    stopped: str = ""
    done: bool = False
    seconds: float = 0.0
    partial: float = 0.0

    def check(self) -> None:
        """Refuses what no training can have come to.

        Raises:
            ValueError: names the first field.
        """
        for name, value in dataclasses.asdict(self).items():
            numbers = value if isinstance(value, list) else [value] if name in _NUMBERS else []
            if isinstance(value, list) != (name in _LISTS) or not all(isinstance(n, int | float) for n in numbers):
                raise ValueError(f"{name} is {value!r}")
        if self.batches < 0 or not 0 <= self.best <= len(self.losses):
            raise ValueError(f"batches is {self.batches}, best {self.best} of {len(self.losses)} epochs")

    @property
    def interrupted(self) -> bool:
        """Whether the user ended it."""
        return self.stopped == _INTERRUPTED


def train(
    objective: Objective,
    settings: TrainingPass,
    context: Context,
    candidate: Callable[[], nn.Module],
    optimizer_state: Mapping[str, Any] | None = None,
    stage: str = "",
    known_rate: float | None = None,
) -> Loop:
    """Runs the loop on an objective, and puts the outcome into the report.

    Args:
        objective: trained in place.
        settings: how to train.
        context: gives data, takes notes.
        candidate: gives a copy of the module to be scored.
        optimizer_state: moments of an earlier optimizer, by name of the parameter.
        stage: which training this is, for a pass that trains more than once.
        known_rate: the learning rate that was found the first time.
    """
    folder = None if settings.checkpoint_dir is None else Path(settings.checkpoint_dir) / stage
    if folder is not None and context.interrupted:
        folder = None
        context.note(
            f"{settings.name} writes no checkpoints, since {context.interrupted[0]} was interrupted: another run "
            "completes that, and gets here with other weights"
        )
    loop = Loop(objective, settings, context, candidate, optimizer_state, folder, known_rate)
    trained = loop.run()
    if trained.interrupted:
        context.interrupted.append(settings.name)
    context.note(_told(loop, stage))
    if context.higher_is_better and _fell(trained.losses) and _fell(trained.scores):
        context.note(
            f"WARNING: the score fell from {trained.scores[0]:.4g} to {trained.scores[-1]:.4g} as the loss did: "
            f"if evaluate returns an error, {SAY_WHICH}"
        )
    context.sheets.append(_sheet(trained, f"{settings.name} {stage}".strip()))
    return loop


_LISTS = ("epoch_starts", "losses", "scores")
_NUMBERS = ("rate", "batches", "best", "seconds", "partial")


def _fell(values: Sequence[float]) -> bool:
    """Whether each is lower than the one before."""
    return len(values) > 1 and all(after < before for before, after in itertools.pairwise(values))


def _told(loop: Loop, stage: str) -> str:
    """What the report says of a training."""
    trained, settings = loop.trained, loop.settings
    name = f"{settings.name} ({stage})" if stage else settings.name
    epochs = f"{len(trained.losses)} epoch" + "s" * (len(trained.losses) != 1)
    said = f"{name}: {trained.batches} batches in {epochs}, {trained.seconds:.0f} s"
    said += f"; learning rate {trained.rate:.2g}, {trained.rate_from}"
    if len(trained.losses) > 1:
        said += f"; loss {trained.losses[0]:.4g} in the first epoch, {trained.losses[-1]:.4g} in the last"
    if trained.scores and not settings.keeps_best:
        said += f"; score {trained.scores[0]:.4g} before, {trained.scores[-1]:.4g} after"
    elif trained.scores:
        after = f"after epoch {trained.best}" if trained.best else "before training, whose weights are kept"
        said += f"; best score {max(trained.scores):.4g} {after}"
    if trained.stopped:
        said += f". Stopped early: {trained.stopped}"
    if loop.found is not None:
        said += f". Of these, {loop.found} batches are of an earlier run, whose checkpoint is in {loop.folder}"
    return said


def _sheet(trained: Trained, title: str) -> Sheet:
    scores = trained.scores[1:] or [math.nan] * len(trained.losses)
    rows = [(epoch + 1, loss, score) for epoch, (loss, score) in enumerate(zip(trained.losses, scores, strict=False))]
    return Sheet(title, ("epoch", "loss", "score"), tuple(rows))


class _Stop(Exception):
    """Training ends before its time; the message says why."""


class _NotFinite(_Stop):
    """A loss or a gradient is NaN or infinite."""


class Loop:
    """Trains an objective in place.

    All random numbers of a step depend on the step's number alone, so that a training that was killed and goes on from
    its checkpoint ends with the same weights as one that was not.

    Args:
        objective: the module to train, and the loss of a batch.
        settings: how to train.
        context: data, score, seed and notes.
        candidate: gives a copy of the module in training, as it would be shipped, to be scored.
        optimizer_state: moments from an earlier training of the same parameters, to go on from.
        folder: folder for checkpoints; None writes none.
        known_rate: learning rate that the same pass found when it trained before; None searches for one if the settings
            give none.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainingPass,
        context: Context,
        candidate: Callable[[], nn.Module],
        optimizer_state: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        known_rate: float | None = None,
    ) -> None:
        self.objective, self.settings, self.context, self.candidate = objective, settings, context, candidate
        self.data = dataclasses.replace(context, show_progress=False)  # there is one bar for all of it
        self.folder, self.trained = folder, Trained()
        self.optimizer_state, self.known_rate = optimizer_state, known_rate
        self.best: dict[str, torch.Tensor] | None = None
        self.found: int | None = None  # the number of batches that a checkpoint had seen
        # without the folder, since a checkpoint may be moved
        self.identity = Identity.of(
            f"{dataclasses.replace(settings, checkpoint_dir=None)}, seed {context.seed}",
            objective,
            {} if folder is None else _given(settings, context),
            context.evaluate is not None,
        )
        self.wrote_last = 0.0

    def run(self) -> Trained:
        """Trains, keeps the best weights, and puts modes back.

        Raises:
            InvalidInput: data, loss or score can't work, or the checkpoint belongs to something else.
        """
        training = self.objective.module.training
        with (
            torch.enable_grad(),
            random_state_kept,
            own_generators_kept(self.context.train_data),
            self._accelerator(),
        ):
            self.objective.to_device(self.accelerator.device)
            self.objective.train()
            try:
                with frozen_parts(self.objective.running, self.settings.frozen):
                    try:
                        self._start(self._read())
                    except KeyboardInterrupt:
                        self.trained.stopped, self.trained.rate_from = _INTERRUPTED, "not found yet"
                        return self.trained
                    if not self.trained.done:
                        self._train()
                    self._take_best()
            finally:
                self.objective.to_device(torch.device("cpu"))
                self.objective.train(training)
                self.objective.zero_grad()
        return self.trained

    @contextlib.contextmanager
    def _accelerator(self) -> Iterator[None]:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        try:
            self.accelerator: Accelerator = Accelerator(
                mixed_precision=self.settings.mixed_precision,
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            )
            if self.settings.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
                raise InvalidInput("mixed_precision='fp16' needs a GPU: on a CPU, 'bf16' or 'no'")
            yield
        finally:
            # a process has one precision, unless told to forget it; processes and devices stay as they are
            AcceleratorState._reset_state()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Makes an error on one process fail all processes, which would otherwise wait for it for ever.

        Raises:
            InvalidInput: another process failed; the message gives its error.
        """
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            flag = torch.tensor(float(failed is not None), device=self.accelerator.device)
            if float(self.accelerator.reduce(flag, "sum")):
                reports = gather_object([None if failed is None else f"{type(failed).__name__}: {failed}"])
                rank, report = next((rank, report) for rank, report in enumerate(reports) if report is not None)
                failed = failed or InvalidInput(f"process {rank} failed with {report}")
        if failed is not None:
            raise failed

    def _read(self) -> Checkpoint | None:
        """The checkpoint to go on from, the same on every process.

        Raises:
            InvalidInput: it is damaged, belongs to something else, or processes find different ones.
        """
        with self._together():
            found = None if self.folder is None else Checkpoint.read(self.folder, self.identity)
        if self.accelerator.num_processes > 1 and self.folder is not None:
            from accelerate.utils import gather_object

            batches = gather_object([None if found is None else found.progress.get("batches")])
            if len(set(batches)) > 1:
                listed = ", ".join("none" if count is None else f"one of batch {count}" for count in batches)
                raise InvalidInput(
                    f"processes find different checkpoints in {self.folder} ({listed}): give a folder that all of them "
                    "share, and start again once it is in step"
                )
        return found

    def _start(self, found: Checkpoint | None) -> None:
        """Sets learning rate, optimizer and schedule; if a checkpoint was found, as they were then."""
        parameters = trainable(self.objective)
        self.model = self.accelerator.prepare(self.objective)
        if found is not None:
            self.trained.rate = float(found.progress.get("rate", 0.0))
        elif self.settings.learning_rate != "auto":
            self.trained.rate, self.trained.rate_from = float(self.settings.learning_rate), "given"
        elif self.known_rate is not None:
            self.trained.rate, self.trained.rate_from = self.known_rate, "as found at first"
        elif not self._batches():
            self.trained.rate_from = "not needed"
        else:
            self._find_rate()
        self._make_optimizer(self.trained.rate, max(1, math.ceil(self._batches() / self.settings.accumulate)))
        if self.optimizer_state is not None:
            _load_moments(self.plain_optimizer, parameters, self.optimizer_state)
        if found is not None:
            self._restore(found, parameters)

    def _make_optimizer(self, rate: float, steps: int) -> None:
        """Makes a fresh optimizer, and its schedule."""
        settings, parameters = self.settings, trainable(self.objective).values()
        self.plain_optimizer = make_optimizer(settings.optimizer, parameters, rate, settings.weight_decay)
        self.schedule = make_schedule(settings.schedule, self.plain_optimizer, steps, settings.warmup)
        self.optimizer = self.accelerator.prepare(self.plain_optimizer)

    def _restore(self, found: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
        """Puts everything back to where it was when a checkpoint was written.

        Raises:
            InvalidInput: the checkpoint lacks something.
        """
        changed = self.identity.changed(found.identity)
        try:
            self.trained = Trained(**found.progress)
            self.trained.check()
            self.found = self.trained.batches
            self.objective.load_state_dict(found.state["weights"])
            self.plain_optimizer.load_state_dict(found.state["optimizer"])
            self.schedule.load_state_dict(found.state["schedule"])
            self.best = found.state["best"]
            for name, gradient in found.state["gradients"].items():
                parameters[name].grad = gradient.to(parameters[name].device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"was made with another {changed}" if changed else "is damaged"
            raise InvalidInput(
                f"the checkpoint in {self.folder} {reason} ({type(error).__name__}: {error}); empty the folder"
            ) from error
        if changed:
            self.context.note(
                f"WARNING: the checkpoint in {self.folder} was made with another {changed}; training went on from it: "
                "empty the folder to train anew"
            )

    def _find_rate(self) -> None:
        def endless() -> Iterator[tuple[Inputs, Any]]:
            for epoch in itertools.count():
                _seed(self._draw(epoch))
                _seed_loader(self.context.train_data, self._draw(epoch))
                yield from self.data.training_batches()

        def read(batches: Iterator[tuple[Inputs, Any]], count: int) -> list[tuple[Inputs, Any]]:
            with self._together():
                return list(itertools.islice(batches, count))

        judges = read(endless(), JUDGES)
        before = copy.deepcopy(self.objective.state_dict())

        def trial(rate: float, steps: int) -> float:
            total, batches = steps * self.settings.accumulate, endless()
            self._make_optimizer(rate, steps)
            try:
                read(batches, JUDGES)
                for number in range(total):
                    (batch,) = read(batches, 1)
                    _seed(self._draw(number))
                    self._step(number, total, *batch)
                with torch.no_grad():  # in training mode, as the losses above: what is frozen stays so
                    return sum(self._loss(*batch)[1] for batch in judges) / len(judges)
            except _NotFinite:
                return math.inf
            finally:  # an interrupted trial is no training
                self.objective.zero_grad()
                self.objective.load_state_dict(before)
                self.objective.begin_step(0.0)

        found = best_rate(trial, math.ceil(self._batches() / self.settings.accumulate))
        self.trained.rate, self.trained.rate_from = found.rate, found.reason

    def _batches(self) -> int:
        """How many batches training sees.

        Raises:
            InvalidInput: the data does not say how many it has.
        """
        if self.settings.steps is not None:
            return self.settings.steps * self.settings.accumulate
        return self.settings.epochs * length(self.context.train_data)

    def _train(self) -> None:
        total = self._batches()
        start = time.perf_counter()
        spent = self.trained.seconds
        self.wrote_last = spent
        show = self.context.show_progress and self.accelerator.is_main_process
        with training_bar(total, self.settings.name, show) as update:
            try:
                if len(self.trained.scores) == len(self.trained.losses):  # before training, or `evaluate` failed last
                    self._evaluate()
                update(self.trained.batches, None, self._last_score())
                while self.trained.batches < total:
                    self._epoch(total, update, lambda: spent + time.perf_counter() - start)
            except _NotFinite as stop:  # the last checkpoint stands: data that is mended goes on from it
                if not self.trained.batches:
                    raise InvalidInput(
                        f"{stop}: nothing was trained. Check the labels, loss_fn and the learning rate"
                    ) from None
                self.trained.stopped = str(stop)
                return
            except _Stop as stop:
                self.trained.stopped = str(stop)
            except KeyboardInterrupt:  # maybe within a step: the last checkpoint stands, for another run to go on from
                self.trained.stopped = _INTERRUPTED
                return
            finally:
                self.trained.seconds = spent + time.perf_counter() - start
        self.trained.done = True
        self._write()

    def _epoch(self, total: int, update: Callable[[int, float | None, float | None], None], clock: Any) -> None:
        """Trains to the end of an epoch, from its beginning or where a checkpoint was written."""
        trained = self.trained
        epoch = len(trained.losses)
        if len(trained.epoch_starts) == epoch:
            trained.epoch_starts.append(trained.batches)
        first = trained.epoch_starts[epoch]
        _seed(self._draw(first))
        _seed_loader(self.context.train_data, self._draw(first))
        batches = iter(self.data.training_batches())
        number = first
        while number < total:
            _seed(self._draw(number))
            with self._together():
                inputs, labels = next(batches, (None, None))
            if inputs is None:
                break
            number += 1
            if number <= trained.batches:
                continue  # seen before the checkpoint was written
            try:
                loss = self._step(number - 1, total, inputs, labels)
            except _NotFinite as stop:
                where = f"at step {number} (epoch {epoch + 1}, batch {number - first})"
                raise _NotFinite(f"{stop} {where}") from None
            trained.partial += loss
            trained.batches = number
            update(number, loss, self._last_score())
            if clock() - self.wrote_last > _BETWEEN and self.folder is not None:
                trained.seconds = clock()
                self._write()
                self.wrote_last = clock()
        seen = trained.batches - first
        trained.losses.append(trained.partial / max(1, seen))
        trained.partial = 0.0
        trained.seconds = clock()
        self._write()  # even if `evaluate` fails
        if self.context.evaluate is not None:
            self._evaluate()
            self._write()
        patience = self.settings.patience
        if patience is not None and len(trained.losses) - trained.best >= patience and trained.batches < total:
            raise _Stop(f"no better score in {patience} epochs")

    def _draw(self, number: int) -> int:
        """The seed of all generators in a step."""
        return (self.context.seed * 1_000_003 + number) % 2**32

    def _step(self, number: int, total: int, inputs: Inputs, labels: Any) -> float:
        """Lowers the loss of a batch, the first of `total` being number 0; returns it.

        Gradients are averaged over as many batches as share a step: fewer than `accumulate` in the last one.

        Raises:
            _NotFinite: the loss or its gradient is NaN or infinite; the weights are those before the step.
        """
        accelerator, settings = self.accelerator, self.settings
        before = [(name, buffer, buffer.clone()) for name, buffer in _statistics(self.objective).items()]
        self.objective.begin_step(number / total)
        first = number - number % settings.accumulate
        count = min(settings.accumulate, total - first)
        steps = number + 1 == first + count
        try:
            with contextlib.nullcontext() if steps else accelerator.no_sync(self.model):
                loss, value = self._loss(inputs, labels)
                if not math.isfinite(value):
                    raise _NotFinite(f"the loss is {value}")
                with self._together():
                    _check_statistics(before)
                try:
                    accelerator.backward(loss / count)
                except RuntimeError as error:
                    raise InvalidInput(f"the loss can't be differentiated: {error}") from error
            if steps:
                accelerator.unscale_gradients(self.optimizer)  # those of trials too would unscale twice
                norm = nn.utils.clip_grad_norm_(self.objective.parameters(), settings.clip_norm or math.inf)
                # with half precision, the scaler skips such steps and lowers its scale
                if settings.mixed_precision != "fp16" and not math.isfinite(float(norm)):
                    raise _NotFinite("a gradient is NaN or infinite")
        except _NotFinite:
            self.optimizer.zero_grad()
            for _, buffer, old in before:
                buffer.copy_(old)
            raise
        if steps:
            with users_code("optimizer"):
                self.optimizer.step()
            if not self.optimizer.step_was_skipped:
                with users_code("schedule"):
                    self.schedule.step()
            self.optimizer.zero_grad()
        return value

    def _loss(self, inputs: Inputs, labels: Any) -> tuple[torch.Tensor, float]:
        """This process's part of the loss of a batch, and the loss over all processes."""
        *mine, weight = self._share(inputs, labels)
        with self._together():
            loss = self.model(*mine) * weight
        return loss, float(self.accelerator.reduce(loss.detach(), "mean"))

    def _share(self, inputs: Inputs, labels: Any) -> tuple[Inputs, Any, float]:
        """This process's rows of a batch, and how much they weigh: gradients are averaged over processes.

        Every process reads all data and takes its rows, so that many see the batches that one would.

        Raises:
            InvalidInput: there are fewer rows than processes.
        """
        accelerator, signature = self.accelerator, self.context.signature
        count = accelerator.num_processes
        if count == 1:
            return (*self._on_device(inputs, labels), 1.0)
        rows = signature.count_rows(inputs)
        if rows < count:
            raise InvalidInput(f"a batch of {rows} rows can't be shared by {count} processes: give larger batches")
        mine = list(range(accelerator.process_index, rows, count))

        def chosen(value: Any) -> Any:
            counts = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
            return value[mine] if counts else value

        part = signature.take_rows(inputs, mine), pytree.tree_map(chosen, labels)
        return (*self._on_device(*part), len(mine) * count / rows)

    def _on_device(self, inputs: Inputs, labels: Any) -> tuple[Inputs, Any]:
        device = self.accelerator.device
        return inputs.to(device), pytree.tree_map(
            lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, labels
        )

    def optimizer_moments(self) -> dict[str, Any]:
        """The optimizer's present moments, by name of the parameter."""
        state = self.plain_optimizer.state
        return {name: state[p] for name, p in trainable(self.objective).items() if p in state}

    def _last_score(self) -> float | None:
        return self.trained.scores[-1] if self.trained.scores else None

    def _evaluate(self) -> None:
        """Scores the module as it is now, and keeps its weights if they are the best so far."""
        if self.context.evaluate is None:
            return
        from accelerate.utils import broadcast_object_list

        scores: list[Any] = [None]
        with self._together():
            if self.accelerator.is_main_process:
                module = self.candidate().to(self.context.device)  # where `evaluate` finds every other module
                scores = [self.context.score_of(module.eval())]
        (score,) = broadcast_object_list(scores)
        trained = self.trained
        trained.scores.append(score)
        if len(trained.scores) == 1 or score > max(trained.scores[:-1]):
            trained.best = len(trained.losses)
            if self.settings.keeps_best:
                self.best = copy.deepcopy(self.objective.state_dict())

    def _take_best(self) -> None:
        if self.best is not None:
            self.objective.load_state_dict(self.best)

    def _write(self) -> None:
        """Writes a checkpoint if there is a folder for it; a full disk does not stop training."""
        if self.folder is None or not self.accelerator.is_main_process:
            return
        gradients = {name: p.grad for name, p in trainable(self.objective).items() if p.grad is not None}
        if gradients and self.accelerator.num_processes > 1:
            return  # each process holds only its part of the gradients
        state = {
            "weights": self.objective.state_dict(),
            "optimizer": self.plain_optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if _is_plain(v)},
            "best": self.best,
            "gradients": gradients,  # of batches that wait for the rest of their step
        }
        try:
            Checkpoint(self.identity, dataclasses.asdict(self.trained), state).write(self.folder)
        except (InvalidInput, TypeError) as error:  # an optimizer may hold what JSON can't
            self.context.note(f"a checkpoint could not be written, training went on: {error}")


def _given(settings: TrainingPass, context: Context) -> dict[str, str]:
    """Checksums of what the user gave, by name; of a loader, that may read other rows each time, nothing is known."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    objects = {name: value for name, value in values.items() if callable(value)}
    found = {name: checksum_of(value) for name, value in (objects | {"loss_fn": context.loss_fn}).items()}
    return found | {"train_data": checksum_of_data(context.train_data)}


def length(data: Any) -> int:
    """How many batches the data has.

    Raises:
        InvalidInput: it does not say.
    """
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        raise InvalidInput("train_data has no length: say how long to train with steps=") from None


def _statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that a call changes: statistics of batch norms and ranges of observers, of one dimension at most."""
    return {name: one for name, one in module.named_buffers() if one.is_floating_point() and one.dim() <= 1}


def _check_statistics(before: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Refuses a batch that made variances NaN though its loss is finite, before an epoch is trained for nothing.

    Raises:
        InvalidInput: names the variance.
    """
    for name, buffer, old in before:
        if not buffer.isnan().any() or old.isnan().any():
            continue
        raise InvalidInput(
            f"a batch of train_data made '{name.removeprefix('module.')}' NaN: a batch norm can't learn the variance "
            "of one value a channel. Leave batches of one row out (drop_last=True of a DataLoader), or freeze the "
            "batch norm (frozen=)"
        )


def _is_plain(value: object) -> bool:
    return all(isinstance(leaf, (int, float, str, bool, type(None))) for leaf in pytree.tree_leaves(value))


def _load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], known: Mapping[str, Any]
) -> None:
    """Gives parameters the moments that an earlier optimizer had for them."""
    for name, parameter in parameters.items():
        if name in known:
            optimizer.state[parameter] = copy.deepcopy(known[name])
    optimizer.load_state_dict(optimizer.state_dict())  # moves it to where the parameters are


def _seed(seed: int) -> None:
    """Starts the generators that loaders, augmentation and dropout draw from."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # without a stack trace for each kind of device that isn't there, at every step
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # what users' augmentation draws from
    random.seed(seed)


def _seed_loader(data: Any, seed: int) -> None:
    for generator in own_generators(data):
        generator.manual_seed(seed)
