"""Draws new weights, as PyTorch's layers would draw them."""

from __future__ import annotations

import math

import torch
from torch import fx

from lobo_fx.graph.layers import layer_of, weight_uses
from lobo_fx.graph.operators import arguments
from lobo_fx.graph.program import Program

__all__ = ["initialise"]

_IDENTITY = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
"""What a norm's parameters and statistics are before training."""


def initialise(program: Program, generator: torch.Generator) -> None:
    """Draws every parameter anew, in place.

    Weights and biases of layers are uniform with the variance 1 / (3 × inputs), as PyTorch's layers draw them; norms
    begin as identities, their statistics as those of a standard normal. Other parameters (embeddings, tokens,
    positions) are normal, each with its present mean and spread.

    Args:
        program: changed in place.
        generator: draws the weights.
    """
    bounds: dict[int, float] = {}
    constants: dict[int, float] = {}
    for node in program.graph.nodes:
        for use in weight_uses(node):
            weight, layer = program.parameter(use.read), layer_of(node)
            batched = layer is not None and layer.kind.group_dim is not None
            inputs = (
                weight.numel() / weight.shape[use.output_dim] / (layer.groups if layer is not None and batched else 1)
            )
            bounds[id(weight)] = 1 / math.sqrt(inputs)
            if layer is not None and layer.bias_read is not None:
                bounds.setdefault(id(program.parameter(layer.bias_read)), bounds[id(weight)])
        if node.op == "call_function" and "norm" in str(node.target):
            given = arguments(node)
            reads = {name: given[name] for name in _IDENTITY if isinstance(given.get(name), fx.Node)}
            constants |= {
                id(program.parameter(read)): _IDENTITY[name] for name, read in reads.items() if read.op == "get_attr"
            }
    tensors = {id(tensor): tensor for tensor in program.module.state_dict(keep_vars=True).values()}  # tied ones once
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in constants:
                tensor.fill_(constants[key])
            elif key in bounds:
                tensor.uniform_(-bounds[key], bounds[key], generator=generator)
            elif isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
                spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
                tensor.normal_(float(tensor.mean()), spread, generator=generator)
