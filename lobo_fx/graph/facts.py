"""What is known of a program and of its nodes beside the graph itself, as fields of two records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx

from lobo_fx.graph.notes import Note
from lobo_fx.graph.signature import Signature

__all__ = ["KeptIndices", "NodeFacts", "ProgramFacts", "facts_of", "mark"]

KeptIndices = Mapping[str, Mapping[int, list[int]]]
"""By parameter name and dimension: the original index of each position that is left."""

_KEY = "lobo_fx"


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """Facts of a program; a change makes a new record, so copies of a module may share one.

    Attributes:
        signature: what calls are checked against; None until tracing is done.
        notes: what tracing left as it was.
        weight_names: names under which the original had its parameters.
        kept: what structured pruning left of each tensor that it cut.
        estimated: whether a pass chose by estimated times, so that the whole file is to confirm the choice.
    """

    signature: Signature | None = None
    notes: tuple[Note, ...] = ()
    weight_names: tuple[str, ...] = ()
    kept: KeptIndices = dataclasses.field(default_factory=dict)
    estimated: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramFacts:
        return self


@dataclasses.dataclass(frozen=True)
class NodeFacts:
    """Facts of a node.

    Attributes:
        made_by: name of the pass that made it, empty where tracing did; None until the compiler has tagged it.
        always_training: whether it stays in training mode in `eval()`, as it was traced (Monte-Carlo dropout).
        masked: whether it multiplies a weight with its mask.
        tied: on a read of codes: the parameter that others still read as float.
    """

    made_by: str | None = None
    always_training: bool = False
    masked: bool = False
    tied: str = ""


_NOTHING = NodeFacts()


def facts_of(node: fx.Node) -> NodeFacts:
    """The facts of a node."""
    facts: NodeFacts = node.meta.get(_KEY, _NOTHING)
    return facts


def mark(node: fx.Node, **changes: Any) -> None:
    """Changes facts of a node, by name."""
    node.meta[_KEY] = dataclasses.replace(facts_of(node), **changes)
