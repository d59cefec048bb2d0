"""Our own operators as ONNX: first one node each, so that nothing is folded while translating; then standard nodes.

Everything that decodes a weight reads initializers only, so ONNX Runtime computes it once, when it loads the file:
the file has the size of the codes, and what runs is what runs for a float weight.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lobo_fx.exporters.onnx.placeholders import DOMAIN
from lobo_fx.own_operators.formats import FORMATS, Format, unit

__all__ = ["MICROSOFT", "expand"]

MICROSOFT = "com.microsoft"
_FLOAT_ACTIVATIONS, _INT8_ACTIVATIONS = 1, 4
"""Accuracy levels of MatMulNBits; at its default ONNX Runtime is free to choose."""


def expand(model: ir.Model) -> None:
    """Replaces our operators by standard ones, and by ONNX Runtime's products of low-bit weights."""
    own = [node for node in model.graph if node.domain == DOMAIN]
    for node in own:
        _EXPANSIONS[node.op_type](model.graph, node)
    if own:
        model.opset_imports.pop(DOMAIN)
        model.opset_imports[MICROSOFT] = 1


class _Writer:
    """Writes nodes and constants in the place of a node, and puts their results into its stead."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The output of a new node."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        self.graph.insert_before(self.node, node)
        return node.outputs

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer; one of the same values is used again."""
        array = np.asarray(values, dtype)
        name = f"{DOMAIN}_{array.dtype}_{array.shape}_{zlib.crc32(array.tobytes())}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(shape))

    def columns(self, value: ir.Value, count: int) -> ir.Value:
        """The first columns of a matrix."""
        return self.op("Slice", value, self.constant([0]), self.constant([count]), self.constant([1]))

    def replace(self, *results: ir.Value) -> None:
        for old, result in zip(self.node.outputs, results, strict=True):
            result.type, result.shape = old.type, old.shape
            old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        for old, result in zip(self.node.outputs, results, strict=True):
            result.name, old.name = old.name, None


def _expand_decode(graph: ir.Graph, node: ir.Node) -> None:
    """A weight that is only looked up in is decoded row by row as it is read; any other one once, at load."""
    (weight,) = node.outputs
    shape = list(node.attributes["shape"].as_ints())
    codes, *rest = (value for value in node.inputs if value is not None)
    readers = [reader for reader, _ in weight.uses()]
    if len(shape) == 2 and not weight.is_graph_output() and all(_looks_up(reader, weight) for reader in readers):
        for reader in readers:
            write, indices = _Writer(graph, reader), reader.inputs[1]
            flat = write.reshape(indices, -1)  # type: ignore[arg-type]
            rows = _decoded(write, node, [write.op("Gather", value, flat, axis=0) for value in (codes, *rest)])
            sizes = write.op("Concat", write.op("Shape", indices), write.constant(shape[1:]), axis=0)
            write.replace(write.op("Reshape", rows, sizes))
        graph.remove(node, safe=True)
        return
    write = _Writer(graph, node)
    if len(shape) != 2 and len(codes.shape or ()) != 2:
        codes = write.reshape(codes, shape[0], -1)
    rows = _decoded(write, node, [codes, *rest])
    write.replace(rows if len(shape) == 2 else write.reshape(rows, *shape))


def _looks_up(reader: ir.Node, weight: ir.Value) -> bool:
    axis = reader.attributes["axis"].as_int() if "axis" in reader.attributes else 0
    return reader.op_type == "Gather" and axis == 0 and reader.inputs[0] is weight and reader.inputs[1] is not weight


def _decoded(write: _Writer, node: ir.Node, stored: Sequence[ir.Value]) -> ir.Value:
    """Rows of floats from rows of codes, scales and, where stored, zero points."""
    number = FORMATS[node.attributes["format"].as_string()]
    columns = math.prod(node.attributes["shape"].as_ints()[1:])
    block_size = node.attributes["block_size"].as_int()
    blocks = -(-columns // block_size)

    def spread(per_block: ir.Value) -> ir.Value:
        if blocks == 1:
            return per_block
        single = write.op("Unsqueeze", per_block, write.constant([2]))
        spread = write.reshape(write.op("Expand", single, write.constant([1, 1, block_size])), -1, blocks * block_size)
        return spread if columns % block_size == 0 else write.columns(spread, columns)

    codes, scale, *zero_points = stored
    values = _values(write, number, _unpacked(write, codes, number.bits, columns))
    if zero_points:
        zeros = _values(write, number, _unpacked(write, zero_points[0], number.bits, blocks))
        values = write.op("Sub", values, spread(zeros))
    return write.op("Mul", values, spread(scale))


def _values(write: _Writer, number: Format, codes: ir.Value) -> ir.Value:
    """What the codes stand for."""
    if not number.is_integer:
        index = write.op("Cast", codes, to=ir.DataType.INT32)
        return write.op("Gather", write.constant(number.table.nan_to_num().numpy(), np.float32), index)
    values = write.op("Cast", codes, to=ir.DataType.FLOAT)
    return write.op("Sub", values, write.constant(number.zero_point, np.float32)) if number.zero_point else values


def _unpacked(write: _Writer, packed: ir.Value, bits: int, columns: int) -> ir.Value:
    """One byte a code; the inverse of `formats.pack`."""
    if bits == 8:
        return packed
    count, width = unit(bits)
    groups = -(-columns // count)
    grouped = write.reshape(packed, -1, groups, width)
    parts = [grouped] if width == 1 else write.ops("Split", grouped, outputs=width, axis=2, num_outputs=width)
    mask = write.constant((1 << bits) - 1, np.uint8)

    def shifted(value: ir.Value, by: int, direction: str) -> ir.Value:
        return write.op("BitShift", value, write.constant(by, np.uint8), direction=direction) if by else value

    codes = []
    for byte, offset in (divmod(index * bits, 8) for index in range(count)):
        code = shifted(parts[byte], offset, "RIGHT")
        if offset + bits > 8:
            code = write.op("BitwiseOr", code, shifted(parts[byte + 1], 8 - offset, "LEFT"))
        codes.append(write.op("BitwiseAnd", code, mask))
    flat = write.reshape(write.op("Concat", *codes, axis=2), -1, groups * count)
    return flat if groups * count == columns else write.columns(flat, columns)


def _expand_product(graph: ir.Graph, node: ir.Node) -> None:
    """MatMulNBits, which takes rows in whole blocks and int8 with 128 added."""
    write = _Writer(graph, node)
    x, codes, scale, zero_point, bias = (*node.inputs, None, None)[:5]
    number = FORMATS[node.attributes["format"].as_string()]
    outputs, inputs = node.attributes["shape"].as_ints()
    block_size = node.attributes["block_size"].as_int()
    if number.name == "int8":
        offset = write.constant(128, np.uint8)
        codes = write.op("BitwiseXor", write.op("Cast", codes, to=ir.DataType.UINT8), offset)
    count, width = unit(number.bits)
    missing = (-inputs % block_size - -inputs % count) // count * width
    if missing:
        codes = write.op("Pad", codes, write.constant([0, 0, 0, missing]))
    stored = [
        write.reshape(codes, outputs, -1, block_size // count * width),  # type: ignore[arg-type]
        write.reshape(scale, -1),  # type: ignore[arg-type]
        zero_point and write.reshape(zero_point, -1),
    ]
    integer = node.attributes["compute"].as_string() == "int8"
    write.replace(
        write.op(
            "MatMulNBits",
            x,
            *stored,
            None,
            bias,
            domain=MICROSOFT,
            N=outputs,
            K=inputs,
            bits=number.bits,
            block_size=block_size,
            accuracy_level=_INT8_ACTIVATIONS if integer else _FLOAT_ACTIVATIONS,
        )
    )


def _expand_dynamic_product(graph: ir.Graph, node: ir.Node) -> None:
    """The form that ONNX Runtime fuses to one product with quantization of its input inside."""
    write = _Writer(graph, node)
    x, codes, scale, bias = (*node.inputs, None)[:4]
    steps, step, zero = write.ops("DynamicQuantizeLinear", x, outputs=3)
    sums = write.op("MatMulInteger", steps, write.op("Transpose", codes, perm=[1, 0]), zero)
    scales = write.op("Mul", step, write.reshape(scale, -1))  # type: ignore[arg-type]
    result = write.op("Mul", write.op("Cast", sums, to=ir.DataType.FLOAT), scales)
    write.replace(result if bias is None else write.op("Add", result, bias))


def _expand_dynamic_lstm(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime's LSTM in integers, whose weights are inputs × outputs with gates in ONNX's order."""
    write = _Writer(graph, node)
    x, hidden, cell, *params = node.inputs
    directions = node.attributes["directions"].as_int()
    count, size = len(params) // directions, int(params[2].shape[1])  # type: ignore[union-attr, index, arg-type]

    def stacked(index: int) -> ir.Value:
        """A parameter of all directions, gates i, f, g, o as i, o, f, g."""
        every = []
        for value in params[index::count]:
            i, f, g, o = write.ops("Split", value, outputs=4, axis=0, num_outputs=4)
            every.append(write.op("Unsqueeze", write.op("Concat", i, o, f, g, axis=0), write.constant([0])))
        return every[0] if directions == 1 else write.op("Concat", *every, axis=0)

    codes, states = (write.op("Transpose", stacked(index), perm=[0, 2, 1]) for index in (0, 2))
    scale, state_scale = (write.reshape(stacked(index), directions, -1) for index in (1, 3))
    bias = write.op("Concat", stacked(4), stacked(5), axis=1) if count == 6 else None
    zero = write.constant(np.zeros((directions, 4 * size)), np.int8)
    inputs = [x, codes, states, bias, None, hidden, cell, None, scale, zero, state_scale, zero]
    settings = {"hidden_size": size, "direction": "bidirectional" if directions == 2 else "forward"}
    every, *finals = write.ops("DynamicQuantizeLSTM", *inputs, outputs=3, domain=MICROSOFT, **settings)
    if directions == 1:
        rows = write.op("Squeeze", every, write.constant([1]))
    else:
        rows = write.reshape(write.op("Transpose", every, perm=[0, 2, 1, 3]), 0, 0, 2 * size)
    write.replace(rows, *finals)


def _expand_attention(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime's fused kernel."""
    write = _Writer(graph, node)
    query, key, value, bias = (*node.inputs, None)[:4]
    settings = {"num_heads": node.attributes["heads"].as_int(), "scale": node.attributes["scale"].as_float()}
    if node.attributes["is_causal"].as_int():
        settings["unidirectional"] = 1
    masked = [] if bias is None else [None, None, bias]  # no bias of the projections, no padding
    write.replace(write.op("MultiHeadAttention", query, key, value, *masked, domain=MICROSOFT, **settings))


_EXPANSIONS: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "decode": _expand_decode,
    "product": _expand_product,
    "dynamic_product": _expand_dynamic_product,
    "dynamic_lstm": _expand_dynamic_lstm,
    "attention": _expand_attention,
}
