"""Facts of a node that torch does not keep, as fields of one record."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

__all__ = ["NodeFacts", "facts_of", "mark"]

_KEY = "lobo_fx"


@dataclasses.dataclass(frozen=True)
class NodeFacts:
    """Facts of a node.

    Attributes:
        made_by: name of the pass that made the node, empty if tracing did; None until the compiler has tagged it.
        always_training: whether it stays in training mode under `eval()`, as it was traced (Monte-Carlo dropout).
        masked: whether it multiplies a weight by its mask.
        tied: for a node that reads codes: the parameter that other nodes still read as float.
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
