"""The objectives that the trials of a study are compared by, and how they are measured."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.result import Result
from lobo_fx.studies.storage import Direction

__all__ = ["OBJECTIVES", "Measuring", "Objective", "chosen_objectives"]

_MOST_DECIBELS = 150.0
"""Most decibels that count; outputs that are equal up to float32 rounding have that many."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective of a search.

    Attributes:
        direction: `maximize` or `minimize`.
        meaning: its meaning, for tables.
    """

    direction: Direction
    meaning: str


OBJECTIVES = {
    "score": Objective("maximize", "what evaluate returned"),
    "decibels": Objective("maximize", "signal-to-noise ratio on held-out calibration rows, at most 150 dB"),
    "latency": Objective("minimize", "CPU time of a call, of the original's"),
    "size": Objective("minimize", "bytes of the file, of the original's"),
    "memory": Objective("minimize", "peak memory of the model, of the original's"),
}


def chosen_objectives(names: Sequence[str] | None, is_scored: bool) -> tuple[str, ...]:
    """The objectives of a study, in order.

    Args:
        names: as given; None takes the loss (the score, or decibels if there is none) and latency.
        is_scored: whether `evaluate` is given.

    Raises:
        InvalidInput: an unknown name, one given twice, or a score without `evaluate`.
    """
    chosen = tuple(names) if names else ("score" if is_scored else "decibels", "latency")
    for name in chosen:
        if name not in OBJECTIVES:
            raise InvalidInput(f"no objective is called '{name}'; {suggestion(name, OBJECTIVES)}")
        if chosen.count(name) > 1:
            raise InvalidInput(f"the objective '{name}' is given twice")
        if name == "score" and not is_scored:
            raise InvalidInput("the objective 'score' needs evaluate= (--evaluate); without it, 'decibels' is the loss")
    return chosen


@dataclasses.dataclass(frozen=True)
class Measuring:
    """How a compiled model is measured.

    Attributes:
        objectives: the requested objectives.
        folder: folder for the exported file.
        original: the original's file.
        threads: threads of the runtime.
        batch: rows of the input.
        rounds: how many times each file runs.
    """

    objectives: tuple[str, ...]
    folder: Path
    original: Artifact
    threads: int
    batch: int
    rounds: int

    def __call__(self, result: Result) -> dict[str, float]:
        """Exports a model and measures the objectives, and others that cost nothing more.

        Raises:
            InvalidInput: the outputs are not finite where the original's are.
        """
        result.report.artifacts["original"] = self.original  # so that no export writes it again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of low decibels, which are an objective
            artifact = result.export(self.folder / f"model{self.original.path.suffix}")
        last = result.report.rows[-1]  # read after the export, which may replace integer kernels
        if last.snr == -math.inf:
            raise InvalidInput("the outputs are NaN or infinite where the original's are not, or hold no signal")
        found = {
            "decibels": max(-_MOST_DECIBELS, min(_MOST_DECIBELS, last.snr)),
            "size": artifact.bytes / self.original.bytes,
        }
        if last.score is not None:
            found["score"] = last.score
        if {"latency", "memory"} & set(self.objectives):
            with_memory = "memory" in self.objectives
            measured = result.benchmark(threads=self.threads, batch=self.batch, rounds=self.rounds, memory=with_memory)
            found["latency"] = measured.ratio("compiled")
            if with_memory:
                of = {
                    label: max(1, (latency.memory or 0) - (latency.base_memory or 0))
                    for label, latency in measured.latencies.items()
                }
                found["memory"] = of["compiled"] / of["original"]
        return found
