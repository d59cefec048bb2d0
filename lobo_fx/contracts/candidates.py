"""The candidates of a search: other models that it found, each of which can be compiled without searching again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lobo_fx.graph.program import Program

__all__ = ["CANDIDATES", "Candidate", "Plans", "pareto"]

CANDIDATES = "candidates"
"""Title of the sheet that lists all candidates of a search."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One candidate: how it is made, and what it costs and loses.

    Attributes:
        name: the method that proposed it.
        pass_: the `Pass` that makes it from `start` without a search; not typed, as its module imports this one.
        made_by: name of the pass that searched.
        start: the program that the search began with.
        predicted: predicted latency, as a share of the original's.
        measured: measured latency as a share of the original's, from files that ran in turn; None if not measured.
        bytes: size of the file, metadata included; the real size if it was written, else an estimate.
        decibels: signal-to-noise ratio of the outputs against the original's, on rows that no fit saw.
        score: what `evaluate` gave; None where it was not called.
        chosen: whether the search chose it.
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
        """The measured latency, else the predicted one."""
        return self.predicted if self.measured is None else self.measured


@runtime_checkable
class Plans(Protocol):
    """A pass that searches, and can apply a saved plan without a search."""

    def planned(self, file: Path) -> Any:
        """The `Pass` that applies the plan in a file."""


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other beats in latency, size and loss alike, fastest first.

    The loss is the score where both have one, else the decibels. A candidate without a score never beats one with a
    score.
    """

    def beats(a: Candidate, b: Candidate) -> bool:
        if a.score is None and b.score is not None:
            return False
        by_score = b.score is not None
        ours, theirs = ((c.latency, c.bytes, -((c.score or 0.0) if by_score else c.decibels)) for c in (a, b))
        return ours != theirs and all(x <= y for x, y in zip(ours, theirs, strict=True))

    front = [c for c in candidates if not any(beats(other, c) for other in candidates)]
    return sorted(front, key=lambda candidate: candidate.latency)
