"""Writes operators that PyTorch composes of others as these others, where axis rules know them.

`hstack`, `narrow`, `negative` and `tensordot` are other spellings of `cat`, `slice`, `neg` and a product; a hundred
more operators are. What has an axis rule of its own is kept as it is, and so is what is composed of anything without.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from lobo_fx.axes.call import rule_of
from lobo_fx.axes.plugged import load_plugged_rules
from lobo_fx.graph.decomposing import decomposition, put_in_place
from lobo_fx.graph.operators import aten, is_call, is_inplace
from lobo_fx.graph.program import ProgramModule

__all__ = ["write_composites_out"]

_VIEWS = aten.view.default, aten._unsafe_view.default


def write_composites_out(module: ProgramModule) -> bool:
    """Rewrites calls in place.

    Args:
        module: shapes propagated.

    Returns:
        Whether anything changed; shapes must then be propagated again.
    """
    graph = module.graph
    if not any(map(_is_composed, graph.nodes)):
        return False
    load_plugged_rules()  # which may know more
    changed = False
    for node in filter(_is_composed, list(graph.nodes)):
        found = decomposition(node, node.target.decompose)
        if found is None or not all(_is_known(inner) and not is_inplace(inner) for inner in found.nodes):
            continue
        for view in filter(lambda inner: is_call(inner, *_VIEWS), found.nodes):
            view.target = aten.reshape.default  # a view of what was contiguous as it was traced
        put_in_place(node, found)
        changed = True
    if changed:
        module.recompile()
    return changed


def _is_composed(node: fx.Node) -> bool:
    """Whether no axis rule knows what is called, and PyTorch composes it of other operators."""
    return not _is_known(node) and isinstance(node.target, torch._ops.OpOverload) and node.target._can_decompose()


def _is_known(node: fx.Node) -> bool:
    """Whether an axis rule knows what is called, or it computes no tensor."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    value = node.meta.get("val")
    return rule_of(node) is not None or not isinstance(value, torch.Tensor | tuple | list)
