"""Positions looked up by other values."""

from __future__ import annotations

import torch

from lobo_fx.axes.axis import AxisError
from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all
from lobo_fx.graph.operators import aten

__all__ = ["embedding", "gather", "index", "index_select"]


@axis_rule(aten.embedding.default, zeros="weight")
def embedding(call: Call) -> Axes:
    """w[v d], i[…] → [… d]."""
    weight = call.axes("weight")
    weight[0].lock("it is indexed by the rows of an embedding")
    return (*call.axes("indices"), weight[1])


@axis_rule(aten.index.Tensor, zeros="self")
def index(call: Call) -> Axes:
    """Indexed dimensions are locked; the output has the index's dimensions in their place, or first if not adjacent."""
    x, indices = call.axes("self"), call.given["indices"]
    indices = [*indices, *[None] * (len(x) - len(indices))]
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        raise AxisError("indexing by a mask is not understood")
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        x[d].lock("its positions are indexed")
    shape = call.broadcast([call.of(indices[d]) for d in used])
    kept = [(d, axis) for d, axis in enumerate(x) if d not in used]
    adjacent = used == list(range(used[0], used[0] + len(used)))
    at = used[0] if adjacent else 0
    before = [axis for d, axis in kept if d < at] if adjacent else []
    after = [axis for d, axis in kept if not (adjacent and d < at)]
    return (*before, *shape, *after)


@axis_rule(aten.index_select.default, zeros="self")
def index_select(call: Call) -> Axes:
    """One dimension is indexed."""
    x = list(call.axes("self"))
    dim = call.given["dim"] % len(x)
    x[dim].lock("its positions are indexed")
    x[dim] = call.axes("index")[0]
    return tuple(x)


@axis_rule(aten.gather.default, zeros="self")
def gather(call: Call) -> Axes:
    """One dimension is indexed; the others are unified with the index's, where their sizes are equal."""
    x, at, dim = call.axes("self"), call.axes("index"), call.given["dim"] % len(call.axes("self"))
    x[dim].lock("its positions are indexed")
    for d, (axis, own) in enumerate(zip(x, at, strict=True)):
        if d != dim and axis.find().size == own.find().size:
            call.unify(axis, own)
        elif d != dim:
            lock_all([axis, own], "a part of it is gathered")
    return at
