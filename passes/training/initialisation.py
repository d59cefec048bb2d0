"""Draws new weights, as PyTorch's layers would draw them."""

from __future__ import annotations

import math

import torch
from torch import fx

from lobo_fx.graph.layers import layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import RECURRENT, arguments, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.recurrent import Recurrent

__all__ = ["initialise"]

_IDENTITY = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
"""What a norm's parameters and statistics are before training."""


def initialise(program: Program, generator: torch.Generator) -> None:
    """Draws every parameter that can be trained anew, in place; other parameters and buffers stay.

    Weights and biases of convolutions, linear and recurrent layers are uniform with the bounds of PyTorch's layers;
    norms begin as identities, their statistics as those of a standard normal. Other parameters (embeddings, tokens,
    positions) are normal, each with its present mean and spread.

    Args:
        program: changed in place.
        generator: draws the weights.
    """
    bounds: dict[int, float] = {}
    constants: dict[int, float] = {}
    for node in program.graph.nodes:
        if is_call(node, *RECURRENT):  # all of its parameters alike, by the width of its states
            call = Recurrent.of(node)
            bound = 1 / math.sqrt(call.states[-1].meta["val"].shape[-1])
            reads = [weight_node(value) for value in call.params]
            bounds |= {id(program.parameter(read)): bound for read in reads if read is not None}
        elif (layer := layer_of(node)) is not None and layer.read is not None:
            weight = program.parameter(layer.read)
            # of a transposed convolution, PyTorch counts the outputs
            inputs = weight[0].numel() if layer.kind.convolves else weight.shape[layer.input_dim]
            bounds[id(weight)] = 1 / math.sqrt(inputs)
            if layer.bias_read is not None:
                bounds.setdefault(id(program.parameter(layer.bias_read)), bounds[id(weight)])
        elif node.op == "call_function" and "norm" in str(node.target):
            given = arguments(node)
            named = {name: given[name] for name in _IDENTITY if isinstance(given.get(name), fx.Node)}
            for name, read in named.items():
                if read.op == "get_attr" and (name.startswith("running") or _is_trained(program.parameter(read))):
                    constants[id(program.parameter(read))] = _IDENTITY[name]
    tensors = {id(tensor): tensor for tensor in program.module.state_dict(keep_vars=True).values()}  # tied ones once
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in constants:
                tensor.fill_(constants[key])
            elif not _is_trained(tensor):
                continue
            elif key in bounds:
                tensor.uniform_(-bounds[key], bounds[key], generator=generator)
            else:
                spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
                tensor.normal_(float(tensor.mean()), spread, generator=generator)


def _is_trained(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad and tensor.is_floating_point()
