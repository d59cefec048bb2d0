"""The table of layers: every operator that multiplies its input by a weight, and where its parts stand.

This is the only place that says which operators have weights. Tracing writes other spellings of the same product
(`addmm`, `x @ w`, `einsum`, …) as one of them (`lobo_fx.capture.disguised_layers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import RECURRENT, arguments, aten, is_call
from lobo_fx.graph.randomness import may_draw

__all__ = [
    "LAYERS",
    "LOOKUPS",
    "Layer",
    "LayerKind",
    "WeightUse",
    "is_constant",
    "layer_of",
    "layers",
    "weight_uses",
]


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Where the parts of one layer operator stand.

    Attributes:
        word: what users call it.
        input: name of the argument that is multiplied.
        weight: name of the argument that it is multiplied with.
        bias: name of the argument that is added; empty where there is none.
        output_dim: the weight's dimension of outputs.
        input_dim: the weight's dimension of inputs (of one group).
        group_dim: the weight's dimension of groups; None where groups share `output_dim` or there are none.
        places: how many dimensions a convolution's window slides over, after the channels; 0 of other layers.
        mirrored: whether every input spreads over a window of outputs (a transposed convolution).
    """

    word: str
    input: str
    weight: str
    bias: str
    output_dim: int
    input_dim: int
    group_dim: int | None
    places: int = 0
    mirrored: bool = False

    @property
    def convolves(self) -> bool:
        """Whether the weight slides over places."""
        return self.places > 0

    @property
    def channel_dim(self) -> int:
        """The dimension of channels in input and output: 1 of images, -1 of rows."""
        return 1 if self.convolves else -1


def _convolution(places: int) -> LayerKind:
    return LayerKind("convolution", "input", "weight", "bias", 0, 1, None, places)  # w[o i/g …]


def _transposed(places: int) -> LayerKind:
    return LayerKind(
        "transposed convolution", "input", "weight", "bias", 1, 0, None, places, mirrored=True
    )  # w[i o/g …]


_LINEAR = LayerKind("linear layer", "input", "weight", "bias", 0, 1, None)  # w[o i]
_BATCHED = LayerKind("product with a matrix per group", "self", "mat2", "", 2, 1, 0)  # x[g n i] · w[g i o]: experts

LAYERS: dict[object, LayerKind] = {
    aten.conv1d.default: _convolution(1),
    aten.conv1d.padding: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv2d.padding: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv3d.padding: _convolution(3),
    aten.conv_transpose1d.default: _transposed(1),
    aten.conv_transpose2d.input: _transposed(2),
    aten.conv_transpose3d.input: _transposed(3),
    aten.linear.default: _LINEAR,
    aten.bmm.default: _BATCHED,
}
"""By operator; a call is a layer only where its weight depends on no input."""

LOOKUPS = frozenset({aten.embedding.default, aten.embedding_bag.padding_idx})
"""Operators that take rows of a weight by number; nothing is multiplied."""

_SWAPS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of a layer operator.

    Attributes:
        node: the call.
        kind: its row in the table.
        input: what is multiplied.
        weight: what it is multiplied with, as the call reads it.
        bias: what is added; None for nothing.
        groups: into how many parts channels are divided, each multiplied with a part of the weight.
        read: the `get_attr` of the stored weight, seen through its mask and through swapped dimensions; None where
            the weight is computed.
        swapped: whether the stored weight has its two dimensions the other way round, as inputs × outputs.
    """

    node: fx.Node
    kind: LayerKind
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    groups: int
    read: fx.Node | None
    swapped: bool

    @property
    def output_dim(self) -> int:
        """The stored weight's dimension of outputs."""
        return self.kind.input_dim if self.swapped else self.kind.output_dim

    @property
    def input_dim(self) -> int:
        """The stored weight's dimension of inputs."""
        return self.kind.output_dim if self.swapped else self.kind.input_dim

    @property
    def bias_read(self) -> fx.Node | None:
        """The `get_attr` of the bias; None where there is no bias, or one that is computed."""
        return weight_node(self.bias)

    @property
    def is_batched(self) -> bool:
        """Whether the input has rows: a convolution's batch, a linear layer's dimensions before the last."""
        dims = int(self.node.meta["val"].dim())
        return dims == self.kind.places + 2 if self.kind.convolves else dims > 1


def layer_of(node: object) -> Layer | None:
    """A call as a layer; None for any other operator, and for a product of two values that depend on inputs."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in LAYERS:
        return None
    kind, given = LAYERS[node.target], arguments(node)
    weight = given[kind.weight]
    read, swapped = _stored(weight)
    if kind is _BATCHED and read is None and not is_constant(weight):
        return None
    groups = given.get("groups", 1) if kind.group_dim is None else node.meta["val"].shape[0]
    return Layer(node, kind, given[kind.input], weight, given.get(kind.bias), groups, read, swapped)


def layers(graph: fx.Graph) -> Iterator[Layer]:
    """All layers of a graph, in order."""
    for node in graph.nodes:
        if (layer := layer_of(node)) is not None:
            yield layer


def _stored(weight: object) -> tuple[fx.Node | None, bool]:
    """The read of a stored weight, and whether its two dimensions are swapped on the way."""
    swapped = False
    while isinstance(weight, fx.Node) and weight_node(weight) is None and is_call(weight, *_SWAPS):
        if weight.meta["val"].dim() != 2:
            return None, False
        swapped ^= not is_call(weight, aten.permute.default) or [d % 2 for d in arguments(weight)["dims"]] == [1, 0]
        weight = weight.args[0]
    return weight_node(weight), swapped


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """A stored weight as one call multiplies with it.

    Attributes:
        node: the call.
        read: the `get_attr` of the weight.
        output_dim: the weight's dimension of outputs.
        input_dim: the weight's dimension of inputs.
    """

    node: fx.Node
    read: fx.Node
    output_dim: int
    input_dim: int


def weight_uses(node: fx.Node) -> list[WeightUse]:
    """The stored weights that a call multiplies with: one of a layer, two per direction of a recurrent layer."""
    if is_call(node, *RECURRENT):
        reads = [weight_node(value) for value in arguments(node)["params"]]
        return [WeightUse(node, read, 0, 1) for read in reads if read is not None and read.meta["val"].dim() == 2]
    layer = layer_of(node)
    if layer is None or layer.read is None:
        return []
    return [WeightUse(node, layer.read, layer.output_dim, layer.input_dim)]


def is_constant(node: object) -> bool:
    """Whether a value depends on stored tensors alone: on no input, and on nothing random."""
    seen: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        source = ahead.pop()
        if not isinstance(source, fx.Node) or source.op in ("placeholder", "call_module", "output"):
            return False
        if source in seen:
            continue
        seen.add(source)
        if source.op == "call_function" and not source.all_input_nodes:
            return False
        if may_draw(source):
            return False
        ahead += source.all_input_nodes
    return True
