"""Evens out ranges before quantization, without changing what the network computes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import fx

from lobo_fx.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.masks import strip_masks, weight_node
from lobo_fx.operators import CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.passbase import Pass, Promise
from lobo_fx.passes.fold_batch_norm import FoldBatchNorm
from lobo_fx.program import Program

_LAYERS = CONVOLUTIONS | {aten.linear.default}
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
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
    if not _is_own_layer(program, node):
        return None
    end = node
    while len(end.users) == 1 and is_call(user := next(iter(end.users)), *_HOMOGENEOUS):
        end = user
    second = next(iter(end.users)) if len(end.users) == 1 else node
    if not _is_own_layer(program, second) or second is node or arguments(second)["input"] is not end:
        return None
    same_kind = (node.target in CONVOLUTIONS) == (second.target in CONVOLUTIONS)
    outputs, inputs = len(_weight(program, node)), _weight(program, second).shape[1]
    depthwise = arguments(second).get("groups", 1) == outputs and inputs == 1
    return (node, second) if same_kind and (inputs == outputs or depthwise) else None


def _is_own_layer(program: Program, node: fx.Node) -> bool:
    """Whether a layer's weight and bias are parameters that nothing else reads."""
    if not is_call(node, *_LAYERS):
        return False
    given = arguments(node)
    stored = [value for value in (given["weight"], given["bias"]) if value is not None]
    reads = [read for value in stored if (read := weight_node(value)) is not None and len(read.users) == 1]
    everything = program.graph.find_nodes(op="get_attr")
    alone = all(sum(program.parameter(n) is program.parameter(read) for n in everything) == 1 for read in reads)
    return len(reads) == len(stored) and alone and program.parameter(reads[0]).is_floating_point()


def _weight(program: Program, node: fx.Node) -> torch.Tensor:
    return program.parameter(arguments(node)["weight"]).detach()


def _equalize(program: Program, first: fx.Node, second: fx.Node) -> None:
    made, read = _weight(program, first), _weight(program, second)
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

    strength: float = 0.5

    promise: ClassVar[Promise] = Promise.EXACT

    def __post_init__(self) -> None:
        if not isinstance(self.strength, (int, float)) or not 0 <= self.strength <= 1:
            raise InvalidInput(f"strength is {self.strength!r}; it must be in [0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, always."""
        return ("calibration_data",)

    def run(self, program: Program, context: Context) -> Program:
        strip_masks(program)
        norms = [node for node in program.graph.nodes if _feeds_layers_alone(program, node)]
        if not norms:
            context.note("smooth_activations found no norm that only linear layers read")
        for norm, largest in _largest_outputs(program, norms, context).items():
            self._smooth(program, norm, largest)
        return program

    def _smooth(self, program: Program, norm: fx.Node, largest: torch.Tensor) -> None:
        weights = [_weight(program, reader) for reader in norm.users]
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        factor = largest**self.strength / columns ** (1 - self.strength)
        factor = torch.where(factor.isfinite() & (factor > 0), factor, torch.ones_like(factor))
        given = arguments(norm)
        for stored in (given["weight"], given.get("bias")):
            if stored is not None:
                program.parameter(stored).detach().div_(factor)
        for weight in weights:
            weight.mul_(factor)


def _feeds_layers_alone(program: Program, node: fx.Node) -> bool:
    """Whether a norm over the last dimension has a scale of its own, and only linear layers read it."""
    if not is_call(node, *_NORMS) or len(arguments(node)["normalized_shape"]) != 1:
        return False
    given = arguments(node)
    stored = [given["weight"], given.get("bias")]
    reads = [read for value in stored if value is not None and (read := weight_node(value)) is not None]
    own = bool(reads) and given["weight"] is not None and all(len(read.users) == 1 for read in reads)
    readers = list(node.users)
    return (
        own
        and bool(readers)
        and all(is_call(user, aten.linear.default) and _is_own_layer(program, user) for user in readers)
    )


def _largest_outputs(program: Program, norms: list[fx.Node], context: Context) -> dict[fx.Node, torch.Tensor]:
    """Largest magnitude of each channel of each norm's output, over the calibration data."""
    found: dict[fx.Node, torch.Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in norms:
                largest = value.detach().abs().flatten(0, -2).amax(0)
                found[n] = torch.maximum(found[n], largest) if n in found else largest
            return value

    with torch.no_grad():
        for batch in context.calibration_batches() if norms else ():
            Watch(program.module).run(*batch.leaves, enable_io_processing=False)
    return found
