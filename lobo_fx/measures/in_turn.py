"""Compares the times of two files without leaving it to chance: each round loads both anew and runs them in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from pathlib import Path

from lobo_fx.errors import InvalidInput
from lobo_fx.measures.apart import SessionApart, session_apart
from lobo_fx.plugins.protocols import Arrays
from lobo_fx.plugins.tuning import TunesFiles

__all__ = ["Comparison", "Stand"]

_SECONDS = 0.4
"""Seconds that a file runs in a round; more if that is fewer than `_LEAST_TURNS` turns."""
_TURN = 4e-3
"""Least seconds of a turn, before the other file runs: waking a process takes some microseconds."""
_LEAST_TURNS = 8
_WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two files measured in turn.

    Attributes:
        rounds: by round, median time of the second file over that of the first.
    """

    rounds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds: if it is below a limit, so are most of them."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The largest deviation of a round from equal times."""
        return max(abs(1 - ratio) for ratio in self.rounds)


@dataclasses.dataclass(frozen=True)
class Stand:
    """Settings of comparisons.

    Attributes:
        runtime: the runtime, which applies the options beside the files.
        arrays: the inputs.
        on_one_thread: whether all files run on one thread: then CPU time is measured, on a core that both files
            share, so that other work on the machine has little effect. Else wall time is measured.
    """

    runtime: TunesFiles
    arrays: Arrays
    on_one_thread: bool = True

    def compare(self, before: Path, after: Path, rounds: int, limit: float = 0.0) -> Comparison:
        """Compares the times of two files.

        Args:
            before: the file to beat.
            after: the other file.
            rounds: how many times both are loaded.
            limit: stops early when so many rounds are at or above this ratio that the median can't be below it.

        Raises:
            InvalidInput: a file can't be loaded, or does not run on the arrays.
        """
        found: list[float] = []
        for index in range(rounds):
            one, other = self._round((before, after), index)
            found.append(other / one)
            if limit and 2 * sum(ratio >= limit for ratio in found) > rounds:
                break
        return Comparison(tuple(found))

    def _round(self, files: tuple[Path, Path], index: int) -> list[float]:
        """Median seconds of one call of each file."""
        core = index if self.on_one_thread else None
        with contextlib.ExitStack() as held:
            order = (0, 1) if index % 2 == 0 else (1, 0)
            loaded = {place: held.enter_context(session_apart(files[place], self.runtime, core)) for place in order}
            try:
                for session in loaded.values():
                    session.run(self.arrays)
                    session.seconds(_WARMUP)
                slowest = max(map(self._seconds, loaded.values()))
                calls = max(1, round(_TURN / slowest))
                times: dict[int, list[float]] = {0: [], 1: []}
                for _ in range(max(_LEAST_TURNS, round(_SECONDS / (calls * slowest)))):
                    for place, session in loaded.items():
                        times[place].append(self._seconds(session, calls))
            except RuntimeError as error:
                raise InvalidInput(f"it does not run: {error}") from error
        return [statistics.median(times[place]) for place in (0, 1)]

    def _seconds(self, session: SessionApart, calls: int = 1) -> float:
        return session.seconds(calls, cpu=self.on_one_thread)
