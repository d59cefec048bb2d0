"""Norms and softmax: statistics over axes."""

from __future__ import annotations

from lobo_fx.axes.axis import product
from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import MOVED, NOWHERE, all_of, any_of
from lobo_fx.graph.operators import aten

__all__ = ["channel_norm", "group_norm", "layer_norm", "softmax", "weight_norm"]

# A zero input is shifted by the mean, so only a zero scale and bias make an output zero.
_SCALED = all_of(any_of("weight"), "bias")


@axis_rule(aten.batch_norm.default, aten.instance_norm.default, zeros=_SCALED)
def channel_norm(call: Call) -> Axes:
    """Dimension 1 carries weight, bias and running statistics; statistics of the input run over the others."""
    x = call.axes("input")
    alone = call.node.target is aten.instance_norm.default
    if call.given["use_input_stats" if alone else "training"] or not call.has("running_mean"):
        for axis in (*(() if alone else x[:1]), *x[2:]):
            axis.mark_inexact(f"{call.node.target} takes statistics over it")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unify(x[1], call.axes(name)[0])
    return x


@axis_rule(aten.layer_norm.default, zeros=_SCALED)
@axis_rule(aten.rms_norm.default, zeros=any_of("input", "weight"))
def layer_norm(call: Call) -> Axes:
    """Statistics over the last dimensions, which carry weight and bias."""
    x = call.axes("input")
    normalized = x[len(x) - len(call.given["normalized_shape"]) :]
    call.counts("normalized_shape", normalized)
    for axis in normalized:
        axis.mark_inexact(f"{call.node.target} takes statistics over it")
    for name in ("weight", "bias"):
        if call.has(name):
            for axis, own in zip(normalized, call.axes(name), strict=True):
                call.unify(axis, own)
    return x


@axis_rule(aten._weight_norm.default, zeros=MOVED)
def weight_norm(call: Call) -> Axes:
    """v[… d …] · g[1 d 1] / norm of v over all other dimensions."""
    v, g, dim = call.axes("v"), call.axes("g"), call.given["dim"] % len(call.axes("v"))
    for d, axis in enumerate(v):
        axis.mark_inexact("weight_norm divides by a norm " + ("over it" if d != dim else "that is zero for zeros"))
    return call.broadcast([v, g])


@axis_rule(aten.group_norm.default, zeros=_SCALED)
def group_norm(call: Call) -> Axes:
    """Dimension 1 = groups × width, with statistics over the width."""
    x, groups = call.axes("input"), call.given["num_groups"]
    channels = x[1].find().size
    assert isinstance(channels, int)
    width = call.fresh(channels // groups)
    group = call.fresh(groups)
    if channels != groups:
        group.mark("groups")
    call.counts("num_groups", group)
    call.unify(x[1], product([group, width]))
    for axis in (width, *x[2:]):
        axis.mark_inexact("group_norm takes statistics over it")
    for name in ("weight", "bias"):
        if call.has(name):
            call.unify(x[1], call.axes(name)[0])
    return x


@axis_rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default, zeros=NOWHERE)
def softmax(call: Call) -> Axes:
    """The normalised dimension is locked: each of its positions weighs on the others."""
    x = call.axes("self")
    x[call.given["dim"]].lock("a softmax runs over it")
    return x
