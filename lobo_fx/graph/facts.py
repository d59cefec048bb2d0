"""Facts of a program that its graph does not hold, as fields of one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lobo_fx.graph.notes import Note
from lobo_fx.graph.shapes import FreeDimension
from lobo_fx.graph.signature import Signature

__all__ = ["KeptIndices", "ProgramFacts"]

KeptIndices = Mapping[str, Mapping[int, list[int]]]
"""By parameter name and dimension: the original indices of the positions that are left."""


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """Facts of a program. A change makes a new record, so copies of a module may share one.

    Attributes:
        signature: the signature that calls are checked against; None until tracing is done.
        free_dimensions: names and bounds, in the order of `lobo_fx.graph.shapes.free_symbols`.
        notes: notes of tracing about what it left as it was.
        weight_names: names of the original's parameters.
        kept: the positions that structured pruning kept, of each tensor that it cut.
        names: names that the user gave to inputs and outputs, by their default names.
        estimated: whether a pass chose by estimated times, so that `export` confirms the choice on whole files.
    """

    signature: Signature | None = None
    free_dimensions: tuple[FreeDimension, ...] = ()
    notes: tuple[Note, ...] = ()
    weight_names: tuple[str, ...] = ()
    kept: KeptIndices = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    estimated: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramFacts:
        return self
