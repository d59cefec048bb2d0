"""Folds batch normalisation into the linear operator before it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments, aten, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.rewriting import Match, Op, Rejected, add_parameter, drop_unused, free_name, rewrite

_LINEAR = frozenset({aten.linear.default})


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Batch normalisation in inference is an affine map per channel; the operator before it takes it over.

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
        operators = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | _LINEAR
        pattern = Op(aten.batch_norm.default, Op(operators, name="operator", shared=True), name="norm")
        folded: list[str] = []
        for rejected in rewrite(program, pattern, lambda match: _fold(program, match, folded)):
            context.note(f"left alone: {rejected.reason}", rejected.node)
        drop_unused(program, folded)
        return program


def _fold(program: Program, match: Match, folded: list[str]) -> fx.Node | Rejected:
    operator, norm = match["operator"], match.arguments("norm")
    given = arguments(operator)
    weight_at, bias_at = weight_node(given["weight"]), given["bias"]
    statistics = [norm["running_mean"], norm["running_var"]]
    affine = [norm["weight"], norm["bias"]]
    if len(operator.users) > 1:
        return Rejected(operator, "its result is used elsewhere as well")
    if norm["training"] or any(weight_node(node) is None for node in statistics):
        return Rejected(match.root, "it normalises with the statistics of its batch")
    if weight_at is None or (bias_at is not None and weight_node(bias_at) is None):
        return Rejected(operator, "its weight is computed, not a parameter")
    if any(node is not None and weight_node(node) is None for node in affine):
        return Rejected(match.root, "its scale is computed, not a parameter")
    readers = [n for n in program.graph.find_nodes(op="get_attr") if n.target == weight_at.target]
    weight = program.parameter(weight_at)
    if len(readers) > 1 or len(weight_at.users) > 1 or _is_tied(program, weight):
        return Rejected(operator, "its weight is shared with another operator")
    if operator.target in _LINEAR and operator.meta["val"].dim() != 2:
        return Rejected(operator, "the norm's channels are not the linear layer's outputs")

    mean, variance = (program.parameter(node) for node in statistics)
    gamma, beta = (None if node is None else program.parameter(node) for node in affine)
    with torch.no_grad():
        scale = torch.rsqrt(variance.double() + norm["eps"])
        scale = scale if gamma is None else scale * gamma.double()
        bias = torch.zeros_like(mean) if bias_at is None else program.parameter(bias_at)
        shifted = (bias.double() - mean.double()) * scale
        shifted = shifted if beta is None else shifted + beta.double()
        weight.copy_(_scaled(weight, scale, operator))
    if bias_at is not None and len(bias_at.users) == 1:
        program.parameter(bias_at).data = shifted.to(weight.dtype)
    else:
        name = str(weight_at.target).rpartition(".")[0]
        with program.graph.inserting_before(operator):
            bias_name = free_name(program, f"{name}.bias".lstrip("."))
            stored = add_parameter(program, bias_name, nn.Parameter(shifted.to(weight.dtype)))
        set_argument(operator, "bias", stored)
    names = [str(node.target) for node in (*statistics, *affine) if node is not None]
    folded += [*names, *_counter(program, names[0].rpartition(".")[0])]
    return operator


def _scaled(weight: torch.Tensor, scale: torch.Tensor, operator: fx.Node) -> torch.Tensor:
    """The weight with each output channel multiplied by its scale."""
    if operator.target not in TRANSPOSED_CONVOLUTIONS:
        return weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    groups = arguments(operator)["groups"]
    inputs, outputs, *kernel = weight.shape
    grouped = weight.double().view(groups, inputs // groups, outputs, *kernel)
    return (grouped * scale.view(groups, 1, outputs, *[1] * len(kernel))).view_as(weight)


def _is_tied(program: Program, weight: torch.Tensor) -> bool:
    """Whether the same tensor is registered under several names."""
    named = program.module.named_parameters(remove_duplicate=False)
    return sum(parameter is weight for _, parameter in named) > 1


def _counter(program: Program, prefix: str) -> list[str]:
    """The norm's count of batches, which has no reader in the graph."""
    name = f"{prefix}.num_batches_tracked".lstrip(".")
    return [name] if any(name == known for known, _ in program.module.named_buffers(remove_duplicate=False)) else []
