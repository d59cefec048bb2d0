"""What a search found beside what it took: other ways to the same model, each to be had without searching again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lobo_fx.graph.program import Program

__all__ = ["CANDIDATES", "Candidate", "Plans", "pareto"]

CANDIDATES = "candidates"
"""Title of the sheet of all that a search looked at."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way, and what it brings.

    Attributes:
        name: what proposed it.
        pass_: the `Pass` that makes it of `start`, without a search; its module imports this one.
        made_by: name of the pass that searched.
        start: the program that the search began with.
        predicted: latency as a share of the original's, by the model.
        measured: the same, of files that ran in turn; None where it was not measured.
        bytes: size of the file, as expected or, where it was written, as it was, with room for metadata.
        decibels: signal-to-noise ratio of the outputs against the original's, on rows that no fit saw.
        score: `evaluate`'s; None where it was not asked.
        chosen: whether the search took it.
    """

    name: str
    pass_: Any
    made_by: str
    start: Program
    predicted: float
    measured: float | None
    bytes: int
    decibels: float
    score: float | None = None
    chosen: bool = False

    @property
    def latency(self) -> float:
        """As measured, else as predicted."""
        return self.predicted if self.measured is None else self.measured


@runtime_checkable
class Plans(Protocol):
    """A pass that searches, and can do without a search what a saved plan says."""

    def planned(self, file: Path) -> Any:
        """The `Pass` that does what the plan in a file says."""


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in latency, size and loss alike, fastest first.

    The loss is the score where both have one, else decibels. One that has no score never beats one that has.
    """

    def beats(a: Candidate, b: Candidate) -> bool:
        if a.score is None and b.score is not None:
            return False
        by_score = b.score is not None
        ours, theirs = ((c.latency, c.bytes, -((c.score or 0.0) if by_score else c.decibels)) for c in (a, b))
        return ours != theirs and all(x <= y for x, y in zip(ours, theirs, strict=True))

    front = [c for c in candidates if not any(beats(other, c) for other in candidates)]
    return sorted(front, key=lambda candidate: candidate.latency)
