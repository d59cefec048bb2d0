"""Families: runs that are ranked together, and what follows from their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lobo_fx.report.advice import Advice, advise
from lobo_fx.report.figures import METRICS, ROWS, Figures, Metric, front, quality_metric, ranking_metric

__all__ = ["Family"]


@dataclasses.dataclass(frozen=True)
class Family:
    """Runs that are ranked together.

    Attributes:
        name: name of their model if there are several families; else empty.
        places: indices of the runs in the comparison.
        runs: their figures.
        score: meaning of their score, in words.
    """

    name: str
    places: Sequence[int]
    runs: Sequence[Figures]
    score: str

    @property
    def quality(self) -> Metric:
        """The metric of quality."""
        found = quality_metric(self.runs)
        return dataclasses.replace(found, meaning=self.score) if found.name == "score" else found

    @property
    def metrics(self) -> list[Metric]:
        """The metrics for rankings; with memory if measured, with rates if other units than rows were counted."""
        measured = [METRICS["memory"]] if any(run.added_memory is not None for run in self.runs) else []
        timed = [METRICS["rate"]] if any(run.unit != ROWS for run in self.runs) else []
        return [METRICS["size"], METRICS["speed"], *measured, *timed, self.quality, ranking_metric(self.runs)]

    @property
    def front(self) -> list[Figures]:
        """Runs that no other one beats in size, speed and quality alike."""
        return front(self.runs, ["size", "speed", self.quality.name])

    @property
    def advice(self) -> list[Advice]:
        """Recommendations that follow from the figures."""
        return advise(self.runs)
