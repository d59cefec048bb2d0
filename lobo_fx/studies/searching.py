"""`search`: draws recipes from a space, compiles and measures them, in a study that any number of processes share."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobo_fx.capture.tracing import Model
from lobo_fx.compiler import compile, compile_again
from lobo_fx.content import checksum_of_data
from lobo_fx.contracts.context import Data, Evaluate, LossFunction, direction_of
from lobo_fx.errors import InvalidInput
from lobo_fx.files import temporary_folder
from lobo_fx.graph.inputs import DynamicShapes
from lobo_fx.graph.program import Program
from lobo_fx.measures.latency import check_counts
from lobo_fx.measures.machine import machine
from lobo_fx.result import Result
from lobo_fx.studies.front import Front, FrontPoint, undominated
from lobo_fx.studies.objectives import OBJECTIVES, Measuring, chosen_objectives
from lobo_fx.studies.space import Choice, Decide, Interval, Space, read_space
from lobo_fx.studies.storage import check_identity, open_study, shown, storage_errors
from lobo_fx.studies.trials import MEASURED, Ledger, Outcome, Worker
from lobo_fx.terminal.progress import training_bar

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["search"]


def search(
    model: Model | Program,
    space: str | Path | Space,
    *,
    storage: str | Path | None = None,
    study: str = "search",
    trials: int = 50,
    timeout: float | None = None,
    objectives: Sequence[str] | None = None,
    example_inputs: object = None,
    dynamic_shapes: DynamicShapes = "auto",
    outputs: str | Sequence[str] | None = None,
    calibration_data: Data | None = None,
    train_data: Data | None = None,
    loss_fn: LossFunction | None = None,
    evaluate: Evaluate | None = None,
    higher_is_better: bool | None = None,
    seed: int = 0,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 30,
    lease: float = 60.0,
    name: str = "",
    progress: bool = True,
) -> Front:
    r"""Searches a space of settings for the best trade-offs, by compiling and measuring.

    Any number of processes, on any number of machines, may call this with the same storage and study: each runs the
    next trial. If one dies, nothing is lost: its trial is run again. A later call continues the study.

    Args:
        model: as `compile` takes it.
        space: a YAML file, its text, or the result of `read_space`.
        storage: path of a journal file, or URL of an SQL database (`sqlite:///study.db`, `postgresql://…`); None keeps
            the study in memory, for this process alone.
        study: name of the study in its storage.
        trials: total number of trials, of all processes and earlier calls together.
        timeout: seconds after which no further trial is started.
        objectives: some of `score`, `decibels`, `latency`, `size`, `memory`; by default the score (decibels without
            `evaluate`) and latency.
        example_inputs: as `compile` takes it, likewise the next six.
        dynamic_shapes: likewise.
        outputs: likewise.
        calibration_data: likewise.
        train_data: likewise.
        loss_fn: likewise.
        evaluate: likewise; its score is an objective.
        higher_is_better: likewise.
        seed: seeds the passes; what a trial draws depends on it, on the trial's number and on the trials done before.
        threads: threads of the runtime, for measuring latency.
        batch: rows of its input.
        rounds: how many times each file runs.
        lease: seconds that a process may be silent before its trial is given to another.
        name: name of the model in reports; its class by default.
        progress: whether to draw progress on the terminal.

    Returns:
        The trials that no other one beats in every objective. Ctrl-C ends the search with the trials done so far; the
        running one will be repeated.

    Raises:
        InvalidInput: an argument can't work, the study is of another model, space or data, or no trial was measured.
        TraceError: `torch.export` can't capture the model.

    Example:
        ```python
        space = "passes:\n  - prune_weights: {amount: {from: 0.1, to: 0.6}}"  # or the path of a file
        front = lobo_fx.search(model, space, example_inputs=images, trials=2)
        lobo_fx.compile(model, front[0].passes, example_inputs=images)
        ```
    """
    found = space if isinstance(space, Space) else read_space(space)
    chosen = chosen_objectives(objectives, evaluate is not None)
    check_counts(threads, batch, rounds)
    for what, value in (("trials", trials), ("timeout", timeout), ("lease", lease)):
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise InvalidInput(f"{what} is {value!r}; it must be a number above 0")
    place = None if storage is None else str(storage)
    directions = [OBJECTIVES[objective].direction for objective in chosen]
    given: dict[str, Any] = {
        "calibration_data": calibration_data,
        "train_data": train_data,
        "loss_fn": loss_fn,
        "evaluate": evaluate,
        "higher_is_better": (higher := direction_of(evaluate, loss_fn, higher_is_better)),
        "seed": seed,
    }
    kept = open_study(study, place, directions)
    inputs: dict[str, Any] = {"example_inputs": example_inputs, "dynamic_shapes": dynamic_shapes, "outputs": outputs}
    original = compile(model, [], **inputs, **given, progress=progress)
    program = original.program
    name = name or original.report.model
    _check_passes(found, original)
    evaluate_name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    identity = {
        "model": name,
        "weights": checksum_of_data(program.module.state_dict()),
        "space": str(found),
        "objectives": ", ".join(chosen),
        "measurement": f"{threads} threads, batch {batch}",
        "seed": str(seed),
        "calibration data": checksum_of_data(calibration_data),
        "training data": checksum_of_data(train_data),
        "score": "none" if evaluate is None else f"{evaluate_name}, {'higher' if higher else 'lower'} is better",
    }
    where = "memory" if place is None else shown(place)

    with temporary_folder() as folder, _interrupts():
        artifact = original.export_original(folder / "original.onnx")
        measuring = Measuring(chosen, folder, artifact, threads, batch, rounds)

        def run(trial: Trial) -> Outcome:
            with storage_errors(where):
                check_identity(kept, identity)
                decide = _drawn(found, trial, seed)
            facts: dict[str, Any] = {"machine": machine()}
            try:
                passes = found.build(decide)
                if not passes:
                    raise InvalidInput("the recipe names no pass: it is the original")
                measured = measuring(compile_again(original, passes))
            except InvalidInput as error:
                return Outcome(reason=str(error), is_refused=True, facts=facts)
            except Exception as error:
                return Outcome(reason=f"{type(error).__name__}: {error}", facts=facts)
            return Outcome([measured[objective] for objective in chosen], facts=facts | measured)

        worker = Worker(kept, where, run, lease)
        until = math.inf if timeout is None else time.monotonic() + timeout
        is_interrupted = False
        try:
            with storage_errors(where):
                check_identity(kept, identity)
            with training_bar(trials, f"study {study}", progress) as bar:
                ledger = worker.work(trials, until, lambda ledger: bar(min(ledger.ended, trials), None, None))
        except (KeyboardInterrupt, _Interrupted):
            ledger, is_interrupted = worker.ledger(), True
    front = _front(ledger, found, Front(study, name, chosen, [], ledger.ended, {}, {}, [], is_interrupted))
    if ledger.ended and not ledger.done:
        raise InvalidInput(f"no trial of the study '{study}' could be measured; {'; '.join(front.summary[1:])}")
    return front


def _check_passes(space: Space, original: Result) -> None:
    """Refuses before any trial what would fail in one: missing data, or settings that don't fit the model.

    Raises:
        InvalidInput: names what is missing, or what does not fit.
    """
    assert original.pipeline is not None
    seen: set[str] = set()
    for pass_ in (pass_ for passes in space.variants() for pass_ in passes):
        if str(pass_) not in seen:
            seen.add(str(pass_))
            original.pipeline.context.require(pass_.needs, pass_.name)
            pass_.check(original.program)


def _drawn(space: Space, trial: Trial, seed: int) -> Decide:
    """Draws all choices of a trial at once, so that a repeated trial makes the same choices."""
    from optuna.samplers import TPESampler

    # A sampler for each trial: its draws depend on no other process, and a resumed study draws as an uninterrupted one.
    own = int.from_bytes(hashlib.sha256(f"{seed} {trial.number}".encode()).digest()[:4], "big")
    trial.study.sampler = TPESampler(seed=own, multivariate=False, constant_liar=True)

    def draw(choice: Choice) -> Any:
        if not isinstance(choice, Interval):
            return choice.labels.index(trial.suggest_categorical(choice.name, choice.labels))
        if choice.is_whole:
            step = 1 if choice.step is None else int(choice.step)
            return trial.suggest_int(choice.name, int(choice.low), int(choice.high), step=step, log=choice.log)
        return trial.suggest_float(choice.name, choice.low, choice.high, step=choice.step, log=choice.log)

    space.decided(draw)
    return _known(dict(trial.params))


def _known(decided: dict[str, Any]) -> Decide:
    """Makes every choice as a trial did."""

    def decide(choice: Choice) -> Any:
        value = decided[choice.name]
        return value if isinstance(choice, Interval) else choice.labels.index(value)

    return decide


def _front(ledger: Ledger, space: Space, front: Front) -> Front:
    """Fills in the front of a study."""
    points = []
    for trial in ledger.done:
        facts = dict(trial.user_attrs[MEASURED])
        made_on = facts.pop("machine")
        points.append(FrontPoint(trial.number, facts, trial.params, space.recipe(_known(trial.params)), made_on))
    return dataclasses.replace(
        front,
        points=undominated(points, front.objectives),
        refused={trial.number: reason for trial, reason in ledger.refused},
        errors={trial.number: reason for trial, reason in ledger.errors},
        machines=sorted({point.machine for point in points}),
    )


class _Interrupted(BaseException):
    """Ctrl-C in a search. A training ends early on a `KeyboardInterrupt` as if it were done, but lets this through."""


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Makes Ctrl-C raise `_Interrupted`, unless the caller has a handler of its own."""

    def handle(number: int, frame: Any) -> None:
        raise _Interrupted

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
