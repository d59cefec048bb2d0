"""Confirms by measuring whole files that integer kernels, chosen by estimated times, are faster than float."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lobo_fx.measures.latency import benchmark
from lobo_fx.plugins.protocols import Arrays, Runtime

__all__ = ["Confirmation", "confirm"]

_FIRST_ROUNDS, _LAST_ROUNDS = 8, 20
"""Rounds of the first comparison, which settles clear cases, and of the last, which decides between the files."""


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """Median latencies of one run, as ratios to the original's.

    Attributes:
        compiled: latency of the file with integer kernels.
        floating: latency of the float version; None where it was not measured, as the compiled file is fast enough.
    """

    compiled: float
    floating: float | None = None

    @property
    def takes_back(self) -> bool:
        """Whether the float file is to replace the compiled one: only where the rounded ratio shows it faster."""
        return self.floating is not None and round(self.compiled / self.floating, 2) > 1


def confirm(
    original: Path,
    compiled: Path,
    floating: Callable[[], Path],
    runtime: Runtime,
    arrays: Arrays,
    progress: bool,
    *,
    same_macs: bool,
) -> Confirmation:
    """Measures the compiled file in turn with the original, and with a float version where that may be faster.

    Args:
        original: the original's file.
        compiled: the file to confirm.
        floating: writes the float version; called only where it is needed.
        runtime: the runtime that runs the files.
        arrays: one row of inputs.
        progress: whether to draw a progress bar.
        same_macs: whether the original has as many multiply-accumulates as the float version: a file that is faster
            than the original is then faster than the float version too. False for pruned networks.
    """
    files = {"original": original, "compiled": compiled}

    def ratio(label: str, rounds: int) -> float:
        measured = benchmark(files, runtime, arrays=arrays, rounds=rounds, memory=False, progress=progress)
        ratios.update({name: measured.ratio(name, "p50") for name in files})
        return ratios[label]

    ratios: dict[str, float] = {}
    if same_macs and ratio("compiled", _FIRST_ROUNDS) <= 1:
        return Confirmation(ratios["compiled"])
    files["floating"] = floating()
    return Confirmation(ratio("compiled", _LAST_ROUNDS), ratios["floating"])
