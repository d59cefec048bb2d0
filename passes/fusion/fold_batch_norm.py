"""Folds batch normalisation into the linear operator before it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.layers import LAYERS, Layer, layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import aten, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.rewriting import (
    Match,
    Op,
    Rejected,
    add_parameter,
    drop_unused,
    free_name,
    replace_parameter,
    rewrite,
)

__all__ = ["FoldBatchNorm"]


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Batch normalisation in inference is an affine map per channel; it is folded into the operator before it.

    Before: `batch_norm(conv(x, W, b), γ, β, μ, σ²)`; after: `conv(x, W·s, (b − μ)·s + β)` with
    s = γ / √(σ² + ε). Cases: (1) a convolution, (2) a transposed convolution, whose output channels are
    grouped in dimension 1, (3) a linear layer on two-dimensional input.

    Left alone, with the reason in the report: a weight that another operator reads too, a norm in training
    mode, an operator whose result is used elsewhere as well.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.2.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        pattern = Op(aten.batch_norm.default, Op(LAYERS, name="layer", shared=True), name="norm")
        folded: list[str] = []
        for rejected in rewrite(program, pattern, lambda match: _fold(program, match, folded)):
            context.note(f"left alone: {rejected.reason}", rejected.node)
        drop_unused(program, folded)
        return program


def _fold(program: Program, match: Match, folded: list[str]) -> fx.Node | Rejected:
    layer, norm = layer_of(match["layer"]), match.arguments("norm")
    statistics = [norm["running_mean"], norm["running_var"]]
    affine = [norm["weight"], norm["bias"]]
    if layer is None or layer.kind.group_dim is not None:
        return Rejected(match["layer"], "the norm's channels are not the product's outputs")
    if len(layer.node.users) > 1:
        return Rejected(layer.node, "its result is used elsewhere as well")
    if norm["training"] or any(weight_node(node) is None for node in statistics):
        return Rejected(match.root, "it normalises with the statistics of its batch")
    if layer.read is None or (layer.bias is not None and layer.bias_read is None):
        return Rejected(layer.node, "its weight is computed, not a parameter")
    if any(node is not None and weight_node(node) is None for node in affine):
        return Rejected(match.root, "its scale is computed, not a parameter")
    readers = [n for n in program.graph.find_nodes(op="get_attr") if n.target == layer.read.target]
    weight = program.parameter(layer.read)
    shared = any(len(node.users) > 1 for node in (layer.read, layer.weight))
    if len(readers) > 1 or shared or _is_tied(program, weight):
        return Rejected(layer.node, "its weight is shared with another operator")
    if layer.kind.convolves and not layer.is_batched:
        return Rejected(layer.node, "without a batch the norm's channels are not the convolution's outputs")
    if not layer.kind.convolves and layer.node.meta["val"].dim() != 2:
        return Rejected(layer.node, "the norm's channels are not the linear layer's outputs")

    mean, variance = (program.parameter(node) for node in statistics)
    gamma, beta = (None if node is None else program.parameter(node) for node in affine)
    with torch.no_grad():
        scale = torch.rsqrt(variance.double() + norm["eps"])
        scale = scale if gamma is None else scale * gamma.double()
        bias = torch.zeros_like(mean) if layer.bias_read is None else program.parameter(layer.bias_read)
        shifted = (bias.double() - mean.double()) * scale
        shifted = shifted if beta is None else shifted + beta.double()
        replace_parameter(program, layer.read, _scaled(weight, scale, layer).to(weight.dtype))
    if layer.bias_read is not None and len(layer.bias_read.users) == 1:
        replace_parameter(program, layer.bias_read, shifted.to(weight.dtype))
    else:
        name = str(layer.read.target).rpartition(".")[0]
        with program.graph.inserting_before(layer.node):
            bias_name = free_name(program, f"{name}.bias".lstrip("."))
            trained = any(tensor is not None and tensor.requires_grad for tensor in (weight, bias, gamma, beta))
            new = nn.Parameter(shifted.to(weight.dtype), requires_grad=trained)
            stored = add_parameter(program, bias_name, new)
        set_argument(layer.node, "bias", stored)
    names = [str(node.target) for node in (*statistics, *affine) if node is not None]
    folded += [*names, *_counter(program, names[0].rpartition(".")[0])]
    return layer.node


def _scaled(weight: torch.Tensor, scale: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The weight with each output channel multiplied by its scale."""
    if not layer.kind.transposed:
        return weight.double() * scale.view([-1 if dim == layer.output_dim else 1 for dim in range(weight.dim())])
    inputs, outputs, *window = weight.shape  # [i o/g …]: output channels are grouped along the inputs
    grouped = weight.double().view(layer.groups, inputs // layer.groups, outputs, *window)
    return (grouped * scale.view(layer.groups, 1, outputs, *[1] * len(window))).view_as(weight)


def _is_tied(program: Program, weight: torch.Tensor) -> bool:
    """Whether the same tensor is registered under several names."""
    named = program.module.named_parameters(remove_duplicate=False)
    return sum(parameter is weight for _, parameter in named) > 1


def _counter(program: Program, prefix: str) -> list[str]:
    """The norm's count of batches, which has no reader in the graph."""
    name = f"{prefix}.num_batches_tracked".lstrip(".")
    return [name] if any(name == known for known, _ in program.module.named_buffers(remove_duplicate=False)) else []
