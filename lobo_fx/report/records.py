"""The records that a report is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from lobo_fx.measures.counts import Measures

__all__ = ["Row", "Sheet"]


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
        snr: signal-to-noise ratio of the outputs against the original's, in decibels.
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

    @classmethod
    def of(cls, name: str, measures: Measures, snr: float, score: float | None, seconds: float) -> Row:
        m = measures
        return cls(name, m.parameters, m.nonzero, m.sparsity, m.macs, m.bytes, snr, score, seconds)


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
