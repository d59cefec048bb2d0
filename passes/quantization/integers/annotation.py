"""Annotates where observers go, so that a runtime's integer kernels compute the operators that were placed.

Formats: 8-bit activations (asymmetric, per tensor), int8 weights (symmetric, per output channel), int32
biases whose scale is input scale × weight scale. A float bias would keep ONNX Runtime from fusing.

Regions: (1) a convolution quantizes its input, and its output where the activation after it ends;
(2) a linear layer quantizes its input and gives float, since the next operator mostly is float, unless that is an
activation which the runtime would merge into the float product;
(3) sums, products, concatenations, averages, sigmoid and leaky ReLU quantize their inputs and outputs;
(4) maxima, resizes to the nearest, and reshapes hand a quantized value on. Which operators take part was decided
before: `lobo_fx.passes.quantization.integers.placement`.

A value that an earlier pass has quantized for the same kind of integers keeps its scale and zero point, whatever the
settings say: another pair would round it once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from lobo_fx.graph.layers import Layer, layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import is_call
from lobo_fx.passes.quantization.integers.kernels import kernel_table
from lobo_fx.passes.quantization.integers.observers import observers
from lobo_fx.passes.quantization.integers.placement import Placement

__all__ = ["Annotator", "bias_parameters"]

_ANNOTATION = "quantization_annotation"
"""The key of torchao's annotations in a node's `meta`."""


class Annotator(Quantizer):
    """Carries a placement out: annotates a graph for torchao, which then inserts the observers.

    Args:
        placement: which operators run as integers.
        training: whether fake quantizers stand in for observers.
    """

    def __init__(self, placement: Placement, training: bool = False) -> None:
        self.placement, self.training = placement, training
        self.table = kernel_table(placement.runtime)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotates every operator that was placed, and the operators that hand integers on."""
        for node in model.graph.nodes:
            node.meta.pop(_ANNOTATION, None)  # of an earlier quantization
        quantized: set[fx.Node] = set()  # whose values are integers
        for node in model.graph.nodes:
            if self.table.passes(node) and node.args[0] in quantized:
                shared = SharedQuantizationSpec(node.args[0])
                _annotate(node, {node.args[0]: shared}, shared)
                quantized.add(node)
            elif node.name in self.placement.integer:
                _annotate(node, self._inputs(node), None)
                if self.table.gives_integers(node):
                    end = self.table.end(node)
                    self._annotate_output(end, self._activation(node, end))
                    quantized.add(end)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Checks nothing: an operator without an integer kernel is never placed."""

    def _inputs(self, node: fx.Node) -> dict[fx.Node, QuantizationSpecBase | None]:
        layer = layer_of(node)
        if layer is None:
            return {source: self._activation(node, source) for source in node.all_input_nodes}
        found: dict[fx.Node, QuantizationSpecBase | None] = {
            layer.input: self._activation(node, layer.input),
            layer.weight: self._weight(layer),
        }
        # only convolutions and the two-dimensional product have a kernel that adds an integer bias
        if layer.bias is not None and (layer.kind.convolves or layer.input.meta["val"].dim() == 2):
            read = weight_node(layer.bias)
            if read is not None and len(read.users) == 1:
                found[layer.bias] = _bias(layer)
        return found

    def _activation(self, node: fx.Node, value: fx.Node) -> QuantizationSpecBase:
        """8-bit, asymmetric, one scale for the tensor: of a value that an operator reads or gives."""
        dtype, low, high = self.placement.target.activation
        for scale, zero_point, *codes in self._quantized_before(value):
            if codes == [low, high, dtype]:
                return FixedQParamsQuantizationSpec(dtype, scale, zero_point, low, high, torch.per_tensor_affine)
        watching = observers(self.placement.integer[node.name], self.training).activation
        return QuantizationSpec(dtype, watching, low, high, torch.per_tensor_affine)

    def _quantized_before(self, value: fx.Node) -> Iterator[tuple[Any, ...]]:
        """How an earlier pass quantizes a value, where it comes from or where it is read: scale, zero point, codes."""
        while self.table.passes(value):
            value = value.all_input_nodes[0]
        codes = torch.ops.quantized_decomposed
        if is_call(value, codes.dequantize_per_tensor.default):
            yield value.args[1:6]
        readers = deque(value.users)
        while readers:
            reader = readers.popleft()
            if is_call(reader, codes.quantize_per_tensor.default):
                yield reader.args[1:6]
            elif self.table.passes(reader):
                readers.extend(reader.users)

    def _weight(self, layer: Layer) -> QuantizationSpec:
        """int8, symmetric, one scale per output channel of the weight as the layer reads it."""
        limit = self.placement.target.weight
        watching = observers(self.placement.integer[layer.node.name], self.training).weight
        axis = layer.kind.output_dim
        return QuantizationSpec(torch.int8, watching, -limit, limit, torch.per_channel_symmetric, ch_axis=axis)

    def _annotate_output(self, node: fx.Node, spec: QuantizationSpecBase) -> None:
        annotation = node.meta.get(_ANNOTATION) or QuantizationAnnotation(_annotated=True)
        annotation.output_qspec = spec
        node.meta[_ANNOTATION] = annotation


def _bias(layer: Layer) -> DerivedQuantizationSpec:
    """int32, at the scale of the sums that it is added to."""
    return DerivedQuantizationSpec(
        derived_from=[(layer.input, layer.node), (layer.weight, layer.node)],
        derive_qparams_fn=bias_parameters,
        dtype=torch.int32,
        quant_min=-(2**31),
        quant_max=2**31 - 1,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def bias_parameters(observed: list[ObserverOrFakeQuantize]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a bias: input scale × weight scale, 0."""
    (input_scale, _), (weight_scale, _) = (observer.calculate_qparams() for observer in observed)
    scale = (input_scale * weight_scale).to(torch.float32)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _annotate(
    node: fx.Node, inputs: dict[fx.Node, QuantizationSpecBase | None], output: QuantizationSpecBase | None
) -> None:
    node.meta[_ANNOTATION] = QuantizationAnnotation(inputs, output, _annotated=True)
