"""Evens out ranges before quantization, without changing what the network computes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.layers import Layer, layer_of
from lobo_fx.graph.masks import put_masks_back, take_off_masks
from lobo_fx.graph.operators import aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.passes.fusion.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.fusion.fold_weights import fold_weights

__all__ = ["EqualizeLayers", "along", "largest_along", "own_layer", "usable", "weight_of"]

# f(s·x) = s·f(x) for s > 0, or values are only moved: a factor passes through.
_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.dropout.default})
_SWEEPS = 3
"""How often all pairs are equalized: a layer in the middle of three belongs to two pairs."""


@dataclasses.dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Moves factors between a layer's outputs and the next layer's inputs, so that both use the range of int8.

    Before: `conv(relu(conv(x, W₁, b₁)), W₂)`; after: the same with W₁/s, b₁/s and W₂·s along the channels between
    them, s = √(max|W₁| / max|W₂|). Batch norms are folded first. Cases: (1) convolution or linear layer, then
    nothing or an activation that factors pass through, then the next, dense or depthwise.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        masked = take_off_masks(program)
        fold_weights(program, swapped=False)
        program = FoldBatchNorm().run(program, context)
        pairs = [pair for node in program.graph.nodes if (pair := _pair(program, node)) is not None]
        if not pairs:
            context.note("equalize_layers found no two layers in a row")
        for _ in range(_SWEEPS):
            for first, second in pairs:
                _equalize(program, first, second)
        put_masks_back(program, masked)
        return program


def _pair(program: Program, node: fx.Node) -> tuple[Layer, Layer] | None:
    """A layer and the one that alone reads it."""
    first = own_layer(program, node)
    end = node
    while len(end.users) == 1 and is_call(user := next(iter(end.users)), *_HOMOGENEOUS):
        end = user
    second = own_layer(program, next(iter(end.users))) if first is not None and len(end.users) == 1 else None
    if first is None or second is None or second.input is not end or first.kind.convolves != second.kind.convolves:
        return None
    outputs = weight_of(program, first).shape[first.output_dim]
    inputs = weight_of(program, second).shape[second.input_dim]
    return (first, second) if inputs == outputs or _is_depthwise(program, second) else None


def own_layer(program: Program, node: fx.Node) -> Layer | None:
    """A convolution or linear layer whose weight and bias are parameters that nothing else reads."""
    layer = layer_of(node)
    if layer is None or layer.read is None or layer.kind.transposed or layer.kind.group_dim is not None:
        return None
    stored = [layer.read, *([] if layer.bias is None else [layer.bias_read])]
    if None in stored or any(len(value.users) > 1 for value in (layer.weight, *stored) if value is not None):
        return None
    everything = [program.parameter(read) for read in program.graph.find_nodes(op="get_attr")]
    own = [program.parameter(read) for read in stored if read is not None]
    alone = all(sum(other is tensor for other in everything) == 1 for tensor in own)
    return layer if alone and own[0].is_floating_point() else None


def weight_of(program: Program, layer: Layer) -> torch.Tensor:
    """The stored weight, outside any gradient."""
    assert layer.read is not None
    return program.parameter(layer.read).detach()


def largest_along(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """Largest magnitude of each position of one dimension: (positions,)."""
    return weight.abs().movedim(dim, 0).flatten(1).amax(1)


def along(values: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """A value for each position of one dimension, shaped to be multiplied with the weight."""
    return values.view([-1 if at == dim else 1 for at in range(weight.dim())])


def usable(factor: torch.Tensor) -> torch.Tensor:
    """The factors that are positive and finite; 1 in place of others, which come from channels of zeros."""
    return torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))


def _is_depthwise(program: Program, layer: Layer) -> bool:
    """Whether each channel has a group of its own, so that outputs are the inputs' positions."""
    weight = weight_of(program, layer)
    return layer.groups == weight.shape[layer.output_dim] and weight.shape[layer.input_dim] == 1


def _equalize(program: Program, first: Layer, second: Layer) -> None:
    made, read = weight_of(program, first), weight_of(program, second)
    dim = second.output_dim if _is_depthwise(program, second) else second.input_dim
    factor = usable((largest_along(made, first.output_dim) / largest_along(read, dim)).sqrt())
    made.div_(along(factor, made, first.output_dim))
    if first.bias_read is not None:
        program.parameter(first.bias_read).detach().div_(factor)
    read.mul_(along(factor, read, dim))
