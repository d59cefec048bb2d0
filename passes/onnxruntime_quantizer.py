"""Where observers go, so that ONNX Runtime's CPU kernels run the result as integers.

Formats: uint8 activations (asymmetric, per tensor), int8 weights (symmetric, per output channel), int32
biases whose scale is input scale × weight scale. A float bias would keep ONNX Runtime from fusing.

Regions: (1) a convolution quantizes its input, and its output where the activation after it ends;
(2) a linear layer quantizes its input and gives float, since what follows it mostly is float;
(3) a residual add of two quantized values stays quantized; (4) pools and reshapes hand a quantized value on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from lobo_fx.masks import weight_node
from lobo_fx.operators import CONVOLUTIONS, VALUE_PRESERVING, arguments, aten, is_call

ANNOTATION = "quantization_annotation"
LINEAR = frozenset({aten.linear.default, aten.addmm.default})
# A runtime folds these into the operator before them: they only cut the range that is quantized.
FUSED_ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default})
_DEQUANTIZE = frozenset(
    {
        torch.ops.quantized_decomposed.dequantize_per_channel.default,
        torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    }
)
_AVERAGE_POOLS = frozenset({aten.adaptive_avg_pool2d.default})
_ADDITIONS = frozenset({aten.add.Tensor})


@dataclasses.dataclass(frozen=True)
class Observers:
    """Constructors of observers (or fake quantizers), one for each kind of tensor."""

    activation: Any
    weight: Any


class OnnxRuntimeQuantizer(Quantizer):
    """Annotates a graph for ONNX Runtime on x86 CPUs.

    Args:
        observers: what watches the ranges.
    """

    def __init__(self, observers: Observers) -> None:
        self.activation = QuantizationSpec(torch.uint8, observers.activation, 0, 255, torch.per_tensor_affine)
        self.observers = observers
        self.skipped: list[tuple[fx.Node, str]] = []
        self._quantized: set[fx.Node] = set()

    def weight(self, channel_axis: int) -> QuantizationSpec:
        """int8, symmetric, one scale per output channel."""
        return QuantizationSpec(
            torch.int8, self.observers.weight, -127, 127, torch.per_channel_symmetric, ch_axis=channel_axis
        )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Marks every operator that has an integer kernel worth running."""
        for node in model.graph.nodes:
            node.meta.pop(ANNOTATION, None)  # of an earlier quantization
        for node in model.graph.nodes:
            if is_call(node, *CONVOLUTIONS):
                self._annotate_convolution(node)
            elif is_call(node, *LINEAR):
                self._annotate_linear(node)
            elif is_call(node, *_ADDITIONS):
                self._annotate_addition(node)
            elif is_call(node, *_AVERAGE_POOLS):
                self._annotate_average(node)
            elif is_call(node, *VALUE_PRESERVING):
                self._annotate_preserving(node)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to add: what has no integer kernel was not annotated."""

    def _annotate_convolution(self, node: fx.Node) -> None:
        given = arguments(node)
        if not self._takes(node, given["input"], given["weight"]):
            return
        self._annotate_weighted(node, given["input"], given["weight"], given["bias"], channel_axis=0)
        self._quantize_output(node)

    def _annotate_linear(self, node: fx.Node) -> None:
        given = arguments(node)
        source, weight, bias, axis = (
            (given["mat1"], given["mat2"], given["self"], 1)
            if node.target is aten.addmm.default
            else (given["input"], given["weight"], given["bias"], 0)
        )
        if not self._takes(node, source, weight):
            return
        # only the two-dimensional product has a kernel that adds an integer bias
        derived = bias if source.meta["val"].dim() == 2 else None
        self._annotate_weighted(node, source, weight, derived, channel_axis=axis)

    def _takes(self, node: fx.Node, source: fx.Node, weight: fx.Node) -> bool:
        """Whether there is something to quantize; if not, the reason is kept."""
        dtype = source.meta["val"].dtype
        if weight.target in _DEQUANTIZE:
            return False
        if weight_node(weight) is None:
            self.skipped.append((node, "its weight is computed, not a parameter"))
            return False
        if dtype != torch.float32:
            self.skipped.append((node, f"its input is {str(dtype).removeprefix('torch.')}, not float32"))
            return False
        return True

    def _annotate_weighted(
        self, node: fx.Node, source: fx.Node, weight: fx.Node, bias: fx.Node | None, channel_axis: int
    ) -> None:
        specs: dict[fx.Node, QuantizationSpecBase | None] = {
            source: self.activation,
            weight: self.weight(channel_axis),
        }
        if bias is not None and weight_node(bias) is not None and len(bias.users) == 1:
            specs[bias] = DerivedQuantizationSpec(
                derived_from=[(source, node), (weight, node)],
                derive_qparams_fn=bias_parameters,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        _set(node, specs, None)

    def _quantize_output(self, node: fx.Node) -> None:
        """Quantizes what leaves the operator, after the activation that is fused into it."""
        last, users = node, list(node.users)
        if len(users) == 1 and is_fused(users[0]) and users[0].args[0] is node:
            last = users[0]
        elif node in self._quantized:
            return
        annotation = last.meta.get(ANNOTATION) or QuantizationAnnotation(_annotated=True)
        annotation.output_qspec = self.activation
        last.meta[ANNOTATION] = annotation
        self._quantized.add(last)

    def _annotate_addition(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if len(operands) != 2 or not all(operand in self._quantized for operand in operands):
            return
        _set(node, dict.fromkeys(operands, self.activation), None)
        self._quantize_output(node)

    def _annotate_average(self, node: fx.Node) -> None:
        source = node.args[0]
        if source in self._quantized and isinstance(source, fx.Node):
            _set(node, {source: self.activation}, self.activation)
            self._quantized.add(node)

    def _annotate_preserving(self, node: fx.Node) -> None:
        source = node.args[0]
        if source in self._quantized and isinstance(source, fx.Node):
            shared = SharedQuantizationSpec(source)
            _set(node, {source: shared}, shared)
            self._quantized.add(node)


def is_fused(node: fx.Node) -> bool:
    """Whether an activation only cuts a range that holds zero, as every quantized range does."""
    if not is_call(node, *FUSED_ACTIVATIONS):
        return False
    given = arguments(node)
    low, high = given.get("min", given.get("min_val")), given.get("max", given.get("max_val"))
    return (low is None or low <= 0) and (high is None or high >= 0)


def bias_parameters(observers: list[ObserverOrFakeQuantize]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a bias: input scale × weight scale, 0."""
    (input_scale, _), (weight_scale, _) = (observer.calculate_qparams() for observer in observers)
    scale = (input_scale * weight_scale).to(torch.float32)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _set(
    node: fx.Node, inputs: dict[fx.Node, QuantizationSpecBase | None], output: QuantizationSpecBase | None
) -> None:
    node.meta[ANNOTATION] = QuantizationAnnotation(inputs, output, _annotated=True)
