"""Whether integer kernels that were chosen by estimated times are faster in the whole file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lobo_fx.measures.latency import benchmark
from lobo_fx.plugins.protocols import Arrays, Runtime

__all__ = ["Confirmation", "confirm"]

_FIRST_ROUNDS, _LAST_ROUNDS = 8, 20
"""A file that is clearly faster needs few rounds; where the choice hangs on it, more are measured."""


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Median latencies of one run, as ratios to the original's.

    Attributes:
        compiled: of the file with integer kernels.
        floating: of the same in float; None where it was not measured, since the original's is as good as that.
    """

    compiled: float
    floating: float | None = None

    @property
    def takes_back(self) -> bool:
        """Whether the file in float is to take the place of the compiled one: by a difference that can be shown."""
        return self.floating is not None and round(self.compiled / self.floating, 2) > 1


def confirm(
    original: Path,
    compiled: Path,
    floating: Callable[[], Path],
    runtime: Runtime,
    arrays: Arrays,
    progress: bool,
    *,
    alike: bool,
) -> Confirmation:
    """Measures the compiled file in turn with the original, and with the same in float where that may be faster.

    Args:
        original: the original's file.
        compiled: the file to confirm.
        floating: writes the file in float; called only where it is needed.
        runtime: what runs them.
        arrays: one row of inputs.
        progress: whether to draw a progress bar.
        alike: whether the original computes as much as the file in float would: one that is faster than it is then
            faster than that. Of a pruned network it says nothing.
    """
    files = {"original": original, "compiled": compiled}

    def ratio(label: str, rounds: int) -> float:
        measured = benchmark(files, runtime, arrays=arrays, rounds=rounds, memory=False, progress=progress)
        ratios.update({name: measured.ratio(name, "p50") for name in files})
        return ratios[label]

    ratios: dict[str, float] = {}
    if alike and ratio("compiled", _FIRST_ROUNDS) <= 1:
        return Confirmation(ratios["compiled"])
    files["floating"] = floating()
    return Confirmation(ratio("compiled", _LAST_ROUNDS), ratios["floating"])
