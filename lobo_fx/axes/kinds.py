"""What an axis is used as: one word for each leaf, from the roles that rules gave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.zeros import Sum

__all__ = ["KINDS", "is_stored", "kind", "mark_linear_layers"]

KINDS = ("heads", "head_dim", "groups", "residual", "channels", "hidden", "width")
"""Most specific first: a leaf with several roles is of the first kind among them."""

_LINEAR = {"written", "read"}


def kind(leaf: Axis) -> str:
    """Which of `KINDS` a leaf is.

    - heads, head_dim: of attention, also where it is written as two matrix products;
    - groups: of grouped convolutions and group norms with more than one channel a group;
    - residual: two computed values are added along it;
    - channels: a convolution mixes others into it;
    - hidden: between two linear layers, or the state of a recurrent one;
    - width: anything else.
    """
    roles = leaf.find().roles
    found = roles | {"hidden"} if roles >= _LINEAR else roles
    return next((kind for kind in KINDS if kind in found), "width")


def mark_linear_layers(values: Mapping[fx.Node, Any], sums: list[Sum]) -> None:
    """Marks axes that are summed with a stored matrix as "read", and the matrix's other axes as "written"."""
    for _, summed, operands in sums:
        for matrix in operands if len(operands) > 1 else ():
            if is_stored(matrix):
                inner = set(summed.leaves())
                summed.mark("read")
                for axis in values[matrix]:
                    if not inner.intersection(axis.leaves()):
                        axis.mark("written")


def is_stored(node: fx.Node) -> bool:
    """Whether a value is a parameter or buffer, or a view of one."""
    while len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"
