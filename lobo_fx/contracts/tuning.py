"""Tuning: what a runtime offers for a file is tried in turn, and kept where it was measured faster and agrees.

A difference that is due to chance must not pass, and there are many chances. How far two copies of the same file differ
is measured first: a choice must do better than that in most rounds, and by a share that is worth it. What was kept must
show it once more, together, against the file as it was.
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
"""By what share of the latency a choice must be faster, at least."""
_ROUNDS, _LAST_ROUNDS = 3, 5

Check = Callable[[Path, Session], tuple[float, dict[str, Any]]]


def read_tuning(tune: bool | Tuning, exporter: Exporter) -> Tuning | None:
    """What is to be tuned for; None for nothing.

    Raises:
        InvalidInput: it is neither, or the runtime can't tune, or the exporter can't check what was tuned.
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
        ratio: latency with it over that without, both with what was kept before; None where it was not measured.
        kept: whether it is in the file.
        reason: why it is not, where that is not its latency.
    """

    name: str
    ratio: float | None
    kept: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        trials: in order.
        kept: the choices that are in the file.
        ratio: latency of the file with all that was kept over that of the untuned one, measured once more; None where
            nothing was kept.
        path: the tuned file, in a folder with what belongs to it; None where the untuned one stays.
        parity: of the tuned file.
        details: what the exporter's check says of it.
        noise: by what share copies of one file differed, at most.
    """

    trials: tuple[Trial, ...]
    noise: float
    kept: tuple[Choice, ...] = ()
    ratio: float | None = None
    path: Path | None = None
    parity: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gain(self) -> float:
        """By what share of the latency a choice must be faster: by more than copies of one file are."""
        return max(LEAST_GAIN, self.noise)

    def as_json(self) -> dict[str, Any]:
        """For an artifact's details."""
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
            return f"nothing that the runtime offers saves {self.gain:.1%} of its time or more{again}; {others}"
        kept = [_said(trial) for trial in self.trials if trial.kept]
        remarks = "".join(f"; {remark}" for remark in dict.fromkeys(choice.remark for choice in self.kept) if remark)
        return f"it takes {self.ratio:.2f} times as long as untuned; kept: {', '.join(kept)}{remarks}; {others}"


def _said(trial: Trial) -> str:
    told = ([] if trial.ratio is None else [f"{trial.ratio:.2f}"]) + ([trial.reason] if trial.reason else [])
    return f"{trial.name} ({', '.join(told)})"


def tune(
    path: Path, tuning: Tuning, runtime: TunesFiles, arrays: Arrays, check: Check, folder: Path, progress: bool
) -> Tuned:
    """Tries the choices of a runtime one after the other, each on top of what was kept.

    Args:
        path: the file as an exporter wrote it; it stays as it is.
        tuning: what it is tuned for.
        runtime: what offers the choices.
        arrays: what it is measured on.
        check: compares a file, run by a session, with PyTorch: its parity, and what is to be said of it.
        folder: an empty folder for the files that are tried.
        progress: whether to draw a progress bar.
    """
    tuner = _Tuner(path, tuning, runtime, arrays, check, folder)
    for choice in track(runtime.choices(tuning.threads[1:]), f"tune {path.name}", progress):
        tuner.try_one(choice)
    return tuner.found()


class _Tuner:
    """Tries choices, and keeps what is faster. Arguments are those of `tune`."""

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
        """Measures a choice on top of what was kept; one of the same kind it replaces."""
        ratio = None
        try:
            others = [other for kind, (other, _) in self.kept.items() if kind != choice.kind]
            candidate = self._written([*others, choice], "other" if self.best.parent.name == "one" else "one")
            if (content := _content(candidate)) in self.seen:
                return  # it changes nothing, or what was tried before
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
        """What was kept, if together it is faster once more."""
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
    """What tells files with all that belongs to them apart."""
    return tuple(checksum(file) for file in sorted(path.parent.iterdir()))
