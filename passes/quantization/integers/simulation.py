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
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes.quantization.integers.kernels import KernelTable, kernel_table
from lobo_fx.passes.quantization.integers.placement import Placement
from lobo_fx.terminal.progress import track

_BATCHES, _ROWS = 8, 32
"""Calibration data that is held in memory at once: up to eight batches, no more once there are 32 rows."""


def first_batches(context: Context) -> list[Inputs]:
    """As many calibration batches as are held in memory at once."""
    found: list[Inputs] = []
    for batch in dataclasses.replace(context, show_progress=False).calibration_batches():
        found.append(batch)
        if len(found) == _BATCHES or sum(len(tensor) for batch in found for tensor in batch.tensors[:1]) >= _ROWS:
            break
    return found


class Simulated(fx.Interpreter):
    """Rounds what some observers see to what their range allows, and hands on what others see.

    Args:
        prepared: with observers that have seen data.
        active: names of the observers that round; None for all.
    """

    def __init__(self, prepared: fx.GraphModule, active: Collection[str] | None = None) -> None:
        super().__init__(prepared)
        self.active = active

    def outputs(self, inputs: Inputs) -> Any:
        """The outputs, flat."""
        with torch.no_grad():
            return self.run(*inputs.leaves, enable_io_processing=False)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What leaves an observer; int32 biases are next to exact."""
        from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

        observer = self.fetch_attr(str(target))
        if isinstance(observer, DerivedObserverOrFakeQuantize) or (
            self.active is not None and target not in self.active
        ):
            return args[0]
        scale, zero = observer.calculate_qparams()
        low, high = observer.quant_min, observer.quant_max
        if scale.numel() > 1:
            return torch.fake_quantize_per_channel_affine(args[0], scale, zero.int(), observer.ch_axis, low, high)
        return torch.fake_quantize_per_tensor_affine(args[0], float(scale), int(zero), low, high)


class Simulation:
    """Measures what quantizing some layers costs.

    Args:
        prepared: with observers that have seen data.
        placement: where they were put.
        context: its first calibration batches are what outputs are compared on.
        original: what outputs are compared with.
    """

    def __init__(self, prepared: fx.GraphModule, placement: Placement, context: Context, original: Program) -> None:
        table = kernel_table(placement.runtime)
        self.prepared = prepared
        self.batches = first_batches(context)
        self.layers = {
            node.name: observers
            for node in prepared.graph.nodes
            if node.name in placement.integer and (observers := _observers_of(node, table))
        }
        self.reference = self._outputs(original)

    def run(self, layers: Collection[str]) -> float:
        """Signal-to-noise ratio with these layers quantized, in decibels."""
        simulated = Simulated(self.prepared, {observer for layer in layers for observer in self.layers[layer]})
        found = [simulated.outputs(batch) for batch in self.batches]
        return signal_to_noise(self.reference, found)

    def of(self, program: Program) -> float:
        """Signal-to-noise ratio of another program, in decibels."""
        return signal_to_noise(self.reference, self._outputs(program))

    def _outputs(self, program: Program) -> list[Any]:
        interpreter = fx.Interpreter(program.module)
        with torch.no_grad():
            return [interpreter.run(*batch.leaves, enable_io_processing=False) for batch in self.batches]

    def sensitivities(self, show_progress: bool) -> dict[str, float]:
        """Signal-to-noise ratio with each layer quantized alone."""
        return {layer: self.run([layer]) for layer in track(list(self.layers), "sensitivity", show_progress)}


def _observers_of(layer: fx.Node, table: KernelTable) -> set[str]:
    """Names of the observers of an operator's inputs, and of its output, behind the activation that is fused.

    A linear layer gives float: what observes its output belongs to the next.
    """
    found = {str(source.target) for source in layer.all_input_nodes if source.op == "call_module"}
    if not found or not table.gives_integers(layer):
        return found
    ends = [user for end in {layer, table.end(layer)} for user in end.users if user.op == "call_module"]
    return found | {str(end.target) for end in ends}
