"""Convolutions: channels are contracted, space is locked."""

from __future__ import annotations

from lobo_fx.axes.axis import Axis, product
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import all_of, any_of, through
from lobo_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

__all__ = ["convolution", "transposed_convolution"]

_PRODUCTS = all_of(any_of("weight", through("input", "weight")), "bias")


@axis_rule(*CONVOLUTIONS, zeros=_PRODUCTS)
def convolution(call: Call) -> Axes:
    """x[n (g·i) …], w[(g·o) i …] → [n (g·o) …]."""
    x, weight, groups = call.axes("input"), call.axes("weight"), call.given["groups"]
    batched = len(x) == len(weight)
    channels = x[1] if batched else x[0]
    if groups == 1:
        call.unify(channels, weight[1])
    else:
        group = _group(call, weight[1])
        call.unify(channels, product([group, weight[1]]))
        outputs = weight[0].find().size
        assert isinstance(outputs, int)
        call.unify(weight[0], product([group, call.fresh(outputs // groups)]))
    output = _convolved(call, x, weight, weight[0], batched)
    call.multiplies(*output, *weight[1:])
    return output


@axis_rule(*TRANSPOSED_CONVOLUTIONS, zeros=_PRODUCTS)
def transposed_convolution(call: Call) -> Axes:
    """x[n (g·i) …], w[(g·i) o …] → [n (g·o) …]."""
    x, weight, groups = call.axes("input"), call.axes("weight"), call.given["groups"]
    batched = len(x) == len(weight)
    channels = call.unify(x[1] if batched else x[0], weight[0])
    outputs = weight[1]
    if groups > 1:
        size = channels.find().size
        assert isinstance(size, int)
        width = call.fresh(size // groups)
        group = _group(call, width)
        call.unify(channels, product([group, width]))
        outputs = product([group, weight[1]])
    call.multiplies(*x, *weight[1:])  # each input position is multiplied with the window
    return _convolved(call, x, weight, outputs, batched)


def _group(call: Call, width: Axis) -> Axis:
    """The axis of groups; groups of one channel each count as channels."""
    group = call.fresh(call.given["groups"])
    call.counts("groups", group)
    if width.find().size != 1:
        group.mark("groups")
    return group


def _convolved(call: Call, x: Axes, weight: Axes, outputs: Axis, batched: bool) -> Axes:
    """Unifies the bias with the outputs; locks spatial dimensions, unless a window of size 1 keeps their size."""
    reason = "it is a spatial dimension of a convolution"
    first = 2 if batched else 1
    spatial = list(x[first:])
    for d, (window, size) in enumerate(zip(weight[2:], call.sizes()[first:], strict=True)):
        window.lock(reason)
        if window.find().size != 1 or spatial[d].find().size != size:
            spatial[d].lock(reason)
            spatial[d] = call.fixed(size, reason)
    if call.has("bias"):
        call.unify(outputs, call.axes("bias")[0])
    groups = call.given["groups"]
    if groups == 1 or x[first - 1].find().size != groups:
        outputs.mark("channels")
    return (*(x[:1] if batched else ()), outputs, *spatial)
