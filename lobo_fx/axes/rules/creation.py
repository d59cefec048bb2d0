"""Tensors made from nothing."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.graph.operators import aten


@axis_rule(
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    aten.scalar_tensor.default,
)
def constant(call: Call) -> Axes:
    """The same value everywhere: positions can go."""
    outputs = tuple(call.fresh(size) for size in call.sizes())
    if "size" in call.given:
        call.counts("size", outputs)
    return outputs


@axis_rule(
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m),
    aten.linspace.default,
)
def positions(call: Call) -> Axes:
    """Values that count positions."""
    return tuple(call.fixed(size, "its values count positions") for size in call.sizes())
