"""Values written to positions that an index names."""

from __future__ import annotations

from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all, sizes_of
from lobo_fx.axes.zeros import NOWHERE, all_of
from lobo_fx.graph.operators import aten

__all__ = ["embedding_bag", "into_rows", "one_hot", "scatter", "unpool"]


@axis_rule(aten.index_add.default, aten.index_copy.default, aten.index_reduce.default, zeros=all_of("self", "source"))
def into_rows(call: Call) -> Axes:
    """One dimension is indexed; the others are the same in both tensors."""
    x, source = call.axes("self"), call.axes("source")
    dim = call.integer("dim") % len(x)
    lock_all([x[dim], source[dim], *call.axes("index")], "its positions are indexed")
    return tuple(axis if at == dim else call.unify(axis, source[at]) for at, axis in enumerate(x))


@axis_rule(
    *(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two),
    *(aten.scatter.reduce, aten.scatter.value_reduce),
    zeros=all_of("self", "src", "value"),
)
def scatter(call: Call) -> Axes:
    """One dimension is indexed; the others are unified with the index's and the source's, where sizes are equal."""
    x, dim = call.axes("self"), call.integer("dim") % len(call.axes("self"))
    tensors = [call.axes(name) for name in ("index", "src") if call.has(name)]
    lock_all([x[dim], *(axes[dim] for axes in tensors)], "its positions are indexed")
    for at, axis in enumerate(x):
        for own in (axes[at] for axes in tensors if at != dim):
            if axis.find().size == own.find().size:
                call.unify(axis, own)
            else:
                lock_all([axis, own], "a part of it is written to")
    return x


@axis_rule(aten.max_unpool2d.default, aten.max_unpool3d.default, zeros="self")
def unpool(call: Call) -> Axes:
    """Rows and channels stay; space is written to by position."""
    x, indices = call.axes("self"), call.axes("indices")
    rank = 2 if call.node.target is aten.max_unpool2d.default else 3
    reason = "it is unpooled"
    lock_all([*x[-rank:], *indices[-rank:]], reason)
    kept = [call.unify(axis, own) for axis, own in zip(x[:-rank], indices[:-rank], strict=True)]
    return (*kept, *(call.fixed(size, reason) for size in call.sizes()[-rank:]))


@axis_rule(aten.one_hot.default, zeros=NOWHERE)
def one_hot(call: Call) -> Axes:
    """A new last dimension runs over the classes."""
    return (*call.axes("self"), call.fixed(call.sizes()[-1], "it counts classes"))


@axis_rule(aten.embedding_bag.padding_idx, aten.embedding_bag.default, zeros="weight")
def embedding_bag(call: Call) -> list[Axes]:
    """w[v d], indices → [b d], and tensors of counts."""
    rows, width = call.axes("weight")
    rows.lock("it is indexed by the rows of an embedding")
    for name in ("indices", "offsets", "per_sample_weights"):
        if call.has(name):
            lock_all(call.axes(name), "it names rows of an embedding")
    sizes = [sizes_of(value) for value in call.node.meta["val"]]
    counted = [tuple(call.fixed(size, "it counts rows of an embedding") for size in own) for own in sizes]
    return [(counted[0][0], width), *counted[1:]]
