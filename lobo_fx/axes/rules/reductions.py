"""Reductions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.call import Call, axis_rule
from lobo_fx.axes.zeros import MOVED, NOWHERE
from lobo_fx.graph.operators import aten

__all__ = ["reduction"]


def _reads_positions(node: fx.Node) -> bool:
    """Whether the indices that `max(dim)` returns as its second result are used."""
    return any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users)


_SUMS = {aten.sum.dim_IntList, aten.sum.default, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim}


@axis_rule(aten.logsumexp.default, zeros=NOWHERE)
@axis_rule(
    *(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default, aten.amax.default),
    *(aten.amin.default, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction),
    *(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim),
    *(aten.max.dim, aten.min.dim, aten.var_mean.correction, aten.prod.dim_int, aten.any.dim, aten.all.dim),
    *(aten.argmax.default, aten.argmin.default, aten.max.default, aten.min.default),
    zeros=MOVED,
)
def reduction(call: Call) -> Any:
    """Reduced dimensions vanish. A sum of zeros is zero; any other reduction is a statistic over the axis."""
    x = call.axes("self")
    dims = call.given.get("dim")
    chosen = (
        set(range(len(x))) if dims in (None, []) else {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    )
    for dim in chosen:
        positions = call.node.target in (aten.argmax.default, aten.argmin.default)
        if positions or (call.node.target in (aten.max.dim, aten.min.dim) and _reads_positions(call.node)):
            x[dim].lock(f"{call.node.target} gives positions along it")
        elif call.node.target in _SUMS:
            call.sums(x[dim], call.given["self"])
        else:
            x[dim].mark_inexact(f"{call.node.target} runs over it")
    keep = call.given.get("keepdim", False)
    axes = tuple(axis if d not in chosen else call.fresh(1) for d, axis in enumerate(x) if d not in chosen or keep)
    value = call.node.meta["val"]
    return axes if isinstance(value, torch.Tensor) else [axes for _ in value]
