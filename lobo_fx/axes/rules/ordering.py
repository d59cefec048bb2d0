"""Operators that depend on the order of positions, or that lose it."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all, sizes_of
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten

__all__ = ["ordered", "ranked", "triangle"]


@axis_rule(
    aten.cumsum.default, aten.cumprod.default, aten.diff.default, aten.flip.default, aten.roll.default, zeros=MOVED
)
def ordered(call: Call) -> Axes:
    """The order of positions matters along the given dimensions."""
    x = call.axes("self")
    dims = call.given.get("dims", call.given.get("dim"))
    chosen = range(len(x)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    for dim in chosen:
        x[dim].lock(f"{call.node.target} depends on the order of its positions")
    result = list(x)
    for dim, (axis, size) in enumerate(zip(x, call.sizes(), strict=True)):
        if axis.find().size != size:
            result[dim] = call.fixed(size, f"{call.node.target} gave it another size")
    return tuple(result)


@axis_rule(aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, zeros=MOVED)
def ranked(call: Call) -> list[Axes]:
    """Sorted values and their indices along one dimension, whose order is lost."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    x[dim].lock(f"{call.node.target} compares its positions")
    if call.given.get("keepdim", True):
        x[dim] = call.fixed(sizes_of(call.node.meta["val"][0])[dim], f"{call.node.target} gives ranks")
    else:
        del x[dim]
    return [tuple(x), tuple(x)]


@axis_rule(aten.tril.default, aten.triu.default, zeros=MOVED)
def triangle(call: Call) -> Axes:
    """The last two dimensions are compared by position."""
    x = call.axes("self")
    lock_all(x[-2:], "its positions are compared")
    return x
