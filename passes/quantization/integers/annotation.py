"""Where observers go, so that ONNX Runtime's CPU kernels run the result as integers.

Formats: 8-bit activations (asymmetric, per tensor), int8 weights (symmetric, per output channel), int32
biases whose scale is input scale × weight scale. A float bias would keep ONNX Runtime from fusing.

Regions: (1) a convolution quantizes its input, and its output where the activation after it ends;
(2) a linear layer quantizes its input and gives float, since what follows it mostly is float;
(3) sums, products, concatenations, averages, sigmoid and leaky ReLU of quantized values stay quantized;
(4) maxima, resizes to the nearest, and reshapes hand a quantized value on. Which operators take part is decided
before (`lobo_fx.passes.quantization.integers.regions`), or all do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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

from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import CONVOLUTIONS, INTEGERS_PASS, Layer, arguments, aten, is_call, layer_of
from lobo_fx.passes.quantization.integers.kernels import ACTIVATIONS, POOLS
from lobo_fx.passes.quantization.integers.targets import TARGETS, Target

ANNOTATION = "quantization_annotation"

# A runtime folds these into the operator before them: they only cut the range that is quantized.
FUSED_ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default})
_DEQUANTIZE = frozenset(
    {
        torch.ops.quantized_decomposed.dequantize_per_channel.default,
        torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    }
)

_SINGLE = frozenset({aten.adaptive_avg_pool2d.default, *POOLS, *ACTIVATIONS})
_JOINS = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.matmul.default, aten.bmm.default})


@dataclasses.dataclass(frozen=True)
class Observers:
    """Constructors of observers (or fake quantizers), one for each kind of tensor."""

    activation: Any
    weight: Any


class OnnxRuntimeQuantizer(Quantizer):
    """Annotates a graph for ONNX Runtime's CPU kernels.

    Args:
        observers: what watches the ranges.
        target: integers that the CPU multiplies fast.
        chosen: names of the operators that run as integers; None takes all that can.
        overrides: by node name, other observers, or None for an operator that stays float.
    """

    def __init__(
        self,
        observers: Observers,
        target: Target = TARGETS["x86-vnni"],
        chosen: frozenset[str] | None = None,
        overrides: Mapping[str, Observers | None] | None = None,
    ) -> None:
        self.observers, self.target, self.chosen = observers, target, chosen
        self.overrides = overrides or {}
        self.skipped: list[tuple[fx.Node, str]] = []
        self._quantized: set[fx.Node] = set()

    def activation(self, node: fx.Node) -> QuantizationSpec:
        """8-bit, asymmetric, one scale for the tensor."""
        dtype, low, high = self.target.activation
        observers = self.overrides.get(node.name) or self.observers
        return QuantizationSpec(dtype, observers.activation, low, high, torch.per_tensor_affine)

    def weight(self, node: fx.Node, channel_axis: int) -> QuantizationSpec:
        """int8, symmetric, one scale per output channel."""
        limit, observers = self.target.weight, self.overrides.get(node.name) or self.observers
        scheme = torch.per_channel_symmetric
        return QuantizationSpec(torch.int8, observers.weight, -limit, limit, scheme, ch_axis=channel_axis)

    def choices(self, graph: fx.Graph) -> list[fx.Node]:
        """The operators that can run as integers."""
        return [node for node in graph.nodes if self._can(node)]

    def passes_on(self, node: fx.Node) -> bool:
        """Whether an operator hands quantized values on."""
        return is_call(node, *INTEGERS_PASS) or is_fused(node)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Marks every operator that was chosen."""
        for node in model.graph.nodes:
            node.meta.pop(ANNOTATION, None)  # of an earlier quantization
        for node in model.graph.nodes:
            if is_call(node, *INTEGERS_PASS):
                self._annotate_preserving(node)
            elif node.op == "call_function" and (self.chosen is None or node.name in self.chosen) and self._can(node):
                if (layer := layer_of(node)) is not None:
                    self._annotate_layer(node, layer)
                elif self.chosen is not None or all(n in self._quantized for n in node.all_input_nodes):
                    self._annotate_join(node)
        return model

    def _can(self, node: fx.Node) -> bool:
        """Whether an operator has integer kernels for its inputs; a layer that has not is noted with the reason."""
        if node.op != "call_function" or self.overrides.get(node.name, self.observers) is None:
            return False
        if (layer := layer_of(node)) is not None:
            return self._takes(node, layer)
        sources = node.all_input_nodes
        if node.target in _JOINS:
            alone = len(sources) < 2 or any(weight_node(source) is not None for source in sources)
            return not alone and all(source.meta["val"].dtype == torch.float32 for source in sources)
        return is_call(node, *_SINGLE) and sources[0].meta["val"].dtype == torch.float32

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to add: what has no integer kernel was not annotated."""

    def _takes(self, node: fx.Node, layer: Layer) -> bool:
        """Whether there is something to quantize; if not, the reason is kept."""
        dtype = layer.input.meta["val"].dtype
        if layer.weight.target in _DEQUANTIZE:
            return False
        if weight_node(layer.weight) is None:
            self._skip(node, "its weight is computed, not a parameter")
            return False
        if dtype != torch.float32:
            self._skip(node, f"its input is {str(dtype).removeprefix('torch.')}, not float32")
            return False
        return True

    def _skip(self, node: fx.Node, reason: str) -> None:
        if (node, reason) not in self.skipped:
            self.skipped.append((node, reason))

    def _annotate_layer(self, node: fx.Node, layer: Layer) -> None:
        specs: dict[fx.Node, QuantizationSpecBase | None] = {
            layer.input: self.activation(node),
            layer.weight: self.weight(node, layer.channel_axis),
        }
        convolves = node.target in CONVOLUTIONS
        # only convolutions and the two-dimensional product have a kernel that adds an integer bias
        bias = layer.bias if convolves or layer.input.meta["val"].dim() == 2 else None
        if bias is not None and weight_node(bias) is not None and len(bias.users) == 1:
            specs[bias] = DerivedQuantizationSpec(
                derived_from=[(layer.input, node), (layer.weight, node)],
                derive_qparams_fn=bias_parameters,
                dtype=torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        _set(node, specs, None)
        if convolves:
            self._quantize_output(node)

    def _quantize_output(self, node: fx.Node) -> None:
        """Quantizes what leaves the operator, after the activation that is fused into it."""
        last, users = node, list(node.users)
        if len(users) == 1 and is_fused(users[0]) and users[0].args[0] is node:
            last = users[0]
        elif node in self._quantized:
            return
        annotation = last.meta.get(ANNOTATION) or QuantizationAnnotation(_annotated=True)
        annotation.output_qspec = self.activation(node)
        last.meta[ANNOTATION] = annotation
        self._quantized.add(last)

    def _annotate_join(self, node: fx.Node) -> None:
        """A sum, product, concatenation, average or activation: quantized in and out."""
        _set(node, dict.fromkeys(node.all_input_nodes, self.activation(node)), None)
        self._quantize_output(node)

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
