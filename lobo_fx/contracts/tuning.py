"""Tuning: what a runtime offers for a file is tried in turn, and kept where it was measured faster and agrees.

A difference that is due to chance must not pass, and there are many chances: every round loads both files afresh, each
in a process of its own, and calls them in turn; the medians must differ by more than a share, in most rounds and over
all of them; and what was kept must show it once more, together, against the file as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.files import checksum
from lobo_fx.measures.apart import SessionApart, session_apart
from lobo_fx.plugins.protocols import Arrays, Exporter, Session
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.plugins.tuning import ChecksFiles, Choice, TunesFiles, Tuning
from lobo_fx.terminal.progress import track

__all__ = ["LEAST_GAIN", "Comparison", "Trial", "Tuned", "compare", "read_tuning", "runtime_of", "tune"]

LEAST_GAIN = 0.02
"""By what share of the latency a choice must be faster."""
_ROUNDS, _LAST_ROUNDS = 3, 5
_SECONDS = 0.4
"""How long a file runs in a round; longer where that is fewer than `_LEAST_TURNS`."""
_TURN = 4e-3
"""How long a file runs, at least, before the other one does: waking a process takes some microseconds."""
_LEAST_TURNS = 8
_WARMUP = 2

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
class Comparison:
    """Two files measured in turn.

    Attributes:
        ratio: median latency of the second over that of the first, over all rounds.
        rounds: the same of each round.
    """

    ratio: float
    rounds: tuple[float, ...]

    @property
    def is_faster(self) -> bool:
        """Whether the second is faster beyond chance: over all rounds, and in most of them."""
        return self.ratio < 1 - LEAST_GAIN and 2 * sum(ratio < 1 - LEAST_GAIN for ratio in self.rounds) > len(
            self.rounds
        )


def compare(before: Path, after: Path, runtime: TunesFiles, arrays: Arrays, rounds: int = _ROUNDS) -> Comparison:
    """Measures two files in turn; stops where the second has lost half of the rounds.

    Args:
        before: the file to beat.
        after: the file that may.
        runtime: what runs them, as their options say.
        arrays: what they run on.
        rounds: how often both are loaded.

    Raises:
        InvalidInput: a file can't be loaded, or does not run on the arrays.
    """
    times: tuple[list[float], list[float]] = ([], [])
    found: list[float] = []
    for index in range(rounds):
        with contextlib.ExitStack() as open_:
            order = (0, 1) if index % 2 == 0 else (1, 0)
            sessions = {place: open_.enter_context(session_apart((before, after)[place], runtime)) for place in order}
            try:
                one = _round(sessions, arrays)
            except RuntimeError as error:
                raise InvalidInput(f"it does not run: {error}") from error
        for place, measured in one.items():
            times[place].extend(measured)
        found.append(statistics.median(one[1]) / statistics.median(one[0]))
        if 2 * sum(ratio >= 1 - LEAST_GAIN for ratio in found) >= rounds:
            break
    return Comparison(statistics.median(times[1]) / statistics.median(times[0]), tuple(found))


def _round(sessions: dict[int, SessionApart], arrays: Arrays) -> dict[int, list[float]]:
    """Seconds of one call, by session: of each turn."""
    for session in sessions.values():
        session.run(arrays)
        session.seconds(_WARMUP)
    slowest = max(session.seconds(1) for session in sessions.values())
    calls = max(1, round(_TURN / slowest))
    turns = max(_LEAST_TURNS, round(_SECONDS / (calls * slowest)))
    times: dict[int, list[float]] = {place: [] for place in sessions}
    for _ in range(turns):
        for place, session in sessions.items():
            times[place].append(session.seconds(calls))
    return times


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
    """

    trials: tuple[Trial, ...]
    kept: tuple[Choice, ...] = ()
    ratio: float | None = None
    path: Path | None = None
    parity: float = 0.0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For an artifact's details."""
        return {
            "ratio": self.ratio,
            "kept": [choice.name for choice in self.kept],
            "tried": [dataclasses.asdict(trial) for trial in self.trials],
        }

    def __str__(self) -> str:
        rejected = [_said(trial) for trial in self.trials if not trial.kept]
        others = f"tried and not kept: {', '.join(rejected) or 'nothing'}"
        if self.path is None:
            again = "" if self.ratio is None else f" (what was faster alone takes {self.ratio:.2f} times together)"
            return f"nothing that the runtime offers is faster by {LEAST_GAIN:.0%}{again}; {others}"
        kept = [_said(trial) for trial in self.trials if trial.kept]
        remarks = "".join(f"; {remark}" for remark in dict.fromkeys(choice.remark for choice in self.kept) if remark)
        return f"it takes {self.ratio:.2f} times the untuned file's latency; kept: {', '.join(kept)}{remarks}; {others}"


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
    threads = tuning.threads[0] if tuning.threads else None

    def written(choices: list[Choice], name: str) -> Path:
        target = folder / name / path.name
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        runtime.write_tuned(path, choices, target, threads)
        return target

    start = best = written([], "untuned")
    kept: dict[str, tuple[Choice, int]] = {}
    trials: list[Trial] = []
    seen = {_content(start)}
    checked: tuple[float, dict[str, Any]] = (0.0, {})
    for choice in track(runtime.choices(tuning.threads[1:]), f"tune {path.name}", progress):
        ratio = None
        try:
            others = [other for kind, (other, _) in kept.items() if kind != choice.kind]
            candidate = written([*others, choice], "other" if best.parent.name == "one" else "one")
            if (content := _content(candidate)) in seen:
                continue  # it changes nothing, or what was tried before
            seen.add(content)
            found = compare(best, candidate, runtime, arrays)
            ratio = found.ratio
            if found.is_faster:
                with session_apart(candidate, runtime) as session:
                    checked = check(candidate, session)
        except (LoboError, RuntimeError) as error:
            trials.append(Trial(choice.name, ratio, False, str(error).partition("\n")[0]))
            continue
        if found.is_faster:
            if choice.kind in kept:
                place = kept[choice.kind][1]
                trials[place] = dataclasses.replace(trials[place], kept=False, reason=f"{choice.name} is faster")
            best, kept[choice.kind] = candidate, (choice, len(trials))
        trials.append(Trial(choice.name, ratio, found.is_faster))
    if not kept:
        return Tuned(tuple(trials))
    last = compare(start, best, runtime, arrays, _LAST_ROUNDS)
    if not last.is_faster:
        taken_back = "not faster when measured once more"
        kept_no_more = [dataclasses.replace(t, kept=False, reason=taken_back) if t.kept else t for t in trials]
        return Tuned(tuple(kept_no_more), ratio=last.ratio)
    return Tuned(tuple(trials), tuple(choice for choice, _ in kept.values()), last.ratio, best, *checked)


def _content(path: Path) -> tuple[str, ...]:
    """What tells files with all that belongs to them apart."""
    return tuple(checksum(file) for file in sorted(path.parent.iterdir()))
