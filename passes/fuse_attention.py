"""Fuses attention into one operator that reads and gives rows with all heads side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import fx

from lobo_fx.context import Context
from lobo_fx.operators import arguments, aten, is_call
from lobo_fx.own_operators import ATTENTION
from lobo_fx.passbase import Pass, Promise
from lobo_fx.program import Program
from lobo_fx.rewriting import Match, Op, Rejected, rewrite

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints})
_COPIES = frozenset({aten.contiguous.default, aten.clone.default})


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Heads are no longer moved before the sequence and back: ONNX Runtime's fused kernel splits them itself.

    Before: `scaled_dot_product_attention(split(q), split(k), split(v), bias)`, where split is
    `view(x, [batch, length, heads, head_dim]).transpose(1, 2)`; after: `attention(q, k, v, bias, heads)`, exported as
    `com.microsoft.MultiHeadAttention`. Cases: (1) q, k and v split one by one; (2) split from one tensor by
    `view(x, [batch, length, 3, heads, head_dim]).permute(2, 0, 3, 1, 4)`.

    A boolean or causal mask is added as zeros and the lowest float, and rows that it hides from every key are zero.
    Left alone, with the reason in the report: heads that were changed after the split (rotary embeddings, norms of q
    and k), grouped queries, boolean masks that differ by head, dropout.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        return self.fuse(program, context, lambda attention: None)

    def fuse(self, program: Program, context: Context, refuse: Callable[[fx.Node], str | None]) -> Program:
        """Fuses what can be, but where `refuse` gives a reason not to."""
        masks: dict[fx.Node, _Bias] = {}

        def rule(match: Match) -> fx.Node | Rejected:
            reason = refuse(match.root)
            return _fused(program, match.root, masks) if reason is None else Rejected(match.root, reason)

        for rejected in rewrite(program, Op(aten.scaled_dot_product_attention.default), rule):
            context.note(str(rejected))
        rewrite(program, Op(_VIEWS, name="merged"), lambda match: _merged(match.root))
        return program


@dataclasses.dataclass(frozen=True)
class _Bias:
    """A mask as it is added to scores: `[batch or 1, heads or 1, queries, keys]`.

    Attributes:
        added: the node; None where nothing is masked.
        empty: `[batch or 1, queries, 1]`, which rows see no key; None where all do.
    """

    added: fx.Node | None
    empty: fx.Node | None = None


def _fused(program: Program, node: fx.Node, masks: dict[fx.Node, _Bias]) -> fx.Node | Rejected:
    given = arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if given["dropout_p"]:
        return Rejected(node, "it drops out")
    if query.meta["val"].dim() != 4 or query.meta["val"].dtype != torch.float32:
        return Rejected(node, "it is not over float32 [batch, heads, length, head_dim]")
    heads = query.meta["val"].shape[1]
    if any(source.meta["val"].shape[1] != heads for source in (key, value)) or not isinstance(heads, int):
        return Rejected(node, "keys have other heads than queries")
    splits = [_before_split(source) for source in (query, key, value)]
    if None in splits:
        return Rejected(node, "its heads are changed after the split")
    bias = _bias(program.graph, node, masks)
    if bias is None:
        return Rejected(node, "its mask differs by head or has free sizes")
    rows = [_side_by_side(program, split) for split in splits if split is not None]
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(query.meta["val"].shape[-1])
    graph = program.graph
    result = _call(graph, ATTENTION, *rows, bias.added, heads, float(scale))
    if bias.empty is not None:
        result = _call(graph, aten.masked_fill.Scalar, result, bias.empty, 0)
    split = _call(graph, aten.unflatten.int, result, 2, [heads, value.meta["val"].shape[-1]])
    return _call(graph, aten.transpose.int, split, 1, 2)


def _call(graph: fx.Graph, target: Any, *args: Any, **settings: Any) -> fx.Node:
    """A call whose shape is known, for the patterns that come after."""
    node = graph.call_function(target, args, settings)
    node.meta["val"] = target(*fx.map_arg(args, lambda source: source.meta["val"]), **settings)
    return node


def _bias(graph: fx.Graph, attention: fx.Node, known: dict[fx.Node, _Bias]) -> _Bias | None:
    """What a mask adds to scores; None where that can't be said. A mask that many layers read is made once."""
    given = arguments(attention)
    query, mask, is_causal = given["query"], given["attn_mask"], given["is_causal"]
    queries, keys = query.meta["val"].shape[2], given["key"].meta["val"].shape[2]
    fixed = isinstance(queries, int) and isinstance(keys, int)
    if mask is None:
        if not is_causal:
            return _Bias(None)
        if not fixed:
            return None
        ones = _call(graph, aten.new_ones.default, query, [queries, keys], dtype=torch.bool)
        return _Bias(_shaped(graph, _added(graph, _call(graph, aten.tril.default, ones)), queries, keys))
    if mask in known:
        return known[mask]
    shape, empty, added = mask.meta["val"].shape, None, mask
    if [*map(str, shape[-2:])] != [str(queries), str(keys)] and not fixed:
        return None
    if mask.meta["val"].dtype == torch.bool:
        if len(shape) > 2 and shape[-3] != 1:
            return None
        some = _call(graph, aten.any.dim, mask, -1, True)
        if len(shape) > 3:
            some = _call(graph, aten.squeeze.dim, some, 1)
        added, empty = _added(graph, mask), _call(graph, aten.logical_not.default, some)
    known[mask] = _Bias(_shaped(graph, added, queries, keys), empty)
    return known[mask]


def _added(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """Zero where a mask is true, and the lowest float elsewhere; infinity would give NaN where all is hidden."""
    return _call(graph, aten.where.Scalar, mask, 0.0, torch.finfo(torch.float32).min)


def _shaped(graph: fx.Graph, bias: fx.Node, queries: Any, keys: Any) -> fx.Node:
    """A bias in four dimensions, the last two as large as the scores'."""
    while bias.meta["val"].dim() < 4:
        bias = _call(graph, aten.unsqueeze.default, bias, 0)
    if [*map(str, bias.meta["val"].shape[2:])] != [str(queries), str(keys)]:
        bias = _call(graph, aten.expand.default, bias, [-1, -1, queries, keys])
    return bias


def _before_split(value: Any) -> tuple[fx.Node, int | None] | None:
    """What `[batch, length, heads, head_dim]` (or the i-th of several such in dimension 2) is moved from; else None."""
    value = _source(value, _COPIES)
    if _moves(value, [0, 2, 1, 3]):
        return value.args[0], None
    index = None
    if is_call(value, aten.select.int) and value.args[1] == 0:
        index, stacked = value.args[2], value.args[0]
    elif value.op == "call_function" and isinstance(value.args[-1], int) and is_call(value.args[0], aten.unbind.int):
        index, stacked = value.args[1], value.args[0].args[0]
        if arguments(value.args[0])["dim"] != 0:
            return None
    if index is not None and _moves(stacked, [2, 0, 3, 1, 4]):
        return stacked.args[0], index
    return None


def _side_by_side(program: Program, split: tuple[Any, int | None]) -> Any:
    """The rows that were split into heads."""
    value, index = split
    graph = program.graph
    if index is not None:
        selected = graph.call_function(aten.select.int, (value, 2, index))
        selected.meta["val"] = value.meta["val"].select(2, index)
        value = selected
    elif is_call(value, *_VIEWS) and _merges(value.args[0], value):
        return value.args[0]
    rows = graph.call_function(aten.flatten.using_ints, (value, 2))
    rows.meta["val"] = value.meta["val"].flatten(2)
    return rows


def _merged(view: fx.Node) -> fx.Node | Rejected:
    """The output of a fused attention where heads are moved back beside each other."""
    moved = _source(view.args[0], _COPIES)
    split = _source(moved.args[0], _COPIES | _VIEWS, same_shape=True) if _moves(moved, [0, 2, 1, 3]) else None
    if split is not None and _moves(split, [0, 2, 1, 3]):
        rows: fx.Node = _source(split.args[0], {aten.unflatten.int})
        if is_call(rows, ATTENTION) and _merges(view, moved):
            return rows
    return Rejected(view, "")


def _source(node: Any, targets: Collection[object], same_shape: bool = False) -> Any:
    """What a node is, seen through operators that change nothing of it."""
    while is_call(node, *targets):
        source = node.args[0]
        if same_shape and str(source.meta["val"].shape) != str(node.meta["val"].shape):
            break
        node = source
    return node


def _moves(node: Any, order: list[int]) -> bool:
    """Whether a node permutes its dimensions in this way."""
    if is_call(node, aten.transpose.int):
        dims = list(range(node.meta["val"].dim()))
        first, second = node.args[1:]
        dims[first], dims[second] = dims[second], dims[first]
        return dims == order
    return is_call(node, aten.permute.default) and [d % len(order) for d in node.args[1]] == order


def _merges(rows: Any, split: Any) -> bool:
    """Whether `[batch, length, heads × head_dim]` has the values of `[batch, length, heads, head_dim]` in order."""
    shape, wide = rows.meta["val"].shape, split.meta["val"].shape
    alike = len(shape) == 3 and len(wide) == 4 and [*map(str, shape[:2])] == [*map(str, wide[:2])]
    return alike and bool(shape[2] == wide[2] * wide[3])
