"""Cleans up a translated ONNX graph: writes it in the forms that ONNX Runtime fuses, and removes ballast."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lobo_fx.exporters.onnx.lowering import expand
from lobo_fx.exporters.onnx.names import NAMESPACE

__all__ = [
    "clean",
    "fold_weight_transposes",
    "keep_float",
    "list_constants",
    "rename_initializers",
    "share_transposed",
    "shrink_biases",
    "strip_metadata",
]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVED_OVER = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
"""Operators over which ONNX Runtime moves QuantizeLinear and DequantizeLinear."""
_DROPPED = ("Relu", "Clip", "Add")
"""Operators that it drops before QuantizeLinear, and the sum with a bias, which it fuses with the product before."""


def clean(model: ir.Model) -> None:
    """Rewrites the model in place; its outputs stay the same."""
    list_constants(model)
    rename_initializers(model)
    expand(model)
    fold_weight_transposes(model)
    share_transposed(model)
    shrink_biases(model)
    keep_float(model)


def keep_float(model: ir.Model) -> None:
    """Puts a maximum of one tensor, which changes nothing, where ONNX Runtime would quantize a layer by itself.

    Of a layer between DequantizeLinear and QuantizeLinear it quantizes float weights, with one scale for all channels
    (`WeightBiasQuantization`, https://github.com/microsoft/onnxruntime/pull/22969). A layer stays float for a reason.
    """
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        value = node.inputs[0]
        layer = _made_by(value, (*_MOVED_OVER, *_DROPPED))
        if layer is None or layer.op_type not in _LAYERS:
            continue
        before, weight = (None if made is None else _made_by(made, _MOVED_OVER) for made in layer.inputs[:2])
        is_float = weight is None or weight.op_type != "DequantizeLinear"
        if is_float and before is not None and before.op_type == "DequantizeLinear":
            copied = ir.node("Max", [value])
            copied.outputs[0].name = f"{value.name}_float"
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            model.graph.insert_before(node, copied)
            node.replace_input_with(0, copied.outputs[0])


def _made_by(value: ir.Value, through: Sequence[str]) -> ir.Node | None:
    """The operator that a value comes from, behind others that it may have come through; None for an input."""
    node = value.producer()
    while node is not None and node.op_type in through:
        given = [operand for operand in node.inputs if operand is not None and operand.const_value is None]
        node = given[0].producer() if len(given) == 1 else None
    return node


def list_constants(model: ir.Model) -> None:
    """Registers the constants that `torch.onnx` made when it fused clamps, but did not register."""
    known = {*model.graph.inputs, *model.graph.initializers.values()}
    for value in [value for node in model.graph for value in node.inputs if value is not None]:
        if value.producer() is None and value.const_value is not None and value not in known:
            model.graph.register_initializer(value)
            known.add(value)


def rename_initializers(model: ir.Model) -> None:
    """Renames parameters that have the name of an output, as `torch.onnx` does for those of an input."""
    outputs = {value.name for value in model.graph.outputs} - {None}
    for value in [value for value in model.graph.initializers.values() if value.name in outputs]:
        if not value.is_graph_output():
            made = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
            taken = {*outputs, *model.graph.initializers, *(output.name for output in made)}
            value.name = next(name for at in itertools.count(1) if (name := f"{value.name}_{at}") not in taken)


def fold_weight_transposes(model: ir.Model) -> None:
    """`Transpose(DequantizeLinear(W))` becomes `DequantizeLinear(Wᵀ)`, the form that integer products take."""
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or not _only_read_here(source.outputs[0]):
            continue
        weight = source.inputs[0]
        if weight is None or weight.const_value is None:
            continue
        rank = weight.const_value.numpy().ndim
        axes = node.attributes["perm"].as_ints() if "perm" in node.attributes else list(reversed(range(rank)))
        turned = weight.const_value.numpy().transpose(axes).copy()
        if not _only_read_here(weight):  # a tied weight; it is shared again afterwards
            weight = ir.Value(name=f"{source.outputs[0].name}_transposed", type=weight.type)
            model.graph.initializers[str(weight.name)] = weight
            source.replace_input_with(0, weight)
        weight.const_value = ir.tensor(turned, name=weight.name)
        weight.shape = ir.Shape(turned.shape)
        axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
        source.attributes["axis"] = ir.AttrInt64("axis", list(axes).index(axis % turned.ndim))
        source.outputs[0].shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(source.outputs[0])
        model.graph.remove(node, safe=True)


def share_transposed(model: ir.Model) -> None:
    """A matrix that is stored twice, once transposed (a tied embedding), is stored once and transposed at load."""
    matrices: dict[tuple[int, ...], list[tuple[ir.Value, Any]]] = {}
    for name, value in list(model.graph.initializers.items()):
        array = value.const_value.numpy() if value.const_value is not None else np.empty(0)
        if array.ndim != 2 or min(array.shape) < 2 or value.is_graph_output():
            continue
        for twin, other in matrices.get(array.shape[::-1], []):
            if array.dtype == other.dtype and np.array_equal(array, other.T):
                turned = ir.node("Transpose", [twin], {"perm": [1, 0]})
                turned.outputs[0].type, turned.outputs[0].shape = value.type, value.shape
                value.replace_all_uses_with(turned.outputs[0])
                model.graph.insert_before(model.graph[0], turned)
                del model.graph.initializers[name]
                break
        else:
            matrices.setdefault(array.shape, []).append((value, array))


def shrink_biases(model: ir.Model) -> None:
    """Drops zero points of integer biases, and lets their scales, input × weight, be multiplied at load."""
    for node in model.graph:
        bias = node.inputs[0].const_value if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if bias is None or bias.dtype != ir.DataType.INT32:
            continue
        if len(node.inputs) == 3 and (zero := node.inputs[2]) is not None and not _any(zero):
            node.resize_inputs(2)
            if not zero.uses():
                del model.graph.initializers[str(zero.name)]
        scale = node.inputs[1]
        factors = [
            source.inputs[1]
            for reader, _ in node.outputs[0].uses()
            for source in (value.producer() for value in reader.inputs[:2] if value is not None)
            if source is not None and source.op_type == "DequantizeLinear"
        ]
        values = [value.const_value.numpy() for value in (scale, *factors) if value is not None and value.const_value]
        if len(values) == len(factors) + 1 == 3 and np.array_equal(values[1] * values[2], values[0]):
            assert scale is not None
            product = ir.node("Mul", factors)
            product.outputs[0].type, product.outputs[0].shape = scale.type, scale.shape
            model.graph.insert_before(node, product)
            node.replace_input_with(1, product.outputs[0])
            if not scale.uses():
                del model.graph.initializers[str(scale.name)]


def _any(value: ir.Value) -> bool:
    """Whether anything but zeros may be in a value."""
    return value.const_value is None or bool(value.const_value.numpy().any())


def _only_read_here(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def strip_metadata(model: ir.Model) -> None:
    """Removes stack traces, names of Python objects and types said twice, which can outweigh a small model.

    Of nodes, the entries that `lobo_fx.exporters.onnx.names` wrote stay.
    """
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for value in model.graph.initializers.values():
        if not (value.is_graph_input() or value.is_graph_output()):
            value.type = value.shape = None  # its tensor says both
    for node in model.graph.all_nodes():
        for key in node.metadata_props.keys() - {NAMESPACE}:
            del node.metadata_props[key]
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for function in model.functions.values():
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.metadata_props.clear()
