"""Mixed precision: as many layers as integers as a budget allows, the least sensitive first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from lobo_fx.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.inputs import Inputs
from lobo_fx.masks import strip_masks
from lobo_fx.measures import signal_to_noise
from lobo_fx.operators import VALUE_PRESERVING, is_call
from lobo_fx.passbase import Pass, Promise
from lobo_fx.passes.fold_batch_norm import FoldBatchNorm
from lobo_fx.passes.integer_regions import LINEAR
from lobo_fx.passes.quantize_static import QuantizeStatic, calibrate, convert, prepare
from lobo_fx.program import Program
from lobo_fx.progress import track
from lobo_fx.provenance import module_name
from lobo_fx.report import Sheet

if TYPE_CHECKING:
    from lobo_fx.passes.onnxruntime_quantizer import OnnxRuntimeQuantizer

DECIBELS = 30.0
"""The budget where none is given."""
_BATCHES = 8
"""Calibration batches that sensitivity is measured on."""


@dataclasses.dataclass(frozen=True)
class MixedPrecision(Pass):
    """Quantizes the largest set of layers that stays within a budget, and leaves the others float.

    Every layer (and sum, product or concatenation that can run as integers) is quantized alone, and the
    signal-to-noise ratio at the outputs measured: its sensitivity. Layers are then taken in that order, least
    sensitive first, as far as the budget goes. The sensitivities are a table of the report.

    Attributes:
        decibels: signal-to-noise ratio of the outputs that must stay; 30 where no budget is given.
        drop: loss of `evaluate`'s score that is allowed; give this or `decibels`.
        quantizer: how layers are quantized.

    Source: Wu et al., "Integer Quantization for Deep Learning Inference", 2020, section 6.
    """

    decibels: float | None = None
    drop: float | None = None
    quantizer: QuantizeStatic = dataclasses.field(default_factory=QuantizeStatic)

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        if self.decibels is not None and self.drop is not None:
            raise InvalidInput("give MixedPrecision one budget: decibels= or drop=")
        for name in ("decibels", "drop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < math.inf):
                raise InvalidInput(f"{name} is {value!r}; it must be a number of at least 0")
        if not isinstance(self.quantizer, QuantizeStatic):
            raise InvalidInput(f"quantizer is a {type(self.quantizer).__name__}; expected a QuantizeStatic")

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data, and the score where that is the budget."""
        return ("calibration_data", *(("evaluate",) if self.drop is not None else ()))

    def run(self, program: Program, context: Context) -> Program:
        program = FoldBatchNorm().run(program, context)
        strip_masks(program)
        quantizer = self.quantizer.quantizer(program, context)
        trial = program.clone()
        prepared = prepare(trial, quantizer, context)
        calibrate(prepared, context)
        simulation = Simulation(prepared, context)
        ranked = sorted(simulation.sensitivities(context.show_progress).items(), key=lambda entry: -entry[1])
        layers = [layer for layer, _ in ranked]

        def within(count: int) -> bool:
            if self.drop is None:
                return simulation.run(layers[:count]) >= (DECIBELS if self.decibels is None else self.decibels)
            assert context.evaluate is not None
            made = self._quantized(program, layers[count:], context)
            return context.evaluate(made.module) >= best - self.drop

        best = context.evaluate(program.clone().module) if self.drop is not None and context.evaluate else 0.0
        count = _largest(within, len(layers))
        context.sheets.append(_sheet(prepared.graph, ranked, layers[:count]))
        context.note(f"mixed_precision quantized {count} of {len(layers)} layers")
        return self._quantized(program, layers[count:], context)

    def _quantized(self, program: Program, floating: Collection[str], context: Context) -> Program:
        """A copy of the program, quantized but for some layers."""
        copy = program.clone()
        quiet = dataclasses.replace(context, notes=[], show_progress=False)
        quantizer = self.quantizer.quantizer(copy, quiet)
        quantizer.overrides = {**quantizer.overrides, **dict.fromkeys(floating)}
        _leave_float(quantizer, floating)
        prepared = prepare(copy, quantizer, quiet)
        calibrate(prepared, quiet)
        return self.quantizer.finish(convert(copy, prepared), quiet)


def _leave_float(quantizer: OnnxRuntimeQuantizer, floating: Collection[str]) -> None:
    if quantizer.chosen is not None:
        quantizer.chosen -= frozenset(floating)


def _largest(within: Callable[[int], bool], count: int) -> int:
    """The largest number up to `count` for which `within` holds, by bisection; 0 is taken to hold."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if within(middle) else (low, middle - 1)
    return low


class Simulation:
    """A calibrated program with some of its layers quantized, run in float.

    Args:
        prepared: with observers that have seen data.
        context: its first calibration batches are what outputs are compared on.
    """

    def __init__(self, prepared: fx.GraphModule, context: Context) -> None:
        from lobo_fx.passes.onnxruntime_quantizer import is_fused

        self.prepared = prepared
        self.batches: list[Inputs] = []
        for batch in dataclasses.replace(context, show_progress=False).calibration_batches():
            self.batches.append(batch)
            if len(self.batches) == _BATCHES:
                break
        self.layers = {
            node.name: observers
            for node in prepared.graph.nodes
            if node.op == "call_function"
            and not is_call(node, *VALUE_PRESERVING)
            and not is_fused(node)
            and (observers := _observers_of(node))
        }
        self.reference = [_Simulated(prepared, set()).outputs(batch) for batch in self.batches]

    def run(self, layers: Collection[str]) -> float:
        """Signal-to-noise ratio with these layers quantized, in decibels."""
        active = {observer for layer in layers for observer in self.layers[layer]}
        simulated = _Simulated(self.prepared, active)
        found = [simulated.outputs(batch) for batch in self.batches]
        return signal_to_noise(self.reference, found)

    def sensitivities(self, show_progress: bool) -> dict[str, float]:
        """Signal-to-noise ratio with each layer quantized alone."""
        return {layer: self.run([layer]) for layer in track(list(self.layers), "sensitivity", show_progress)}


def _observers_of(layer: fx.Node) -> set[fx.Node]:
    """The observers of an operator's inputs, and of its output, behind the activation that is fused.

    A linear layer gives float: what observes its output belongs to the next.
    """
    from lobo_fx.passes.onnxruntime_quantizer import is_fused

    found = {source for source in layer.all_input_nodes if source.op == "call_module"}
    if not found or is_call(layer, *LINEAR):
        return found
    fused = [user for user in layer.users if len(layer.users) == 1 and is_fused(user)]
    return found | {user for end in (layer, *fused) for user in end.users if user.op == "call_module"}


class _Simulated(fx.Interpreter):
    """Rounds what some observers see to what their range allows, and hands on what others see."""

    def __init__(self, prepared: fx.GraphModule, active: set[fx.Node]) -> None:
        super().__init__(prepared)
        self.active = active

    def outputs(self, inputs: Inputs) -> Any:
        """The outputs, flat."""
        with torch.no_grad():
            return self.run(*inputs.leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_module":
            return super().run_node(n)
        source = n.args[0]
        assert isinstance(source, fx.Node)
        value = self.env[source]
        observer = self.fetch_attr(str(n.target))
        if n not in self.active or (not hasattr(observer, "ch_axis") and not hasattr(observer, "min_val")):
            return value
        scale, zero = observer.calculate_qparams()
        low, high = observer.quant_min, observer.quant_max
        if scale.numel() > 1:
            return torch.fake_quantize_per_channel_affine(value, scale, zero.int(), observer.ch_axis, low, high)
        return torch.fake_quantize_per_tensor_affine(value, float(scale), int(zero), low, high)


def _sheet(graph: fx.Graph, ranked: list[tuple[str, float]], quantized: Collection[str]) -> Sheet:
    names = {node.name: module_name(node) or node.name for node in graph.nodes}
    rows = tuple((names[layer], round(snr, 2), "int8" if layer in quantized else "float") for layer, snr in ranked)
    return Sheet("sensitivity", ("layer", "SNR alone, dB", "precision"), rows)
