"""Tensors made from nothing."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule, pointwise
from lobo_fx.axes.zeros import NOWHERE, all_of
from lobo_fx.graph.operators import aten

__all__ = ["constant", "drawn_positions", "positions", "random", "random_like", "random_of_means"]


@axis_rule(aten.zeros.default, aten.new_zeros.default, zeros=all_of())
@axis_rule(aten.full.default, aten.new_full.default, zeros=all_of("fill_value"))
@axis_rule(aten.scalar_tensor.default, zeros=all_of("s"))
@axis_rule(
    *(aten.ones.default, aten.new_ones.default, aten.empty.memory_format, aten.new_empty.default),
    zeros=NOWHERE,
)
def constant(call: Call) -> Axes:
    """The same value everywhere, so positions may be removed."""
    call.ignores("self")  # `new_zeros` only takes its dtype from it
    outputs = tuple(call.fresh(size) for size in call.sizes())
    if "size" in call.given:
        call.counts("size", outputs)
    return outputs


@axis_rule(
    *(aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low, aten.normal.float_float),
    zeros=NOWHERE,
)
def random(call: Call) -> Axes:
    """Independent random values, so any position may be removed."""
    return _drawn(call, constant(call))


@axis_rule(
    *(aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype),
    *(aten.bernoulli.default, aten.bernoulli.p, aten.poisson.default),
    zeros=NOWHERE,
)
def random_like(call: Call) -> Axes:
    """Random values in the shape of another tensor."""
    return _drawn(call, call.axes("self"))


@axis_rule(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor, zeros=NOWHERE)
def random_of_means(call: Call) -> Axes:
    """Normally distributed values with given means and deviations."""
    return _drawn(call, pointwise(call))


def _drawn(call: Call, axes: Axes) -> Axes:
    """Marks axes inexact, since drawing fewer numbers gives other values."""
    for axis in axes:
        axis.mark_inexact(f"{call.node.target} draws at random")
    return axes


@axis_rule(
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m),
    aten.linspace.default,
    zeros=NOWHERE,
)
def positions(call: Call) -> Axes:
    """Values that count positions."""
    return tuple(call.fixed(size, "its values count positions") for size in call.sizes())


@axis_rule(aten.randperm.default, aten.multinomial.default, zeros=NOWHERE)
def drawn_positions(call: Call) -> Axes:
    """Positions in a random order, or drawn by weights along the last dimension."""
    reason = f"{call.node.target} draws positions"
    kept = call.axes("self")[:-1] if call.has("self") else ()
    if call.has("self"):
        call.axes("self")[-1].lock(reason)
    return (*_drawn(call, kept), call.fixed(call.sizes()[-1], reason))
