"""Copies of the same elements."""

from __future__ import annotations

from lobo_fx.axes.axis import Axis, AxisError, product, total
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten

__all__ = ["expand", "repeat", "repeat_interleave"]


@axis_rule(aten.expand.default, aten.broadcast_to.default, zeros=MOVED)
def expand(call: Call) -> Axes:
    """A dimension of size 1, or a new one, is repeated: its axis is a new leaf, free until unified with another."""
    x, sizes = call.axes("self"), call.sizes()
    padded = (*(None for _ in range(len(sizes) - len(x))), *x)
    outputs = tuple(
        axis if axis is not None and axis.find().size == size else call.fresh(size)
        for axis, size in zip(padded, sizes, strict=True)
    )
    call.counts("size", outputs)
    return outputs


@axis_rule(aten.repeat.default, aten.tile.default, zeros=MOVED)
def repeat(call: Call) -> Axes:
    """[r0 r1 …] times: each dimension is repeats × axis."""
    x, sizes = call.axes("self"), call.sizes()
    padded = (*(Axis(1) for _ in range(len(sizes) - len(x))), *x)
    output = []
    for axis, size in zip(padded, sizes, strict=True):
        if axis.find().size == size:
            output.append(axis)
        elif axis.find().size == 1:
            output.append(call.fixed(size, "it counts repetitions"))
        else:
            times = total([size]) / axis.find().size if not isinstance(size, int) else size // axis.find().size
            output.append(product([call.fixed(times, "it counts repetitions"), axis]))
    return tuple(output)


@axis_rule(aten.repeat_interleave.self_int, zeros=MOVED)
def repeat_interleave(call: Call) -> Axes:
    """Each position `n` times: axis × repeats."""
    x, dim = list(call.axes("self")), call.given["dim"]
    if dim is None:
        raise AxisError("repeat_interleave without a dimension is not understood")
    x[dim] = product([x[dim], call.fixed(call.integer("repeats"), "it counts repetitions")])
    return tuple(x)
