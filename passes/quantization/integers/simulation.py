"""A calibrated program with some of its layers quantized, run in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.running import AS_IT_IS, Runner
from lobo_fx.measures.judge import Judge
from lobo_fx.passes.quantization.integers.kernels import KernelTable, kernel_table
from lobo_fx.passes.quantization.integers.placement import Placement
from lobo_fx.terminal.progress import track

__all__ = ["Simulation", "first_batches", "observers_by_layer", "rounded_by", "simulated"]

_BATCHES, _ROWS = 8, 32
"""Calibration data that is held in memory at once: up to eight batches, no more once there are 32 rows."""


def first_batches(context: Context) -> list[Inputs]:
    """As many calibration batches as are held in memory at once."""
    found: list[Inputs] = []
    for batch in dataclasses.replace(context, show_progress=False).fitting_batches():
        found.append(batch)
        if len(found) == _BATCHES or sum(map(context.signature.count_rows, found)) >= _ROWS:
            break
    return found


def simulated(prepared: fx.GraphModule, active: Collection[str] | None = None) -> Runner:
    """A runner of a graph with observers as if it were quantized: values are rounded in the observers' ranges.

    Args:
        prepared: a graph with observers that have seen data.
        active: names of the observers that round; None for all. The others hand their input on.
    """

    def instead(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.op != "call_module":
            return AS_IT_IS
        rounds = active is None or node.target in active
        return rounded_by(prepared.get_submodule(str(node.target)), args[0]) if rounds else args[0]

    return Runner(prepared, instead=instead)


def rounded_by(observer: Any, value: torch.Tensor) -> torch.Tensor:
    """A value as an observer will quantize it; int32 biases stay as they are, since they are next to exact."""
    from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

    if isinstance(observer, DerivedObserverOrFakeQuantize):
        return value
    scale, zero = observer.calculate_qparams()
    low, high = observer.quant_min, observer.quant_max
    if scale.numel() > 1:
        return torch.fake_quantize_per_channel_affine(value, scale, zero.int(), observer.ch_axis, low, high)
    return torch.fake_quantize_per_tensor_affine(value, float(scale), int(zero), low, high)


class Simulation:
    """Measures what quantizing some layers costs.

    Args:
        prepared: a graph with observers that have seen data.
        placement: the placement that the observers were inserted for.
        context: gives calibration data; outputs are compared on its held-out rows.
        original: the program whose outputs are compared with.
    """

    def __init__(self, prepared: fx.GraphModule, placement: Placement, context: Context, original: Program) -> None:
        self.prepared = prepared
        self.judge = Judge(original, context.held_out_batches() or first_batches(context))
        self.layers = observers_by_layer(prepared, placement)

    def run(self, layers: Collection[str]) -> float:
        """Signal-to-noise ratio with these layers quantized, in decibels, in the worst part of the outputs."""
        runner = simulated(self.prepared, {observer for layer in layers for observer in self.layers[layer]})
        return self.judge.verdict(runner).worst

    def of(self, program: Program) -> float:
        """Signal-to-noise ratio of another program, in decibels, in its worst part."""
        return self.judge(program).worst

    def sensitivities(self, show_progress: bool) -> dict[str, float]:
        """Signal-to-noise ratio with each layer quantized alone."""
        return {layer: self.run([layer]) for layer in track(list(self.layers), "sensitivity", show_progress)}


def observers_by_layer(prepared: fx.GraphModule, placement: Placement) -> dict[str, set[str]]:
    """The names of the observers around each operator that runs as integers, by the operator's name."""
    table = kernel_table(placement.runtime)
    found = {node.name: _observers_of(node, table) for node in prepared.graph.nodes if node.name in placement.integer}
    return {name: observers for name, observers in found.items() if observers}


def _observers_of(layer: fx.Node, table: KernelTable) -> set[str]:
    """Names of the observers of an operator's inputs, and of its output, behind the activation that is fused.

    A linear layer gives float: the observer of its output belongs to the next operator.
    """
    found = {str(source.target) for source in layer.all_input_nodes if source.op == "call_module"}
    if not found or not table.gives_integers(layer):
        return found
    ends = [user for end in {layer, table.end(layer)} for user in end.users if user.op == "call_module"]
    return found | {str(end.target) for end in ends}
