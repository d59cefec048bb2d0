"""Gradients and activations, gathered over data."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import fx

from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.measurements import Tensors
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import Layer, layers
from lobo_fx.graph.program import Program
from lobo_fx.graph.running import differentiated, kept_buffers, watch

__all__ = ["gradients", "input_norms"]

_BATCHES, _ROWS = 32, 1_024


def gradients(inference: Inference, context: Context) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Mean gradient of the loss, and mean of its square over batches, by identity of the parameter.

    Taken over the first 32 batches or 1,024 rows, whichever is more: a ranking settles long before an epoch ends.
    Frozen parameters have gradients too: what they are worth does not depend on whether they are trained.
    """
    program = inference.program
    parameters = {name: p for name, p in program.module.named_parameters() if p.is_floating_point()}

    def measure() -> Tensors:
        sums = {f"{kind} {name}": torch.zeros_like(p) for kind in ("first", "second") for name, p in parameters.items()}
        count = rows = 0
        stopped = False
        for inputs, labels in context.training_batches("gradients"):
            if stopped := count >= _BATCHES and rows >= _ROWS:
                break
            with torch.enable_grad(), differentiated(program.module), kept_buffers(program.module):
                loss = context.loss(program.module(*inputs.args, **inputs.kwargs), labels)
                if not bool(loss.isfinite()):
                    raise InvalidInput(f"loss_fn gives {float(loss.detach())} on batch {count} of train_data")
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            count, rows = count + 1, rows + context.signature.count_rows(inputs)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[f"first {name}"] += gradient
                    sums[f"second {name}"] += gradient.square()
        means = {name: total.detach() / count for name, total in sums.items()}
        return {**means, "read": torch.tensor([count, rows, stopped])}

    found = context.measured("gradients", program, measure, sorted(parameters), over="train_data")
    count, rows, stopped = found["read"].tolist()
    if stopped:
        context.note(f"gradients are of the first {count} batches of train_data, {rows} rows")
    first, second = (
        {id(parameter): found[f"{kind} {name}"] for name, parameter in parameters.items()}
        for kind in ("first", "second")
    )
    return first, second


def input_norms(inference: Inference, context: Context) -> dict[tuple[str, int], torch.Tensor]:
    """Root of the mean squares, summed over batches times their rows, of each input channel of layers without groups.

    The key is a weight's name and its input dimension; a tied weight that is also read transposed has two entries. Each
    is shaped to be multiplied with the weight: its size along the input dimension, 1 along the others.
    """
    program = inference.program
    readers: dict[fx.Node, list[Layer]] = {}
    for layer in layers(program.graph):
        if layer.read is not None and layer.groups == 1:
            readers.setdefault(layer.input, []).append(layer)
    places = {_place(layer): layer for found in readers.values() for layer in found}

    def measure() -> Tensors:
        sums: Tensors = {}
        rows = 0

        def batches() -> Iterator[Inputs]:
            nonlocal rows
            for inputs in context.fitting_batches("activations"):
                rows = context.signature.count_rows(inputs)
                yield inputs

        def see(source: fx.Node, value: torch.Tensor) -> None:
            for layer in readers[source]:
                channel = layer.kind.channel_dim % value.dim() if layer.is_batched else layer.kind.channel_dim
                channel = channel if layer.is_batched or not layer.kind.convolves else 0
                energy = value.double().square().mean([d for d in range(value.dim()) if d != channel])
                energy *= rows  # a short batch counts for less
                name = "{} {}".format(*_place(layer))
                sums[name] = sums.get(name, torch.zeros_like(energy)) + energy

        watchers = {source: functools.partial(see, source) for source in readers}
        watch(program.module, batches(), watchers)
        return sums

    sums = context.measured("energies", program, measure)
    found = {place: sums.get("{} {}".format(*place)) for place in places}
    return {
        place: total.sqrt().view(_beside(program, places[place])) for place, total in found.items() if total is not None
    }


def _place(layer: Layer) -> tuple[str, int]:
    """The name of a layer's stored weight, and the weight's input dimension."""
    assert layer.read is not None
    return str(layer.read.target), layer.input_dim


def _beside(program: Program, layer: Layer) -> list[int]:
    """A shape that broadcasts over a stored weight: -1 at its input dimension, 1 elsewhere."""
    assert layer.read is not None
    shape = [1] * program.parameter(layer.read).dim()
    shape[layer.input_dim] = -1
    return shape
