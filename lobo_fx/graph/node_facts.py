"""What is known of a node beside what torch keeps on it, as fields of one record."""

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
