"""Tuning: tries the choices that a runtime offers for a file, and keeps those that are measured faster and agree.

Many choices are tried, so some would look faster by chance. Therefore two copies of the same file are compared first:
a choice must beat the difference between them in most rounds, and by at least `LEAST_GAIN`. In the end, all kept
choices together are measured once more against the untuned file.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.files import checksum
from lobo_fx.measures.apart import session_apart
from lobo_fx.measures.in_turn import Stand
from lobo_fx.plugins.protocols import Arrays, Exporter, Session
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.plugins.tuning import ChecksFiles, Choice, TunesFiles, Tuning
from lobo_fx.terminal.progress import track

__all__ = ["LEAST_GAIN", "Trial", "Tuned", "read_tuning", "runtime_of", "tune"]

LEAST_GAIN = 0.02
"""Least share of the latency that a choice must save."""
_ROUNDS, _LAST_ROUNDS = 3, 5

Check = Callable[[Path, Session], tuple[float, dict[str, Any]]]


def read_tuning(tune: bool | Tuning, exporter: Exporter) -> Tuning | None:
    """Reads the `tune` argument of `export`; None for no tuning.

    Raises:
        InvalidInput: it is no bool or `Tuning`, the runtime can't tune, or the exporter can't check a tuned file.
    """
    if not isinstance(tune, (bool, Tuning)):
        raise InvalidInput(f"tune is {tune!r}; it must be True, False, or lobo_fx.Tuning(...)")
    if not tune:
        return None
    tuning = Tuning() if tune is True else tune
    runtime_of(tuning)
    if not isinstance(exporter, ChecksFiles):
        raise InvalidInput(f"the exporter {type(exporter).__name__} can't check a tuned file: export without tune")
    return tuning


def runtime_of(tuning: Tuning) -> TunesFiles:
    """The runtime to tune for.

    Raises:
        InvalidInput: there is none of that name, or it offers no choices.
    """
    runtime = RUNTIMES.get(tuning.runtime)()
    if not isinstance(runtime, TunesFiles):
        raise InvalidInput(f"the runtime '{tuning.runtime}' offers nothing to tune: export without tune")
    return runtime


@dataclasses.dataclass(frozen=True)
class Trial:
    """A choice that was tried.

    Attributes:
        name: of the choice.
        ratio: latency with the choice over that without it, both with the choices kept before; None if not measured.
        kept: whether the choice is in the file.
        reason: why it was not kept, if not for its latency.
    """

    name: str
    ratio: float | None
    kept: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Attributes:
        trials: all trials, in order.
        kept: the choices that are in the file.
        ratio: latency of the tuned file over the untuned one's, measured again at the end; None if nothing was kept.
        path: the tuned file, in a folder with the files that belong to it; None where the untuned one stays.
        parity: parity of the tuned file.
        details: details of the exporter's check.
        noise: largest difference between copies of the same file, as a share.
    """

    trials: tuple[Trial, ...]
    noise: float
    kept: tuple[Choice, ...] = ()
    ratio: float | None = None
    path: Path | None = None
    parity: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def least_gain(self) -> float:
        """Least share of the latency that a choice had to save: more than copies of one file differ."""
        return max(LEAST_GAIN, self.noise)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the details of an artifact."""
        return {
            "ratio": self.ratio,
            "noise": self.noise,
            "kept": [choice.name for choice in self.kept],
            "tried": [dataclasses.asdict(trial) for trial in self.trials],
        }

    def __str__(self) -> str:
        rejected = [_said(trial) for trial in self.trials if not trial.kept]
        others = f"tried and not kept: {', '.join(rejected) or 'nothing'}"
        if self.path is None:
            again = "" if self.ratio is None else f" (what did alone takes {self.ratio:.2f} times as long together)"
            return f"nothing that the runtime offers saves {self.least_gain:.1%} of its time or more{again}; {others}"
        kept = [_said(trial) for trial in self.trials if trial.kept]
        remarks = "".join(f"; {remark}" for remark in dict.fromkeys(choice.remark for choice in self.kept) if remark)
        return f"it takes {self.ratio:.2f} times as long as untuned; kept: {', '.join(kept)}{remarks}; {others}"


def _said(trial: Trial) -> str:
    told = ([] if trial.ratio is None else [f"{trial.ratio:.2f}"]) + ([trial.reason] if trial.reason else [])
    return f"{trial.name} ({', '.join(told)})"


def tune(
    path: Path, tuning: Tuning, runtime: TunesFiles, arrays: Arrays, check: Check, folder: Path, progress: bool
) -> Tuned:
    """Tries the choices of a runtime one after the other, each on top of those that were kept.

    Args:
        path: the file as an exporter wrote it; not changed.
        tuning: counts of threads and rows.
        runtime: the runtime that offers the choices.
        arrays: the inputs that are measured on.
        check: compares a file, run by a session, with PyTorch; returns its parity and details.
        folder: an empty folder for the files that are tried.
        progress: whether to draw a progress bar.
    """
    tuner = _Tuner(path, tuning, runtime, arrays, check, folder)
    for choice in track(runtime.choices(tuning.threads[1:]), f"tune {path.name}", progress):
        tuner.try_one(choice)
    return tuner.found()


class _Tuner:
    """Tries choices, and keeps those that are faster. Arguments are those of `tune`."""

    def __init__(
        self, path: Path, tuning: Tuning, runtime: TunesFiles, arrays: Arrays, check: Check, folder: Path
    ) -> None:
        self.path, self.runtime, self.check, self.folder = path, runtime, check, folder
        self.threads = tuning.threads[0] if tuning.threads else None
        self.start = self.best = self._written([], "untuned")
        self.stand = Stand(runtime, arrays, on_one_thread=set(tuning.threads) <= {1})
        self.noise = self.stand.compare(self.start, self.start, _LAST_ROUNDS).spread
        self.limit = 1 - max(LEAST_GAIN, self.noise)
        self.trials: list[Trial] = []
        self.kept: dict[str, tuple[Choice, int]] = {}  # by kind: the choice, and its place among the trials
        self.seen = {_content(self.start)}
        self.checked: tuple[float, dict[str, Any]] = (0.0, {})  # of the best

    def try_one(self, choice: Choice) -> None:
        """Measures a choice on top of those kept before; it replaces one of the same kind."""
        ratio = None
        try:
            others = [other for kind, (other, _) in self.kept.items() if kind != choice.kind]
            candidate = self._written([*others, choice], "other" if self.best.parent.name == "one" else "one")
            if (content := _content(candidate)) in self.seen:
                return  # the file is the same as one tried before
            self.seen.add(content)
            ratio = self.stand.compare(self.best, candidate, _ROUNDS, self.limit).ratio
            if ratio < self.limit:
                with session_apart(candidate, self.runtime) as session:
                    self.checked = self.check(candidate, session)
                self._keep(choice, candidate)
        except (LoboError, RuntimeError) as error:
            self.trials.append(Trial(choice.name, ratio, False, str(error).partition("\n")[0]))
        else:
            self.trials.append(Trial(choice.name, ratio, ratio < self.limit))

    def found(self) -> Tuned:
        """The kept choices, if the file with all of them is faster when measured again."""
        if not self.kept:
            return Tuned(tuple(self.trials), self.noise)
        ratio = self.stand.compare(self.start, self.best, _LAST_ROUNDS).ratio
        if ratio >= self.limit:
            reason = "not faster when measured once more"
            missed = [dataclasses.replace(t, kept=False, reason=reason) if t.kept else t for t in self.trials]
            return Tuned(tuple(missed), self.noise, ratio=ratio)
        choices = tuple(choice for choice, _ in self.kept.values())
        return Tuned(tuple(self.trials), self.noise, choices, ratio, self.best, *self.checked)

    def _keep(self, choice: Choice, candidate: Path) -> None:
        if choice.kind in self.kept:
            place = self.kept[choice.kind][1]
            reason = f"{choice.name} is faster"
            self.trials[place] = dataclasses.replace(self.trials[place], kept=False, reason=reason)
        self.best, self.kept[choice.kind] = candidate, (choice, len(self.trials))

    def _written(self, choices: list[Choice], name: str) -> Path:
        target = self.folder / name / self.path.name
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        self.runtime.write_tuned(self.path, choices, target, self.threads)
        return target


def _content(path: Path) -> tuple[str, ...]:
    """Checksums of a file and all files that belong to it, to recognise equal ones."""
    return tuple(checksum(file) for file in sorted(path.parent.iterdir()))
