"""The nodes of an ONNX file: their modules, what they store, and in which numbers they compute."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lobo_fx.exporters.onnx.names import module_of
from lobo_fx.own_operators.products import ACCURACY_LEVELS
from lobo_fx.plugins.file_nodes import FileGraph, FileNode

__all__ = ["file_graph"]

_LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MatMulInteger", "Gather", "LSTM", "GRU", "RNN"}
    | {"DynamicQuantizeLSTM"}
)
"""Operators that may multiply with a stored weight, or look it up."""
_INTEGER = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeLSTM"}
)


def file_graph(path: Path) -> FileGraph:
    """The nodes of a file; weights beside it are not read."""
    graph = ir.load(path).graph
    stored = _stored(graph)
    counted: set[ir.Value] = set()
    nodes = []
    for node in graph:
        new = [value for value in node.inputs if value is not None and value.is_initializer() and value not in counted]
        counted.update(new)
        nodes.append(
            FileNode(
                str(node.name),
                module_of(str(node.name)),
                tuple(str(value.name) for value in node.outputs),
                sum(value.const_value.nbytes for value in new if value.const_value is not None),
                _precision(node, stored),
                _weight(node, stored) is not None,
            )
        )
    return FileGraph(str(graph.name), tuple(nodes))


def _stored(graph: ir.Graph) -> dict[ir.Value, str]:
    """The type of each value that is made of stored tensors alone: that of the largest tensor."""
    found = {
        v: (v.const_value.nbytes, _type(v.const_value.dtype)) for v in graph.initializers.values() if v.const_value
    }
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if sources and all(value in found for value in sources):
            found.update(dict.fromkeys(node.outputs, max(found[value] for value in sources)))
    return {value: name for value, (_, name) in found.items()}


def _type(dtype: ir.DataType | None) -> str:
    return "" if dtype is None else str(dtype.numpy().name)


def _weight(node: ir.Node, stored: dict[ir.Value, str]) -> str | None:
    """The type that a layer's weight is stored in; None for any other node."""
    if node.op_type not in _LAYERS:
        return None
    weights = [stored[value] for value in node.inputs if value is not None and value in stored]
    return weights[0] if weights and any(value not in stored for value in node.inputs if value is not None) else None


def _precision(node: ir.Node, stored: dict[ir.Value, str]) -> str:
    if node.op_type in _INTEGER:
        return "int8"
    weight = _weight(node, stored)
    if node.op_type == "MatMulNBits":
        level = node.attributes["accuracy_level"].as_int() if "accuracy_level" in node.attributes else 0
        return f"{'int8' if level == ACCURACY_LEVELS['int8'] else 'float32'}, int{node.attributes['bits'].as_int()}"
    made = [value.producer() for value in node.inputs if value is not None and value not in stored]
    computed = _type(node.outputs[0].dtype)
    if made and all(source is not None and source.op_type == "DequantizeLinear" for source in made):
        computed = "int8"  # between integers and back, the runtime computes in them
    return computed if weight in (None, "", computed) else f"{computed or 'float32'}, {weight}"
