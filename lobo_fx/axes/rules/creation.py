"""Tensors made from nothing."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import NOWHERE, all_of
from lobo_fx.graph.operators import aten

__all__ = ["constant", "positions", "random_like"]


@axis_rule(aten.zeros.default, aten.new_zeros.default, zeros=all_of())
@axis_rule(aten.full.default, aten.new_full.default, zeros=all_of("fill_value"))
@axis_rule(aten.scalar_tensor.default, zeros=all_of("s"))
@axis_rule(
    *(aten.ones.default, aten.new_ones.default, aten.empty.memory_format, aten.new_empty.default),
    zeros=NOWHERE,
)
def constant(call: Call) -> Axes:
    """The same value everywhere: positions can go."""
    call.ignores("self")  # `new_zeros` takes its dtype
    outputs = tuple(call.fresh(size) for size in call.sizes())
    if "size" in call.given:
        call.counts("size", outputs)
    return outputs


@axis_rule(aten.randn_like.default, aten.rand_like.default, aten.bernoulli.default, zeros=NOWHERE)
def random_like(call: Call) -> Axes:
    """Random values, a position as good as another; drawn for fewer positions they are other ones."""
    for axis in call.axes("self"):
        axis.mark_inexact(f"{call.node.target} draws at random")
    return call.axes("self")


@axis_rule(
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m),
    aten.linspace.default,
    zeros=NOWHERE,
)
def positions(call: Call) -> Axes:
    """Values that count positions."""
    return tuple(call.fixed(size, "its values count positions") for size in call.sizes())
