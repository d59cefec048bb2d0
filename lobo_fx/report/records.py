"""The records that a report is made of; reading them needs no PyTorch."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lobo_fx.measures.module_figures import ModuleFigures

if TYPE_CHECKING:
    from lobo_fx.measures.counts import Measures
    from lobo_fx.measures.judge import Verdict

__all__ = ["SENSITIVITY", "AxisRow", "CandidateRow", "ModuleRow", "Row", "Sheet"]

SENSITIVITY = "sensitivity"
"""Title of the sheet of sensitivities: module, decibels with that layer alone quantized, precision."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The program after one pass.

    Attributes:
        name: the pass with its settings; `original` for the first row.
        parameters: see `lobo_fx.measures.counts.Measures`, as are the next four.
        nonzero: parameters that are not zero.
        sparsity: share of the parameters that are zero.
        macs: multiply-accumulates of one row of the batch.
        bytes: memory of parameters and buffers.
        snr: signal-to-noise ratio of the outputs against the original's, in decibels, on held-out rows of the
            calibration data, or the example inputs where there are none.
        worst: the same, of the output (or what is concatenated into one) where it is lowest.
        worst_part: its name; empty where there is one output.
        score: what `evaluate` returned, if it was given.
        seconds: time the pass and its verification took.
    """

    name: str
    parameters: int
    nonzero: int
    sparsity: float
    macs: int | None
    bytes: int
    snr: float
    score: float | None
    seconds: float
    worst: float = math.inf
    worst_part: str = ""

    @classmethod
    def of(cls, name: str, measures: Measures, verdict: Verdict, score: float | None, seconds: float) -> Row:
        m, v = measures, verdict
        counts = (m.parameters, m.nonzero, m.sparsity, m.macs, m.bytes)
        return cls(name, *counts, v.whole, score, seconds, v.worst, v.part)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table that a pass adds to the report; the second column is drawn against the first.

    Attributes:
        title: in the report, and the name of its files.
        columns: their headings.
        rows: cells, numbers as numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class CandidateRow:
    """A candidate of a search, as data.

    Attributes:
        name: what proposed it.
        latency: as a share of the original's.
        is_measured: whether files were timed in turn; else the latency is a prediction.
        bytes: size of the file, as expected or, where it was written, as it is.
        decibels: signal-to-noise ratio of the outputs against the original's, on rows that no fit saw.
        score: what `evaluate` returned; None where it was not asked.
        chosen: whether the search took it.
    """

    name: str
    latency: float
    is_measured: bool
    bytes: int
    decibels: float
    score: float | None = None
    chosen: bool = False


@dataclasses.dataclass(frozen=True)
class AxisRow:
    """An axis that structured pruning cut.

    Attributes:
        name: the first parameter and dimension that it runs through, as `conv1.weight[0]`.
        members: how many parameters and dimensions it runs through.
        before: its positions in the original.
        after: how many of them stay.
        parameters: how many parameters of the original lie along it.
    """

    name: str
    members: int
    before: int
    after: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class ModuleRow:
    """A module of the model that holds layers, before and after.

    Attributes:
        name: dotted; empty for the model itself. Those that it is in stand before it.
        before: of the original; null where a pass made it.
        after: of the compiled model; null where nothing is left of it.
        decibels: signal-to-noise ratio of the outputs with this layer alone quantized; null if not measured.
    """

    name: str
    before: ModuleFigures | None
    after: ModuleFigures | None
    decibels: float | None = None
