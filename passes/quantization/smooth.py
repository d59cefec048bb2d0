"""Moves outliers of activations into weights, without changing what the network computes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import put_masks_back, take_off_masks, weight_node
from lobo_fx.graph.operators import arguments, aten, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.running import watch
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.quantization.equalize import along, largest_along, own_layer, usable, weight_of
from lobo_fx.plugins.settings import Range

__all__ = ["SmoothActivations"]

_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})


@dataclasses.dataclass(frozen=True)
class SmoothActivations(Pass):
    """Moves outliers of activations into weights: from a norm's outputs to the linear layers that read them.

    Before: `linear(layer_norm(x, γ, β), W)`; after: the same with γ/s, β/s and W·s along the channels,
    s = max|activation|^strength / max|W|^(1 - strength), from calibration data.

    Attributes:
        strength: how much of the difficulty goes to the weights, in [0, 1].

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
        Models", 2023.
    """

    strength: Annotated[float, Range(least=0, most=1)] = 0.5

    promise: ClassVar[Promise] = Promise.EXACT

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, always."""
        return ("calibration_data",)

    def run(self, program: Program, context: Context) -> Program:
        masked = take_off_masks(program)
        fold_weights(program, swapped=False)
        norms = [node for node in program.graph.nodes if _feeds_layers_alone(program, node)]
        if not norms:
            context.note("smooth_activations found no norm that only linear layers read")
        for norm, largest in _largest_outputs(program, norms, context).items():
            self._smooth(program, norm, largest)
        put_masks_back(program, masked)
        return program

    def _smooth(self, program: Program, norm: fx.Node, largest: torch.Tensor) -> None:
        readers = [layer for user in norm.users if (layer := own_layer(program, user)) is not None]
        weights = [(weight_of(program, layer), layer.input_dim) for layer in readers]
        columns = torch.stack([largest_along(weight, dim) for weight, dim in weights]).amax(0)
        factor = usable(largest**self.strength / columns ** (1 - self.strength))
        given = arguments(norm)
        for stored in (given["weight"], given.get("bias")):
            if stored is not None:
                program.parameter(stored).detach().div_(factor)
        for weight, dim in weights:
            weight.mul_(along(factor, weight, dim))


def _feeds_layers_alone(program: Program, node: fx.Node) -> bool:
    """Whether a norm over the last dimension has a scale of its own, and only linear layers read it."""
    if not is_call(node, *_NORMS) or len(arguments(node)["normalized_shape"]) != 1:
        return False
    given = arguments(node)
    stored = [given["weight"], given.get("bias")]
    reads = [weight_node(value) for value in stored if value is not None]
    if given["weight"] is None or any(read is None or len(read.users) > 1 for read in reads):
        return False
    readers = [own_layer(program, user) for user in node.users]
    return bool(readers) and all(layer is not None and not layer.kind.convolves for layer in readers)


def _largest_outputs(program: Program, norms: list[fx.Node], context: Context) -> dict[fx.Node, torch.Tensor]:
    """Largest magnitude of each channel of each norm's output, over the calibration data: (channels,)."""
    found: dict[fx.Node, torch.Tensor] = {}

    def see(norm: fx.Node, value: torch.Tensor) -> None:
        largest = value.abs().reshape(-1, value.shape[-1]).amax(0)
        found[norm] = torch.maximum(found[norm], largest) if norm in found else largest

    if norms:
        watchers = {norm: functools.partial(see, norm) for norm in norms}
        watch(program.module, context.fitting_batches(), watchers)
    return found
