"""Expands our own operators, translated to one node each so that nothing is folded before, to standard ONNX nodes.

Nodes that decode a weight read initializers only, so ONNX Runtime computes them once, when it loads the file: the file
has the size of the codes, and runs as it would with a float weight.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lobo_fx.exporters.onnx.codes import mark_codes
from lobo_fx.exporters.onnx.placeholders import DOMAIN
from lobo_fx.exporters.onnx.versions import MICROSOFT
from lobo_fx.exporters.onnx.writer import Writer
from lobo_fx.own_operators.formats import FORMATS, Format, unit, unpack
from lobo_fx.own_operators.products import ACCURACY_LEVELS

__all__ = ["expand"]

_OFFSET = 128
"""MatMulNBits subtracts this from 8-bit codes, which it takes as unsigned."""
_BYTES = torch.arange(256, dtype=torch.uint8)


def expand(model: ir.Model) -> None:
    """Replaces our operators by standard ones, and by ONNX Runtime's products of low-bit weights."""
    own = [node for node in model.graph if node.domain == DOMAIN]
    for node in own:
        if node.op_type == "product":
            _block(node)
    for node in own:
        _EXPANSIONS[node.op_type](model.graph, node)
    if own:
        model.opset_imports.pop(DOMAIN)
        model.opset_imports[MICROSOFT] = 1


def _expand_decode(graph: ir.Graph, node: ir.Node) -> None:
    """A weight that is only looked up in is decoded row by row as it is read; any other one once, at load."""
    (weight,) = node.outputs
    shape = list(node.attributes["shape"].as_ints())
    codes, *rest = (value for value in node.inputs if value is not None)
    number, block_size = FORMATS[node.attributes["format"].as_string()], node.attributes["block_size"].as_int()
    mark_codes(codes, number.bits, block_size, *rest[1:])
    readers = [reader for reader, _ in weight.uses()]
    if len(shape) == 2 and not weight.is_graph_output() and all(_looks_up(reader, weight) for reader in readers):
        for reader in readers:
            write, indices = Writer(graph, reader), reader.inputs[1]
            flat = write.reshape(indices, -1)  # type: ignore[arg-type]
            rows = _decoded(write, node, [_rows(write, value, flat) for value in (codes, *rest)])
            sizes = write.op("Concat", write.op("Shape", indices), write.constant(shape[1:]), axis=0)
            write.replace(write.op("Reshape", rows, sizes))
        graph.remove(node, safe=True)
        return
    write = Writer(graph, node)
    rows = _decoded(write, node, [codes, *rest])
    write.replace(rows if len(shape) == 2 else write.reshape(rows, *shape))


def _rows(write: Writer, matrix: ir.Value, indices: ir.Value) -> ir.Value:
    """Rows of a stored matrix, one for each index."""
    found = write.op("Gather", matrix, indices, axis=0)
    found.type, found.shape = matrix.type, ir.Shape([None, *(matrix.shape or ())[1:]])
    return found


def _looks_up(reader: ir.Node, weight: ir.Value) -> bool:
    axis = reader.attributes["axis"].as_int() if "axis" in reader.attributes else 0
    return reader.op_type == "Gather" and axis == 0 and reader.inputs[0] is weight and reader.inputs[1] is not weight


def _decoded(write: Writer, node: ir.Node, stored: Sequence[ir.Value]) -> ir.Value:
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
    values = _values(write, number, codes, columns)
    if zero_points:
        values = write.op("Sub", values, spread(_values(write, number, zero_points[0], blocks)))
    return write.op("Mul", values, spread(scale))


def _values(write: Writer, number: Format, packed: ir.Value, columns: int) -> ir.Value:
    """The values that rows of packed codes stand for.

    Bytes are looked up, not shifted: OpenVINO's shifts of bytes give wrong codes. A table has a line for every byte,
    with the byte's part of each code.
    """
    assert packed.shape is not None
    has_offset = number.name == "int8" and packed.dtype == ir.DataType.UINT8
    sizes: list[int] = [int(size) for size in packed.shape[1:]]  # type: ignore[arg-type]
    stored = math.prod(sizes)
    if len(packed.shape) != 2:
        packed = write.reshape(packed, -1, stored)
    if number.bits == 8 and number.is_integer:
        values = write.op("Cast", packed, to=ir.DataType.FLOAT)
        if has_offset:
            values = write.op("Sub", values, write.constant(_OFFSET, np.float32))
        return values if stored == columns else write.columns(values, columns)
    count, width = unit(number.bits)
    numbers = number.decode(torch.arange(1 << number.bits, dtype=torch.uint8)).nan_to_num().numpy()
    if width == 1:
        lines = unpack(_BYTES[:, None], number.bits, count).int()
        values = _looked_up(write, numbers[lines] if count > 1 else numbers, packed)
    else:
        values = _looked_up(write, numbers, _joined(write, packed, number.bits, stored // width))
    found = stored // width * count
    values = write.reshape(values, -1, found) if count > 1 else values
    return values if found == columns else write.columns(values, columns)


def _joined(write: Writer, packed: ir.Value, bits: int, groups: int) -> ir.Value:
    """Codes that lie in several bytes each, (rows, groups, codes of a group)."""
    count, width = unit(bits)
    grouped = write.reshape(packed, -1, groups, width)
    parts = []
    for place, byte in enumerate(write.ops("Split", grouped, outputs=width, axis=2, num_outputs=width)):
        alone = torch.zeros(256, width, dtype=torch.uint8)
        alone[:, place] = _BYTES
        parts.append(_looked_up(write, unpack(alone, bits, count).numpy(), write.reshape(byte, -1, groups)))
    return functools.reduce(lambda one, other: write.op("BitwiseOr", one, other), parts)


def _looked_up(write: Writer, table: np.ndarray[Any, Any], index: ir.Value) -> ir.Value:
    """Lines of a table."""
    return write.op("Gather", write.constant(table, table.dtype), write.op("Cast", index, to=ir.DataType.INT32))


def _block(node: ir.Node) -> None:
    """Stores the codes of a product as MatMulNBits reads them: rows in whole blocks, int8 with 128 added.

    The initializer itself has that shape, since OpenVINO takes nothing else; a `decode` reads it as it is.
    """
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    number, block_size = FORMATS[node.attributes["format"].as_string()], node.attributes["block_size"].as_int()
    codes = value.const_value.numpy()
    if codes.ndim == 3:  # another product reads them too
        return
    if number.name == "int8":
        codes = codes.view(np.uint8) ^ np.uint8(_OFFSET)
    count, width = unit(number.bits)
    size = block_size // count * width
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % size)))
    blocked = codes.reshape(len(codes), -1, size)
    value.const_value = ir.tensor(blocked, name=value.name)
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(blocked.shape)


def _expand_product(graph: ir.Graph, node: ir.Node) -> None:
    """MatMulNBits, which takes no bias before 1.20: a bias is added by a node, which ONNX Runtime fuses."""
    write = Writer(graph, node)
    x, codes, scale, zero_point, bias = (*node.inputs, None, None)[:5]
    outputs, inputs = node.attributes["shape"].as_ints()
    settings = {
        "N": outputs,
        "K": inputs,
        "bits": FORMATS[node.attributes["format"].as_string()].bits,
        "block_size": node.attributes["block_size"].as_int(),
        "accuracy_level": ACCURACY_LEVELS[node.attributes["compute"].as_string()],
    }
    mark_codes(codes, settings["bits"], settings["block_size"], zero_point)
    stored = [codes, scale] if zero_point is None else [codes, scale, zero_point]
    result = write.op("MatMulNBits", x, *stored, domain=MICROSOFT, **settings)
    write.replace(result if bias is None else write.op("Add", result, bias))


def _expand_dynamic_product(graph: ir.Graph, node: ir.Node) -> None:
    """The form that ONNX Runtime fuses to one product with quantization of its input inside."""
    write = Writer(graph, node)
    x, codes, scale, bias = (*node.inputs, None)[:4]
    steps, step, zero = write.ops("DynamicQuantizeLinear", x, outputs=3)
    sums = write.op("MatMulInteger", steps, write.op("Transpose", codes, perm=[1, 0]), zero)
    scales = write.op("Mul", step, write.reshape(scale, -1))  # type: ignore[arg-type]
    result = write.op("Mul", write.op("Cast", sums, to=ir.DataType.FLOAT), scales)
    write.replace(result if bias is None else write.op("Add", result, bias))


def _expand_dynamic_lstm(graph: ir.Graph, node: ir.Node) -> None:
    """ONNX Runtime's LSTM in integers, whose weights are inputs × outputs with gates in ONNX's order."""
    write = Writer(graph, node)
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
    write = Writer(graph, node)
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
