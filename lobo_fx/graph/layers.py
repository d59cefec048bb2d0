"""The table of layers: every operator that multiplies its input by a weight, and where its arguments are.

This is the only place that lists operators with weights. Tracing rewrites other forms of the same product
(`addmm`, `x @ w`, `einsum`, …) to one of these (`lobo_fx.capture.disguised_layers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import RECURRENT, arguments, aten, is_call, is_inplace, is_view
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
    """Arguments and dimensions of one layer operator.

    Attributes:
        word: its name in messages.
        input: name of the argument that is multiplied.
        weight: name of the argument that the input is multiplied by.
        bias: name of the argument that is added; empty where there is none.
        output_dim: the weight's dimension of outputs.
        input_dim: the weight's dimension of inputs (of one group).
        group_dim: the weight's dimension of groups; None where groups share `output_dim` or there are none.
        spatial_dims: number of spatial dimensions, which a convolution's window slides over; 0 for other layers.
        transposed: whether each input spreads over a window of outputs (a transposed convolution).
    """

    word: str
    input: str
    weight: str
    bias: str
    output_dim: int
    input_dim: int
    group_dim: int | None
    spatial_dims: int = 0
    transposed: bool = False

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution, whose weight slides over spatial dimensions."""
        return self.spatial_dims > 0

    @property
    def channel_dim(self) -> int:
        """The channel dimension of input and output: 1 for convolutions, -1 for other layers."""
        return 1 if self.convolves else -1


def _convolution(spatial_dims: int) -> LayerKind:
    return LayerKind("convolution", "input", "weight", "bias", 0, 1, None, spatial_dims)  # w[o i/g …]


def _transposed(spatial_dims: int) -> LayerKind:
    return LayerKind(
        "transposed convolution", "input", "weight", "bias", 1, 0, None, spatial_dims, transposed=True
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
"""Operators that look up rows of a weight by index; nothing is multiplied."""

_SWAPS = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One call of a layer operator.

    Attributes:
        node: the call.
        kind: its row in the table.
        input: the node that is multiplied.
        weight: the node that it is multiplied by, as the call reads it.
        bias: the node that is added; None without a bias.
        groups: number of groups that channels are divided into, each multiplied by its own part of the weight.
        read: the `get_attr` node of the stored weight, before its mask and before dimensions are swapped; None where
            the weight is computed.
        swapped: whether the stored weight is transposed, as inputs × outputs.
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
        """Whether the input has rows: a convolution's batch, or a linear layer's dimensions before the last."""
        dims = int(self.node.meta["val"].dim())
        return dims == self.kind.spatial_dims + 2 if self.kind.convolves else dims > 1


def layer_of(node: object) -> Layer | None:
    """The layer that a node calls; None for other operators, and for a product of two values that depend on inputs."""
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
    """The `get_attr` node of a stored weight, and whether its two dimensions are swapped on the way to the call."""
    swapped = False
    while isinstance(weight, fx.Node) and weight_node(weight) is None and is_call(weight, *_SWAPS):
        if weight.meta["val"].dim() != 2:
            return None, False
        swapped ^= not is_call(weight, aten.permute.default) or [d % 2 for d in arguments(weight)["dims"]] == [1, 0]
        weight = weight.args[0]
    return weight_node(weight), swapped


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """A stored weight that one call multiplies by.

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
    """Whether a value depends only on stored tensors that no call writes to: on no input, and no random numbers."""
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
        if may_draw(source) or is_inplace(source) or _is_written(source):
            return False
        ahead += source.all_input_nodes
    return True


def _is_written(value: fx.Node) -> bool:
    """Whether a call writes into a value in place, or into a view of it."""
    reads = value.graph.find_nodes(op="get_attr", sort=False) if value.op == "get_attr" else [value]
    ahead = [node for node in reads if node.target == value.target]
    while ahead:
        node = ahead.pop()
        users = [user for user in node.users if user.args and user.args[0] is node]
        if any(map(is_inplace, users)):
            return True
        ahead += filter(is_view, users)
    return False
