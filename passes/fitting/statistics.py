"""Gradients and activations, gathered over data."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import CONVOLUTIONS, arguments, aten, is_call


def gradients(inference: Inference, context: Context) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Mean gradient of the loss, and mean of its square over batches, by identity of the parameter."""
    module = inference.program.module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first = {id(p): torch.zeros_like(p) for p in parameters}
    second = {id(p): torch.zeros_like(p) for p in parameters}
    count = 0
    for inputs, labels in context.training_batches("gradients"):
        assert context.loss_fn is not None
        if not parameters:
            raise InvalidInput("all parameters are frozen: no gradient can be taken")
        with torch.enable_grad():
            loss = context.loss_fn(module(*inputs.args, **inputs.kwargs), labels)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise InvalidInput("loss_fn must return a scalar tensor that depends on the outputs")
            if not bool(loss.isfinite()):
                raise InvalidInput(f"loss_fn gives {float(loss.detach())} on batch {count} of train_data")
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        count += 1
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                first[id(parameter)] += gradient
                second[id(parameter)] += gradient.square()
    for sums in (first, second):
        for total in sums.values():
            total /= count
    return first, second


def input_norms(inference: Inference, context: Context) -> dict[str, torch.Tensor]:
    """Root mean square of each input channel of convolutions and linear layers, by name of the weight."""
    program = inference.program
    sums: dict[str, torch.Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if is_call(n, *CONVOLUTIONS, aten.linear.default):
                given = arguments(n)
                weight, value = weight_node(given["weight"]), self.env[given["input"]]
                channel = value.dim() - 1 if n.target is aten.linear.default else 1
                if weight is not None and given.get("groups", 1) == 1:
                    energy = value.double().square().mean([d for d in range(value.dim()) if d != channel])
                    name = str(weight.target)
                    sums[name] = sums.get(name, torch.zeros_like(energy)) + energy
            return super().run_node(n)

    with torch.no_grad():
        for inputs in context.calibration_batches("activations"):
            Watch(program.module).run(*inputs.leaves, enable_io_processing=False)
    return {name: total.sqrt() for name, total in sums.items()}
