"""Clean-up of a translated ONNX graph: what ONNX Runtime fuses only in one particular form, and ballast."""

from __future__ import annotations

import onnx_ir as ir


def clean(model: ir.Model) -> None:
    """Rewrites the model in place; its outputs stay the same."""
    fold_weight_transposes(model)
    strip_metadata(model)


def fold_weight_transposes(model: ir.Model) -> None:
    """`Transpose(DequantizeLinear(W))` becomes `DequantizeLinear(Wᵀ)`, the form that integer products take."""
    for node in list(model.graph):
        if node.op_type != "Transpose":
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or len(source.outputs[0].uses()) != 1:
            continue
        weight = source.inputs[0]
        if weight is None or weight.const_value is None or len(weight.uses()) != 1:
            continue
        axes = node.attributes["perm"].as_ints()
        turned = weight.const_value.numpy().transpose(axes).copy()
        weight.const_value = ir.tensor(turned, name=weight.name)
        weight.shape = ir.Shape(turned.shape)
        axis = source.attributes["axis"].as_int() if "axis" in source.attributes else 1
        source.attributes["axis"] = ir.AttrInt64("axis", list(axes).index(axis % turned.ndim))
        source.outputs[0].shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(source.outputs[0])
        model.graph.remove(node, safe=True)


def strip_metadata(model: ir.Model) -> None:
    """Removes the exporter's stack traces and names of Python objects, which can outweigh a small model."""
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for function in model.functions.values():
        function.metadata_props.clear()
        for node in function.all_nodes():
            node.metadata_props.clear()
