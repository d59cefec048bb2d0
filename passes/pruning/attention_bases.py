"""Finds the best coordinates for attention heads that lose dimensions, instead of the dimensions left over.

Attention reads queries and keys only through their products, and values only through the layer after it. So a head that
keeps `r` of its dimensions may use any `r` coordinates that linear layers can give: the best are those in which the
products stay nearest to the original's. Only self-attention on linear layers is handled: with rotary positions or norms
on queries and keys, the coordinates are not free.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import VALUE_PRESERVING, arguments, aten, is_call
from lobo_fx.graph.program import Program

__all__ = ["Bases", "Basis", "Values"]

Values = Mapping[fx.Node, Any]
_ATTENTION = aten.scaled_dot_product_attention.default
_MOVES = (VALUE_PRESERVING - {aten.max_pool2d.default}) | {operator.getitem}
_MOVES |= {aten.unflatten.int, aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
_SIZES = frozenset({aten.sym_size.int})
_TINY = 1e-9
"""Least variance of a direction of its own, as a share of the energy: well above the square of what float32 rounds."""


@dataclasses.dataclass(frozen=True)
class Basis:
    """New coordinates for some outputs of a linear layer.

    Attributes:
        layer: the linear layer.
        channels: (heads, dimensions) indices of the original's outputs.
        kept: (heads, dimensions) indices of those that stay.
        matrix: (heads that stay, dimensions, dimensions that stay).
        origin: (heads that stay, dimensions) the outputs whose new coordinates are all zero.
    """

    layer: fx.Node
    channels: torch.Tensor
    kept: torch.Tensor
    matrix: torch.Tensor
    origin: torch.Tensor

    def apply(self, output: torch.Tensor, target: torch.Tensor, stay: torch.Tensor) -> None:
        """Writes the outputs in new coordinates into `target` (outputs that stay), from the original's `output`."""
        moved = output[..., self.channels].double() - self.origin
        mixed = torch.einsum("...hd,hdr->...hr", moved, self.matrix).to(output.dtype)
        target[..., (stay.cumsum(0) - 1)[self.kept]] = mixed


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The heads that a linear layer's outputs make up; only those that stay.

    Attributes:
        layer: the linear layer.
        value: the query, key or value, (rows, heads, tokens, dimensions).
        index: (heads,) which heads stay.
        channels: (heads, dimensions) indices of the original's outputs.
        stay: (dimensions,) which dimensions stay, the same in every head.
    """

    layer: fx.Node
    value: fx.Node
    index: torch.Tensor
    channels: torch.Tensor
    stay: torch.Tensor

    @property
    def width(self) -> int:
        """How many dimensions stay."""
        return int(self.stay.sum())

    def basis(self, matrix: torch.Tensor, origin: torch.Tensor) -> Basis:
        return Basis(self.layer, self.channels, self.channels[:, self.stay], matrix, origin)


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Moments of the values of heads.

    Attributes:
        second: (heads, dimensions, dimensions) sums of products, about the means over some dimensions.
        mean: (heads, dimensions) means over all rows and tokens.
        energy: (heads,) sums of squares, about zero.
    """

    second: torch.Tensor
    mean: torch.Tensor
    energy: torch.Tensor

    def roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The symmetric square root of the second moments, and its inverse."""
        values, vectors = torch.linalg.eigh(self.second)
        # What varies less than rounding does has no direction of its own; the inverse would blow it up.
        root = values.maximum((_TINY * self.energy).clamp_min(1e-30).unsqueeze(1)).sqrt()
        return vectors * root.unsqueeze(1) @ vectors.mT, vectors / root.unsqueeze(1) @ vectors.mT


class Bases:
    """Finds bases for the linear layers that attention reads; each attention once, as queries and keys must agree.

    Source: queries and keys: the truncated singular value decomposition of Cq^½·Ck^½ (Eckart and Young, 1936),
        with C the second moments; values: that of Cv^½·Wᵀ, with W the layer that reads the heads.
    """

    def __init__(self, original: Program, kept: Mapping[str, torch.Tensor]) -> None:
        self.original = original
        self.kept = kept
        self.interpreter = fx.Interpreter(original.module)
        self._attentions = {
            layer: attention
            for attention in original.graph.find_nodes(op="call_function", target=_ATTENTION)
            for layer in _self_attention_layers(attention)
        }
        self._found: dict[fx.Node, list[Basis]] = {}

    def of(self, layer: fx.Node, batches: Iterable[Values]) -> list[Basis]:
        """Bases for the outputs of a linear layer, from the original's values of each batch up to that layer.

        Batches are iterated several times.
        """
        attention = self._attentions.get(layer)
        if attention is None:
            return []
        if attention not in self._found:
            self._found[attention] = self._find_products(attention, batches) + self._find_values(attention, batches)
        return [basis for basis in self._found[attention] if basis.layer is layer]

    def _find_products(self, attention: fx.Node, batches: Iterable[Values]) -> list[Basis]:
        given = arguments(attention)
        query, key = (self._heads(given[name], next(iter(batches))) for name in ("query", "key"))
        if query is None or key is None or query.stay.all():
            return []
        if not torch.equal(query.stay, key.stay) or not torch.equal(query.index, key.index):
            return []
        queries = self._moments(query, batches)
        keys = self._moments(key, batches, about=(2,))  # softmax ignores what all keys share
        (query_root, query_back), (key_root, key_back) = queries.roots(), keys.roots()
        left, scale, right = torch.linalg.svd(query_root @ key_root)
        width = query.width
        root = scale[:, None, :width].sqrt()
        return [
            query.basis(query_back @ left[..., :width] * root, torch.zeros_like(queries.mean)),
            key.basis(key_back @ right.mT[..., :width] * root, keys.mean),
        ]

    def _find_values(self, attention: fx.Node, batches: Iterable[Values]) -> list[Basis]:
        heads = self._heads(arguments(attention)["value"], next(iter(batches)))
        if heads is None or heads.stay.all():
            return []
        reader = self._reader(attention, heads, next(iter(batches)))
        if reader is None:
            return []
        moments = self._moments(heads, batches, about=(0, 2))  # the mean becomes the reader's bias
        root, back = moments.roots()
        left = torch.linalg.svd(root @ reader)[0]
        size = moments.second.diagonal(dim1=1, dim2=2).mean().sqrt()
        return [heads.basis(back @ left[..., : heads.width] * size, moments.mean)]

    def _heads(self, node: fx.Node, values: Values) -> _Heads | None:
        """The linear layer and the heads behind a query, key or value (batch, heads, tokens, dimensions)."""
        layer = _layer(node)
        if layer is None or layer.name not in self.kept:
            return None
        output = self._ahead(layer, dict(values))
        places = torch.arange(output.numel()).view(output.shape)
        moved = self._ahead(node, {**values, layer: places})
        if moved.dim() != 4:
            return None
        channels = moved[0, :, 0] % output.shape[-1]
        kept = self.kept[layer.name][channels]
        heads, stay = kept.any(1), kept.any(0)
        if not torch.equal(kept, heads[:, None] & stay):
            return None
        return _Heads(layer, node, heads.nonzero().flatten(), channels[heads], stay)

    def _reader(self, attention: fx.Node, heads: _Heads, values: Values) -> torch.Tensor | None:
        """(heads, dimensions, outputs) the weights of the linear layer that reads the heads."""
        last, users = attention, list(attention.users)
        while len(users) == 1 and is_call(users[0], *_MOVES):
            last, users = users[0], list(users[0].users)
        weight = weight_node(arguments(users[0])["weight"]) if is_call(users[0], aten.linear.default) else None
        if len(users) != 1 or weight is None:
            return None
        known = dict(values)
        output = self._ahead(attention, known)
        places = torch.arange(output.numel()).view(output.shape)
        moved = self._ahead(last, {**known, attention: places})
        columns = moved.flatten(0, -2)[0]
        _, head, token, dimension = torch.unravel_index(columns, output.shape)
        if token.any():
            return None
        matrix = self.original.parameter(weight).double()
        found = torch.zeros(*output.shape[1::2], len(matrix), dtype=matrix.dtype)
        found[head, dimension] = matrix.T
        return found[heads.index]

    def _moments(self, heads: _Heads, batches: Iterable[Values], about: tuple[int, ...] = ()) -> _Moments:
        """Moments of a query, key or value; the second ones about the mean over rows (0) or tokens (2)."""
        second = total = energy = torch.zeros(())
        count = 0
        for values in batches:
            # (rows, heads, tokens, dimensions)
            output = self._ahead(heads.value, dict(values))[:, heads.index].double()
            rows = (output - output.mean(about, keepdim=True) if about else output).movedim(1, 0).flatten(1, 2)
            second, total = second + rows.mT @ rows, total + output.sum((0, 2))
            energy, count = energy + output.square().sum((0, 2, 3)), count + rows.shape[1]
        return _Moments(second, total / count, energy)

    def _ahead(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Evaluates a node of the original that was not run yet, and keeps the results in `values`."""
        if node not in values:
            for source in node.all_input_nodes:
                self._ahead(source, values)
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
            values[node] = getattr(self.interpreter, node.op)(node.target, args, kwargs)
        return values[node]


def _layer(node: fx.Node) -> fx.Node | None:
    """The linear layer, with a weight of its own, whose outputs reach `node` by moves alone."""
    while is_call(node, *_MOVES):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    if not is_call(node, aten.linear.default):
        return None
    weight = weight_node(arguments(node)["weight"])
    return node if weight is not None and len(weight.users) == 1 else None


def _self_attention_layers(attention: fx.Node) -> list[fx.Node]:
    """The linear layers of queries, keys and values, if they share one input and only `attention` reads them."""
    given = arguments(attention)
    found = [_layer(given[name]) for name in ("query", "key", "value")]
    layers = list(dict.fromkeys(layer for layer in found if layer is not None))
    inputs = {arguments(layer)["input"] for layer in layers}
    if None in found or len(inputs) != 1 or given["enable_gqa"]:
        return []
    return layers if all(_read_only_by(layer, attention) for layer in layers) else []


def _read_only_by(layer: fx.Node, attention: fx.Node) -> bool:
    """Whether a layer's outputs go to `attention` and nowhere else."""
    readers = list(layer.users)
    while readers:
        reader = readers.pop()
        if is_call(reader, *_MOVES):
            readers += reader.users
        elif reader is not attention and not is_call(reader, *_SIZES):
            return False
    return True
