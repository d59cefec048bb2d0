"""Tensors joined into one."""

from __future__ import annotations

from lobo_fx.axes.axis import Axis, concatenation
from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten

__all__ = ["cat", "meshgrid", "stack"]


@axis_rule(aten.cat.default, aten.concat.default, zeros=MOVED)
def cat(call: Call) -> Axes:
    """The given dimension is a concatenation; the others are the same in all tensors."""
    tensors = [call.of(node) for node in call.given["tensors"]]
    tensors = [axes for axes in tensors if len(axes) == len(call.sizes())]
    dim = call.given["dim"] % len(tensors[0])
    output = list(tensors[0])
    for axes in tensors[1:]:
        for d, axis in enumerate(axes):
            if d != dim:
                output[d] = call.unify(output[d], axis)
    if not all(isinstance(axes[dim].find().size, int) for axes in tensors):
        lock_all([axes[dim] for axes in tensors], "it is joined along a free size")
        output[dim] = call.fixed(call.sizes()[dim], "it is joined along a free size")
    else:
        output[dim] = concatenation([axes[dim] for axes in tensors])
    return tuple(output)


@axis_rule(aten.stack.default, zeros=MOVED)
def stack(call: Call) -> Axes:
    """A new dimension runs over the tensors."""
    tensors = [call.of(node) for node in call.given["tensors"]]
    output = list(call.broadcast(tensors))
    dim = call.given["dim"] % (len(output) + 1)
    output.insert(dim, call.fixed(len(tensors), "it counts stacked tensors"))
    return tuple(output)


@axis_rule(aten.meshgrid.default, aten.meshgrid.indexing, zeros=MOVED)
def meshgrid(call: Call) -> list[Axes]:
    """Every tensor has one dimension for each vector; `xy` swaps the first two."""
    axes = [axis for vector in call.given["tensors"] for axis in call.of(vector) or (Axis(1),)]
    if call.given.get("indexing") == "xy":
        axes[:2] = axes[1::-1]
    return [tuple(axes) for _ in call.node.meta["val"]]
