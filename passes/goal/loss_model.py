"""The loss of each width of each axis: the curve's shape by second-order elimination, its height by one measured run.

Elimination tells how the error of an axis grows as positions go. The effect at the outputs is measured once for each
axis: the original runs with the weights that elimination leaves, about halfway, in the layers that read the axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import Member, parameters
from lobo_fx.axes.surgery import zeroed
from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import layer_of, layers
from lobo_fx.graph.operators import named_values
from lobo_fx.graph.program import Program
from lobo_fx.graph.running import AS_IT_IS, Runner
from lobo_fx.measures.fidelity import float_outputs, same_nonfinite, stacked, variation
from lobo_fx.passes.pruning.second_order import Elimination, eliminations, output_weights
from lobo_fx.passes.pruning.widths import best_positions
from lobo_fx.terminal.progress import track

__all__ = ["LossModel", "Noise", "added"]

_LEAST = 1e-12
_MOST = 1e12


class Noise:
    """Noise of a program's outputs as a share of the variance of the original's, on rows that no fit saw.

    Every output counts alike, however large its values are. Where the original is infinite or NaN, as behind a mask,
    the program has to be so too; else its noise is infinite.

    Args:
        original: the program to compare with.
        batches: inputs that both run on.
    """

    def __init__(self, original: Program, batches: Sequence[Inputs]) -> None:
        self.batches = batches
        self.reference = self._outputs(Runner(original.module))
        self.signals = [variation([reference]) for reference in self.reference]

    def of(self, runner: Runner) -> float:
        """The noise of a runner in the original's place."""
        found = self._outputs(runner)
        if not all(map(same_nonfinite, self.reference, found)):
            return math.inf
        shares = [
            float((y - r)[r.isfinite()].square().sum()) / signal
            for y, r, signal in zip(found, self.reference, self.signals, strict=True)
        ]
        return math.fsum(shares) / len(shares)

    def _outputs(self, runner: Runner) -> list[torch.Tensor]:
        """Each floating-point output over all batches."""
        return [
            stacked(parts) for parts in zip(*(float_outputs(runner(inputs)) for inputs in self.batches), strict=True)
        ]

    def __call__(self, program: Program) -> float:
        return self.of(Runner(program.module))


@dataclasses.dataclass(frozen=True)
class LossModel:
    """The losses of widths, of each axis alone, and which positions stay.

    Attributes:
        leaves: the free axes.
        scores: importance of each position, by leaf.
        losses: by leaf, (positions + 1,) noise by the number of positions that are left.
    """

    leaves: tuple[Axis, ...]
    scores: Mapping[Axis, torch.Tensor]
    losses: Mapping[Axis, torch.Tensor]

    @classmethod
    def measure(
        cls,
        inference: Inference,
        context: Context,
        noise: Noise,
        free: Mapping[Axis, Sequence[Member]],
        beside: Iterable[tuple[Axis, Elimination | None]] = (),
    ) -> LossModel:
        """Eliminates along every axis, and runs the original once for each.

        Args:
            inference: axes of the program.
            context: gives calibration data.
            noise: measures the noise of the program's outputs.
            free: the leaves whose widths are chosen, with what they run through.
            beside: eliminations of further leaves.
        """
        program = inference.program
        means = _means(program, noise.batches, {layer.node for layer in layers(program.graph)})
        scores: dict[Axis, torch.Tensor] = {}
        losses: dict[Axis, torch.Tensor] = {}
        own = eliminations(inference, context, output_weights(program, context), free)
        own = track(own, "loss of widths", context.show_progress, len(free))
        for leaf, entry in itertools.chain(own, track(beside, "loss of ranks", context.show_progress)):
            if entry is not None:
                scores[leaf] = entry.scores
                shape = entry.errors.flip(0)  # by how many are left
                halfway, measured = entry.halfway, noise.of(_replaced(program, entry.weights, means))
            else:
                parts = [member.along(leaf, member.weight.square()) for member in parameters(free[leaf])]
                scores[leaf] = sum(parts, start=torch.zeros(leaf.size, dtype=torch.double))
                ranked = scores[leaf].sort(descending=True).values
                shape = ranked.sum() - torch.cat([torch.zeros(1, dtype=torch.double), ranked.cumsum(0)])
                halfway = max(1, leaf.size // 2)
                measured = _noise_without(inference, leaf, scores[leaf], halfway, noise)
            if measured < _LEAST and entry is not None:  # half of the positions are dead: the others are not
                nothing = {node: torch.zeros_like(weight) for node, weight in entry.weights.items()}
                halfway, measured = 0, noise.of(_replaced(program, nothing, means))
            elif measured < _LEAST:
                halfway, measured = 0, _noise_without(inference, leaf, scores[leaf], 0, noise)
            height = min(added(measured), _MOST) / max(float(shape[halfway]), _LEAST)
            losses[leaf] = (shape * height).flip(0).cummax(0).values.flip(0)
        return cls(tuple(scores), scores, losses)


def added(noise: float) -> float:
    """A share of noise as a loss that can be summed: n / (1 - n).

    Fitted outputs shrink with their noise, so that noise as a share of the signal approaches one but never exceeds it.
    """
    return noise / max(1 - noise, 0.05)


def _means(program: Program, batches: Sequence[Inputs], nodes: set[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The mean of each output of each layer, by the layer's node."""
    sums: dict[fx.Node, tuple[torch.Tensor, int]] = {}

    def see(node: fx.Node, value: Any) -> None:
        if node in nodes:
            total, count = sums.get(node, (torch.zeros(()), 0))
            mean = _channel_mean(node, value)
            sums[node] = total + mean, count + 1

    runner = Runner(program.module, see)
    for inputs in batches:
        runner(inputs)
    return {node: total / count for node, (total, count) in sums.items()}


def _channel_mean(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The mean of each channel over all places, shaped to be added to the value."""
    layer = layer_of(node)
    assert layer is not None
    channel = layer.kind.channel_dim % value.dim()
    kept = {channel, 0} if layer.kind.group_dim is not None else {channel}
    return value.mean([dim for dim in range(value.dim()) if dim not in kept], keepdim=True)


def _replaced(
    program: Program, weights: Mapping[fx.Node, torch.Tensor], means: Mapping[fx.Node, torch.Tensor]
) -> Runner:
    """Runs a program with other weights in some layers, and biases that keep the means of their outputs."""

    def instead(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node not in weights:
            return AS_IT_IS
        layer = layer_of(node)
        assert layer is not None
        given = named_values(node, args, kwargs)
        weight = weights[node].to(given[layer.kind.weight].dtype)
        value = node.target(**{**given, layer.kind.weight: weight})  # type: ignore[operator]
        return value + (means[node] - _channel_mean(node, value))

    return Runner(program.module, instead=instead)


def _noise_without(inference: Inference, leaf: Axis, scores: torch.Tensor, stay: int, noise: Noise) -> float:
    """The noise of the program with the least important positions of one axis zeroed."""
    with zeroed(inference, best_positions({leaf: scores}, {leaf: stay})):
        return noise(inference.program)
