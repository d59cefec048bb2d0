"""Evens out ranges before quantization, without changing what the network computes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import strip_masks, weight_node
from lobo_fx.graph.operators import CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.passes.fusion.fold_batch_norm import FoldBatchNorm

_LAYERS = CONVOLUTIONS | {aten.linear.default}

# f(s·x) = s·f(x) for s > 0, or values are only moved: a factor passes through.
_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.dropout.default})
_SWEEPS = 3


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
        program = FoldBatchNorm().run(program, context)
        strip_masks(program)
        pairs = [pair for node in program.graph.nodes if (pair := _pair(program, node)) is not None]
        if not pairs:
            context.note("equalize_layers found no two layers in a row")
        for _ in range(_SWEEPS):
            for first, second in pairs:
                _equalize(program, first, second)
        return program


def _pair(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A layer and the one that alone reads it."""
    if not is_own_layer(program, node):
        return None
    end = node
    while len(end.users) == 1 and is_call(user := next(iter(end.users)), *_HOMOGENEOUS):
        end = user
    second = next(iter(end.users)) if len(end.users) == 1 else node
    if not is_own_layer(program, second) or second is node or arguments(second)["input"] is not end:
        return None
    same_kind = (node.target in CONVOLUTIONS) == (second.target in CONVOLUTIONS)
    outputs, inputs = len(weight_of(program, node)), weight_of(program, second).shape[1]
    depthwise = arguments(second).get("groups", 1) == outputs and inputs == 1
    return (node, second) if same_kind and (inputs == outputs or depthwise) else None


def is_own_layer(program: Program, node: fx.Node) -> bool:
    """Whether a layer's weight and bias are parameters that nothing else reads."""
    if not is_call(node, *_LAYERS):
        return False
    given = arguments(node)
    stored = [value for value in (given["weight"], given["bias"]) if value is not None]
    reads = [read for value in stored if (read := weight_node(value)) is not None and len(read.users) == 1]
    everything = program.graph.find_nodes(op="get_attr")
    alone = all(sum(program.parameter(n) is program.parameter(read) for n in everything) == 1 for read in reads)
    return len(reads) == len(stored) and alone and program.parameter(reads[0]).is_floating_point()


def weight_of(program: Program, node: fx.Node) -> torch.Tensor:
    return program.parameter(arguments(node)["weight"]).detach()


def _equalize(program: Program, first: fx.Node, second: fx.Node) -> None:
    made, read = weight_of(program, first), weight_of(program, second)
    dim = 0 if arguments(second).get("groups", 1) > 1 else 1
    largest_made = made.abs().flatten(1).amax(1)
    largest_read = read.abs().movedim(dim, 0).flatten(1).amax(1)
    factor = (largest_made / largest_read).sqrt()
    factor = torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))
    made.div_(factor.view(-1, *[1] * (made.dim() - 1)))
    bias = arguments(first)["bias"]
    if bias is not None:
        program.parameter(bias).detach().div_(factor)
    shape = [1] * read.dim()
    shape[dim] = -1
    read.mul_(factor.view(shape))
