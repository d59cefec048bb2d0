"""Distances and similarities: sums over an axis that two tensors share."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule
from lobo_fx.axes.zeros import MOVED, NOWHERE, all_of, any_of
from lobo_fx.graph.operators import aten

__all__ = ["bilinear", "cdist", "cosine_similarity", "pairwise_distance"]


@axis_rule(aten.cosine_similarity.default, zeros=NOWHERE)
def cosine_similarity(call: Call) -> Axes:
    """x1[… c …], x2[… c …] → [… …]: three sums over c, each zero for channels that are zero in both."""
    both = call.broadcast([call.axes("x1"), call.axes("x2")])
    dim = call.integer("dim") % len(both)
    for name in ("x1", "x2"):
        call.sums(both[dim], call.given[name])
    return tuple(axis for at, axis in enumerate(both) if at != dim)


@axis_rule(aten.pairwise_distance.default, zeros=NOWHERE)
def pairwise_distance(call: Call) -> Axes:
    """x1[… c], x2[… c] → […]; eps is added to every difference, so a zeroed channel still adds a little."""
    *rest, channels = call.broadcast([call.axes("x1"), call.axes("x2")])
    channels.mark_inexact("pairwise_distance adds a small number along it")
    return (*rest, call.fresh(1)) if call.given["keepdim"] else tuple(rest)


@axis_rule(aten.cdist.default, zeros=NOWHERE)
def cdist(call: Call) -> Axes:
    """x1[… p c], x2[… r c] → [… p r]."""
    *first, p, channels = call.axes("x1")
    *second, r, own = call.axes("x2")
    channels = call.unify(channels, own)
    for name in ("x1", "x2"):
        call.sums(channels, call.given[name])
    return (*(call.broadcast([tuple(first), tuple(second)]) if first or second else ()), p, r)


@axis_rule(aten.bilinear.default, zeros=all_of(any_of("weight", MOVED), "bias"))
def bilinear(call: Call) -> Axes:
    """x1[… i], x2[… j], w[o i j], b[o] → [… o]."""
    *first, i = call.axes("input1")
    *second, j = call.axes("input2")
    outputs, left, right = call.axes("weight")
    call.sums(call.unify(i, left), call.given["input1"], call.given["weight"])
    call.sums(call.unify(j, right), call.given["input2"], call.given["weight"])
    if call.has("bias"):
        outputs = call.unify(outputs, call.axes("bias")[0])
    rows = call.broadcast([tuple(first), tuple(second)]) if first else ()
    call.multiplies(*rows, outputs, i, j)
    return (*rows, outputs)
