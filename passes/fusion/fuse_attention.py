"""Fuses attention into one operator whose inputs and outputs hold all heads side by side in a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.operators import arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.rewriting import Match, Op, Rejected, call, rewrite
from lobo_fx.own_operators.attention import ATTENTION

__all__ = ["FuseAttention"]

_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints})
_COPIES = frozenset({aten.contiguous.default, aten.clone.default})


@dataclasses.dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuses attention with the split into heads and the merge: ONNX Runtime's fused kernel splits heads itself.

    Before: `scaled_dot_product_attention(split(q), split(k), split(v), bias)`, where split is
    `view(x, [batch, length, heads, head_dim]).transpose(1, 2)`; after: `attention(q, k, v, bias, heads)`, exported as
    `com.microsoft.MultiHeadAttention`. Cases: (1) q, k and v split one by one; (2) split from one tensor by
    `view(x, [batch, length, 3, heads, head_dim]).permute(2, 0, 3, 1, 4)`.

    A boolean mask is added as zeros and the lowest float, and rows that see no key are zero. Left alone, with the
    reason in the report: heads that were changed after the split (rotary embeddings, norms of q and k), grouped
    queries, boolean masks that differ by head, causal masks over more or fewer keys than queries, dropout.

    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        return self.fuse(program, context, lambda attention: None)

    def fuse(self, program: Program, context: Context, refuse: Callable[[fx.Node], str | None]) -> Program:
        """Fuses every attention that can be fused, unless `refuse` gives a reason not to."""
        masks: dict[fx.Node | None, _Mask] = {}

        def rule(match: Match) -> fx.Node | Rejected:
            reason = refuse(match.root)
            return _fused(program, match.root, masks) if reason is None else Rejected(match.root, reason)

        for rejected in rewrite(program, Op(aten.scaled_dot_product_attention.default), rule):
            context.note(f"left alone: {rejected.reason}", rejected.node)
        rewrite(program, Op(_VIEWS, name="merged"), lambda match: _merged(match.root))
        return program


@dataclasses.dataclass(frozen=True)
class _Mask:
    """A mask that may be read by many layers.

    Attributes:
        added: the tensor that is added to the scores; None if there is no mask.
        empty: `[batch or 1, queries or 1, 1]`, true for rows that see no key; None if the mask is not boolean.
    """

    added: fx.Node | None
    empty: fx.Node | None = None


def _fused(program: Program, node: fx.Node, masks: dict[fx.Node | None, _Mask]) -> fx.Node | Rejected:
    given, graph = arguments(node), program.graph
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    shapes = [source.meta["val"].shape for source in (query, key, value)]
    if given["dropout_p"]:
        return Rejected(node, "it drops out")
    if any(len(shape) != 4 for shape in shapes) or query.meta["val"].dtype != torch.float32:
        return Rejected(node, "it is not over float32 [batch, heads, length, head_dim]")
    if len({(str(shape[0]), shape[1]) for shape in shapes}) > 1 or not isinstance(shapes[0][1], int):
        return Rejected(node, "keys have other heads, or another batch, than queries")
    heads, scores = shapes[0][1], (shapes[0][2], shapes[1][2])
    if given["is_causal"] and str(scores[0]) != str(scores[1]):
        return Rejected(node, "it masks causally, with more or fewer keys than queries")
    if mask is not None:
        sizes = mask.meta["val"].shape
        if mask.meta["val"].dtype == torch.bool and len(sizes) > 2 and sizes[-3] != 1:
            return Rejected(node, "its boolean mask differs by head")
    splits = [_before_split(source) for source in (query, key, value)]
    if None in splits:
        return Rejected(node, "its heads are changed after the split")
    rows = [_side_by_side(program, split) for split in splits if split is not None]
    scale = given["scale"] if given["scale"] is not None else 1 / math.sqrt(shapes[0][-1])
    if mask not in masks:
        masks[mask] = _read(graph, mask)
    added, empty = masks[mask].added, masks[mask].empty
    bias = None if added is None else _stretched(graph, added, query, key)
    result = call(graph, ATTENTION, *rows, bias, heads, float(scale), bool(given["is_causal"]))
    if empty is not None:
        result = call(graph, aten.masked_fill.Scalar, result, empty, 0)
    split = call(graph, aten.unflatten.int, result, 2, [heads, shapes[2][-1]])
    return call(graph, aten.transpose.int, split, 1, 2)


def _read(graph: fx.Graph, mask: fx.Node | None) -> _Mask:
    """A mask as a term of the scores: hidden keys get the lowest float; -inf would give NaN where all are hidden."""
    if mask is None or mask.meta["val"].dtype != torch.bool:
        return _Mask(mask)
    some = call(graph, aten.any.dim, mask, -1, True)
    if some.meta["val"].dim() > 3:
        some = call(graph, aten.squeeze.dim, some, 1)
    lowest = torch.finfo(torch.float32).min
    return _Mask(call(graph, aten.where.Scalar, mask, 0.0, lowest), call(graph, aten.logical_not.default, some))


def _stretched(graph: fx.Graph, bias: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
    """A bias in four dimensions, the last two as large as the scores'."""
    while bias.meta["val"].dim() < 4:
        bias = call(graph, aten.unsqueeze.default, bias, 0)
    scores = [source.meta["val"].shape[2] for source in (query, key)]
    if [*map(str, bias.meta["val"].shape[2:])] != [*map(str, scores)]:
        bias = call(graph, aten.expand.default, bias, [-1, -1, _length(graph, query), _length(graph, key)])
    return bias


def _length(graph: fx.Graph, value: fx.Node) -> int | fx.Node:
    """The size of dimension 2, computed where it is free."""
    size = value.meta["val"].shape[2]
    return size if isinstance(size, int) else call(graph, aten.sym_size.int, value, 2)


def _before_split(value: Any) -> tuple[fx.Node, int | None] | None:
    """The `[batch, length, heads, head_dim]` before heads moved, or several stacked in dimension 2, and an index."""
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
    """The node behind `targets`, operators that do not change its values."""
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
