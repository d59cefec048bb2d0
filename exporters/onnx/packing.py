"""Packed storage: a bit for each weight says whether it is stored, and the weights that are not zero follow each other.

Standard operators that read initializers only put the weights back in place, so ONNX Runtime computes them once, when
it loads the file: then the same bits run as in a file that is not packed. The operators are chosen for their speed: 25
million weights take a third of a second. `NonZero` is no choice, since the size of its output is not known before it
runs, and ONNX Runtime then folds nothing.

Source: Han et al., "EIE: Efficient Inference Engine on Compressed Deep Neural Network", 2016, stores what is not zero
apart from where it stands; bit masks in place of distances: Parashar et al., "SCNN", 2017.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lobo_fx.exporters.onnx.codes import Codes, codes_of
from lobo_fx.exporters.onnx.writer import Writer
from lobo_fx.own_operators.formats import unit

__all__ = ["MOST_WEIGHTS", "NARROW_TYPES", "SHARED_BYTES", "PackedWeight", "pack"]

NARROW_TYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""The types that floats may be stored as."""
MOST_WEIGHTS = 2**28
"""Most weights of a tensor: their places take 1 GiB, and ONNX Runtime folds no more at once."""

_OPSET = 14
"""The first opset that defines all operators as they are used here."""
SHARED_BYTES = 3600
"""Least bytes of what all masks of a file share: the table of bits and other constants."""
_MASK_BYTES, _CAST_BYTES = 700, 150
"""Least bytes of the nodes of a mask, and of those of a narrower type."""
_BITS = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(np.int8)


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """How a weight is stored.

    Attributes:
        name: name of the weight in the file.
        form: `mask`, `float16` or `bfloat16`, or `mask, float16`.
        dense_bytes: bytes that it took before.
        bytes: bytes that it takes now, its own nodes included.
    """

    name: str
    form: str
    dense_bytes: int
    bytes: int

    @property
    def is_masked(self) -> bool:
        return self.form.startswith("mask")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one initializer would be stored best.

    Attributes:
        value: the initializer.
        narrow: the type its floats are stored as; empty for their own.
        filler: the value that a mask leaves out; None for no mask.
        relative: whether codes are stored as distances from their zero points.
        bytes: bytes that it takes in this form.
    """

    value: ir.Value
    narrow: str
    filler: int | None
    relative: bool
    bytes: int

    @property
    def form(self) -> str:
        return ", ".join(["mask"] * (self.filler is not None) + [self.narrow] * bool(self.narrow))


def pack(model: ir.Model, values: str | None = None) -> list[PackedWeight]:
    """Stores each weight in the form that takes the fewest bytes; the decoded bits are the same.

    Args:
        model: changed in place.
        values: a type of `NARROW_TYPES`, taken for weights that it holds exactly.

    Returns:
        The weights that are stored otherwise than before.
    """
    needed = {codes_of(value).zero_point for value in model.graph.initializers.values()}
    weights = [v for v in model.graph.initializers.values() if v not in needed and _can_be_packed(v)]
    plans, masked = ([_best(value, values, masks) for value in weights] for masks in (False, True))
    if sum(plan.bytes for plan in masked) + SHARED_BYTES < sum(plan.bytes for plan in plans):
        plans = masked
    plans = [plan for plan in plans if plan.form]
    packed = [PackedWeight(str(p.value.name), p.form, _dense(p.value).nbytes, p.bytes) for p in plans]
    if plans:
        write = Writer(model.graph, model.graph[0])
        for plan in plans:
            _store(write, plan)
        model.opset_imports[""] = max(model.opset_imports[""], _OPSET)
    return packed


def _can_be_packed(value: ir.Value) -> bool:
    types = (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8)
    held = value.const_value
    stays = value.is_graph_input() or value.is_graph_output() or not value.uses()
    if held is None or held.dtype not in types or stays:
        return False
    return 0 < held.size * 8 // codes_of(value).bits <= MOST_WEIGHTS


def _dense(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


def _best(value: ir.Value, values: str | None, masks: bool) -> _Plan:
    """The form of fewest bytes."""
    dense, codes = _dense(value), codes_of(value)
    narrow = values if values and _holds(NARROW_TYPES[values], dense) else ""
    size = np.dtype(NARROW_TYPES[narrow]).itemsize if narrow else dense.itemsize
    plans = [_Plan(value, "", None, False, dense.nbytes)]
    if narrow:
        plans.append(_Plan(value, narrow, None, False, dense.size * size + _CAST_BYTES))
    for relative in [False, True][: 1 + _has_zero_points(dense, codes)] if masks else []:
        stream = _stream(dense, codes, relative)
        filler = 0 if relative or dense.dtype.kind == "f" else int(np.bincount(stream.view(np.uint8)).argmax())
        stored = int(np.count_nonzero(_bits(stream) != filler)) + 1
        bits = 8 * size if codes.bits == 8 else codes.bits
        needed = -(-stored * bits // 8) + -(-stream.size // 8) + _MASK_BYTES * (1 + (codes.bits < 8) + relative)
        plans.append(_Plan(value, narrow, filler, relative, needed + _CAST_BYTES * bool(narrow)))
    return min(plans, key=lambda plan: plan.bytes)


def _holds(narrow: Any, dense: np.ndarray[Any, Any]) -> bool:
    """Whether a narrower type holds every bit of floats."""
    if dense.dtype != np.float32:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array_equal(_bits(dense.astype(narrow).astype(np.float32)), _bits(dense))


def _bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of an array as integers, among which a negative zero is no zero."""
    return array.view(np.uint32 if array.dtype == np.float32 else np.uint8)


def _has_zero_points(dense: np.ndarray[Any, Any], codes: Codes) -> bool:
    """Whether codes lie in whole blocks that have a stored zero point each."""
    if codes.zero_point is None or codes.zero_point.const_value is None:
        return False
    count, width = unit(codes.bits)
    columns = dense[0].size // width * count
    stored = _dense(codes.zero_point).size // len(dense) // width * count
    blocks = columns // codes.block_size
    return columns % codes.block_size == 0 and codes.block_size % count == 0 and blocks <= stored < blocks + count


def _stream(dense: np.ndarray[Any, Any], codes: Codes, relative: bool) -> np.ndarray[Any, Any]:
    """The entries of a mask: weights as they lie, or codes of fewer bits, first all that are first in their groups."""
    if codes.bits == 8:
        return dense.reshape(-1)
    planes = _planes(dense, codes.bits)
    if relative:
        assert codes.zero_point is not None
        zeros = _planes(_dense(codes.zero_point), codes.bits).T.reshape(len(dense), -1)
        blocks = planes.size // len(dense) // codes.block_size
        spread = planes.reshape(len(planes), len(dense) * blocks, -1) - zeros[:, :blocks].reshape(-1, 1)
        planes = spread % (1 << codes.bits)
    return planes.astype(np.uint8).reshape(-1)


def _planes(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Codes from a stream of bits, (places in a group, groups)."""
    count, width = unit(bits)
    words = (packed.reshape(-1, width).astype(np.int32) << 8 * np.arange(width)).sum(1)
    codes: np.ndarray[Any, Any] = words >> bits * np.arange(count)[:, None] & (1 << bits) - 1
    return codes


def _grouped(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Bytes of codes, (bytes of a group, groups), that `_regrouped` takes apart into (places in a group, groups)."""
    count, width = unit(bits)
    planes = np.pad(codes, (0, -len(codes) % count)).reshape(count, -1).astype(np.int32)
    words = (planes << bits * np.arange(count)[:, None]).sum(0)
    grouped: np.ndarray[Any, Any] = words >> 8 * np.arange(width)[:, None] & 255
    return grouped.astype(np.uint8)


def _store(write: Writer, plan: _Plan) -> None:
    """Replaces an initializer by packed tensors and the nodes that decode them."""
    dense, codes, name = _dense(plan.value), codes_of(plan.value), str(plan.value.name)

    def initializer(what: str, array: np.ndarray[Any, Any]) -> ir.Value:
        taken = write.graph.initializers
        free = next(free for at in range(len(taken) + 1) if (free := f"{name}_{what}{at or ''}") not in taken)
        made = ir.Value(name=free, const_value=ir.tensor(array, name=free))
        write.graph.register_initializer(made)
        return made

    def widened(array: np.ndarray[Any, Any]) -> ir.Value:
        if not plan.narrow:
            return initializer("values", array)
        return write.op("Cast", initializer("values", array.astype(NARROW_TYPES[plan.narrow])), to=ir.DataType.FLOAT)

    if plan.filler is None:
        decoded = widened(dense)
    else:
        stream = _stream(dense, codes, plan.relative)
        kept = _bits(stream) != plan.filler
        filler = np.array([plan.filler]).astype(np.uint8).view(stream.dtype) if stream.itemsize == 1 else [0.0]
        values = np.concatenate([np.asarray(filler, stream.dtype), stream[kept]])
        if codes.bits == 8:
            stored = widened(values)
        else:
            packed = write.op("Cast", initializer("values", _grouped(values, codes.bits)), to=ir.DataType.INT32)
            stored = write.reshape(_regrouped(write, packed, 8, codes.bits), -1)
        mask = initializer("mask", np.packbits(kept, bitorder="little"))
        decoded = _placed(write, mask, stored, stream.size)
        if codes.bits < 8:
            decoded = _packed_again(write, decoded, codes, plan.relative, dense)
        decoded = write.reshape(decoded, *dense.shape)
    plan.value.replace_all_uses_with(decoded)
    del write.graph.initializers[name]
    decoded.name = name


def _placed(write: Writer, mask: ir.Value, stored: ir.Value, count: int) -> ir.Value:
    """The stored values at the places that the mask names, and the first stored value, the filler, at all others."""
    table = write.constant(_BITS, np.int8)
    bits = write.reshape(write.op("Gather", table, write.op("Cast", mask, to=ir.DataType.INT32)), -1)
    bits = write.op("Cast", bits, to=ir.DataType.INT32)
    ranks = write.op("CumSum", bits, write.constant(0))
    placed = write.op("GatherElements", stored, write.op("Mul", ranks, bits))
    return write.columns(placed, count, axis=0) if count % 8 else placed


def _regrouped(write: Writer, planes: ir.Value, bits: int, new: int) -> ir.Value:
    """Numbers of `bits` bits, (places in a group, groups), as numbers of `new` bits in groups of the same size."""
    whole = math.lcm(bits, new)
    count, parts = whole // bits, whole // new
    if count > 1:
        raised = write.op("Mul", planes, write.constant([[1 << bits * at] for at in range(count)], np.int32))
        planes = write.op("ReduceSum", raised, write.constant([0]), keepdims=1)
    if parts > 1:
        lowered = write.op("Div", planes, write.constant([[1 << new * at] for at in range(parts)], np.int32))
        planes = write.op("Mod", lowered, write.constant(1 << new, np.int32))
    return planes


def _packed_again(
    write: Writer, stream: ir.Value, codes: Codes, relative: bool, dense: np.ndarray[Any, Any]
) -> ir.Value:
    """The bytes that hold codes, from the codes' stream."""
    count, width = unit(codes.bits)
    if relative:
        assert codes.zero_point is not None
        blocks = dense[0].size // width * count // codes.block_size
        lines = write.op("Transpose", write.reshape(codes.zero_point, -1, width), perm=[1, 0])
        zeros = _regrouped(write, write.op("Cast", lines, to=ir.DataType.INT32), 8, codes.bits)
        zeros = write.columns(write.reshape(write.op("Transpose", zeros, perm=[1, 0]), len(dense), -1), blocks)
        spread = write.reshape(stream, count, len(dense) * blocks, -1)
        moved = write.op("Add", spread, write.reshape(zeros, 1, -1, 1))
        stream = write.op("Mod", moved, write.constant(1 << codes.bits, np.int32))
    packed = _regrouped(write, write.reshape(stream, count, -1), codes.bits, 8)
    packed = packed if width == 1 else write.op("Transpose", packed, perm=[1, 0])
    return write.op("Cast", packed, to=ir.DataType.UINT8)
