"""Measures operators as float and as integer kernels in ONNX Runtime.

Operators to measure are branches of one model, which runs under ONNX Runtime's profiler. A kernel's time is read
without the changes of layout or format around it, which neighbours in a real network share. As in a network, a kernel
reads what was just written, and writes to memory that others used before: inputs are expanded from single values, and
only the first part of each output is taken. Operators that are several kernels on one side (attention), or that are
chosen by the ratio of both times (products with codes), are timed as whole sessions in turn instead, with given inputs.
If a model can't be built or run, its halves are tried, down to the kernels that are at fault: these have no cost.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lobo_fx.exporters.onnx.versions import MICROSOFT
from lobo_fx.exporters.onnxruntime.profile import repeatedly, typical
from lobo_fx.exporters.onnxruntime.session_options import ONLY_FATAL
from lobo_fx.measures.latency import interleave
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["measure_kernels"]

_ROUNDS = 12
"""Runs of each model; with fewer, times differ from call to call."""

_HOPELESS = 3.0
"""A fused attention, or a product with codes, that takes this many times as long as float is not measured closely."""

_CLOSE, _MORE = 0.1, 4
"""Times that differ by less than `_CLOSE` are measured for `_MORE` times the rounds, or chance would decide."""

_STREAMED = 1 << 24
"""Weights that no cache holds: 64 MB as floats."""

_OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
_SCALE, _ZERO = np.float32(0.05), np.uint8(128)
_AROUND = ("ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear", "Transpose")
"""Changes of layout and format, which are no part of a kernel's own cost."""


def measure_kernels(kernels: Sequence[Kernel]) -> dict[Kernel, Cost | NoCost]:
    """Times each kernel both ways, one thread, one row; a kernel that can't be built or run has no cost."""
    whole = [kernel for kernel in kernels if kernel.operator in _SESSIONS]
    branches = [kernel for kernel in kernels if kernel.operator not in _SESSIONS]
    found = _isolated(branches, _profiled)
    for kernel in whole:
        found |= _isolated([kernel], _sessions)
    return found


def _isolated(
    kernels: Sequence[Kernel], measure: Callable[[Sequence[Kernel]], dict[Kernel, Cost]]
) -> dict[Kernel, Cost | NoCost]:
    """Measures all together; where that fails, each half by itself, down to single kernels."""
    if not kernels:
        return {}
    try:
        return {**measure(kernels)}
    except Exception as error:  # whatever onnx or ONNX Runtime raise: one bad kernel must not end a compile
        if len(kernels) == 1:
            return {kernels[0]: NoCost(f"{type(error).__name__}: {str(error).splitlines()[0]}")}
    middle = len(kernels) // 2
    return _isolated(kernels[:middle], measure) | _isolated(kernels[middle:], measure)


def _profiled(kernels: Sequence[Kernel]) -> dict[Kernel, Cost]:
    """Costs of kernels that are branches of one model."""
    with tempfile.TemporaryDirectory() as folder:
        times = [_times(kernels, integer, Path(folder)) for integer in (False, True)]
    return {kernel: Cost(times[0][index], times[1][index]) for index, kernel in enumerate(kernels)}


def _sessions(kernels: Sequence[Kernel]) -> dict[Kernel, Cost]:
    """Cost of an operator that is timed as whole sessions, run in turn."""
    (kernel,) = kernels
    models = [_Branches(integer) for integer in (False, True)]
    for model in models:
        _BUILDERS[kernel.operator](model, "k0", kernel)
    sessions = [onnxruntime.InferenceSession(model.proto().SerializeToString(), _options()) for model in models]
    calls = {str(index): functools.partial(s.run, None, models[0].feed) for index, s in enumerate(sessions)}

    def measure(rounds: int, warmup: int = 0) -> list[float]:
        return [latency.cpu for latency in interleave(calls, rounds=rounds, warmup=warmup, rows=1).values()]

    floating, fused = measure(3, warmup=1)
    if fused < _HOPELESS * floating:
        floating, fused = measure(_ROUNDS)
    if abs(fused - floating) < _CLOSE * floating:
        floating, fused = measure(_MORE * _ROUNDS)
    return {kernel: Cost(1e3 * floating, 1e3 * fused)}  # CPU time of one thread, so that other processes do not count


class _Branches:
    """A model under construction: nodes, inputs and constants of all branches."""

    def __init__(self, integer: bool) -> None:
        self.integer = integer
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: list[Any] = []
        self.feed: dict[str, Any] = {}
        self.random = np.random.default_rng(0)

    def proto(self) -> Any:
        graph = helper.make_graph(self.nodes, "kernels", self.inputs, self.outputs, self.constants)
        return helper.make_model(graph, opset_imports=_OPSETS, ir_version=10)

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def scale(self, name: str) -> list[str]:
        return [self.constant(f"{name}_scale", _SCALE), self.constant(f"{name}_zero", _ZERO)]

    def written(self, name: str, shape: Sequence[int], integer: bool) -> str:
        """A tensor that is written just before it is read, all of one value."""
        one = [1] * len(shape)
        dtype = TensorProto.UINT8 if integer else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(f"{name}_one", dtype, one))
        self.feed[f"{name}_one"] = np.full(one, 129 if integer else 0.5, np.uint8 if integer else np.float32)
        sizes = self.constant(f"{name}_shape", np.array(shape, np.int64))
        return self.node("Expand", [f"{name}_one", sizes], f"before_{name}")

    def read(self, name: str, value: str, integer: bool) -> None:
        """Ends a branch with a part of its tensor: the whole one would be new memory in every run."""
        first = self.constant(f"{name}_first", np.array([0], np.int64))
        part = self.node("Gather", [value, first], f"after_{name}", axis=-1)  # no conversion is moved across it
        dtype = TensorProto.UINT8 if integer else TensorProto.FLOAT
        self.outputs.append(helper.make_tensor_value_info(part, dtype, None))

    def source(self, name: str, shape: Sequence[int]) -> str:
        """An input of the branch, integers where those are measured, as the kernel reads it."""
        found = self.written(name, shape, self.integer)
        return self.node("DequantizeLinear", [found, *self.scale(name)], f"{name}_dq") if self.integer else found

    def weight(self, name: str, shape: Sequence[int], axis: int) -> str:
        """A stored weight, with a scale per output channel where integers are measured."""
        if not self.integer:
            return self.constant(name, self.random.standard_normal(shape).astype(np.float32))
        self.constant(name, self.random.integers(-127, 127, shape).astype(np.int8))
        self.constant(f"{name}_scale", np.full(shape[axis], _SCALE))
        self.constant(f"{name}_zero", np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", [name, f"{name}_scale", f"{name}_zero"], f"{name}_dq", axis=axis)

    def result(self, name: str, value: str, quantized: bool = True) -> None:
        """An output of the branch, integers where the kernel gives them."""
        quantized = quantized and self.integer
        if quantized:
            value = self.node("QuantizeLinear", [value, *self.scale(f"{name}_q")], f"{name}_q")
        self.read(name, value, quantized)


def _sizes(kernel: Kernel, name: str) -> list[int]:
    """A setting with an entry for each dimension."""
    value = dict(kernel.settings)[name]
    return [value] if isinstance(value, int) else list(value)


def _conv(model: _Branches, name: str, kernel: Kernel) -> None:
    x = model.source(f"{name}_x", kernel.shapes[0])
    weight = model.weight(f"{name}_w", kernel.shapes[1], 0)
    (groups,) = _sizes(kernel, "groups")
    attributes = {
        "strides": _sizes(kernel, "stride"),
        "pads": _sizes(kernel, "padding") * 2,
        "dilations": _sizes(kernel, "dilation"),
    }
    model.result(name, model.node("Conv", [x, weight], name, **attributes, group=groups))


def _linear(model: _Branches, name: str, kernel: Kernel) -> None:
    x = model.source(f"{name}_x", kernel.shapes[0])
    model.result(name, model.node("MatMul", [x, model.weight(f"{name}_w", kernel.shapes[1], 1)], name), quantized=False)


def _several(operator: str, **attributes: Any) -> Callable[[_Branches, str, Kernel], None]:
    def build(model: _Branches, name: str, kernel: Kernel) -> None:
        inputs = [model.source(f"{name}_x{index}", shape) for index, shape in enumerate(kernel.shapes)]
        model.result(name, model.node(operator, inputs, name, **attributes, **dict(kernel.settings)))

    return build


def _pool(operator: str) -> Callable[[_Branches, str, Kernel], None]:
    def build(model: _Branches, name: str, kernel: Kernel) -> None:
        attributes = {
            "kernel_shape": _sizes(kernel, "kernel_size"),
            "strides": _sizes(kernel, "stride"),
            "pads": _sizes(kernel, "padding") * 2,
        }
        given = dict(kernel.settings)
        attributes |= {"dilations": _sizes(kernel, "dilation")} if "dilation" in given else {}
        rounding = {"ceil_mode": given["ceil_mode"]} if "ceil_mode" in given else {}
        x = model.source(f"{name}_x", kernel.shapes[0])
        model.result(name, model.node(operator, [x], name, **attributes, **rounding))

    return build


def _convert(model: _Branches, name: str, kernel: Kernel) -> None:
    """Converts the format, and the layout of images: integer convolutions take channels last."""
    shape = list(kernel.shapes[0])
    operator = "DequantizeLinear" if model.integer else "QuantizeLinear"
    found = model.written(f"{name}_x", shape, model.integer)
    if len(shape) == 4 and model.integer:
        found = model.node("Transpose", [found], f"{name}_t", perm=[0, 3, 1, 2])
    found = model.node(operator, [found, *model.scale(name)], name)
    if len(shape) == 4 and not model.integer:
        found = model.node("Transpose", [found], f"{name}_t", perm=[0, 2, 3, 1])
    model.read(name, found, not model.integer)


def _attention(model: _Branches, name: str, kernel: Kernel) -> None:
    """Attention on rows with all heads side by side: one fused kernel, or heads moved, two products and softmax."""
    batch, heads, length, width = kernel.shapes[0]
    rows = [f"{name}_x{index}" for index in range(3)]
    for row, (rows_in, count, places, size) in zip(rows, kernel.shapes, strict=True):
        shape = [rows_in, places, count * size]
        model.inputs.append(helper.make_tensor_value_info(row, TensorProto.FLOAT, shape))
        model.feed[row] = model.random.standard_normal(shape).astype(np.float32)
    if model.integer:
        found = model.node("MultiHeadAttention", rows, name, domain=MICROSOFT, num_heads=heads)
    else:
        split = []
        for row, (rows_in, count, places, size) in zip(rows, kernel.shapes, strict=True):
            whole = model.constant(f"{row}_split", np.array([rows_in, places, count, size], np.int64))
            order = [0, 2, 3, 1] if row is rows[1] else [0, 2, 1, 3]
            split.append(
                model.node("Transpose", [model.node("Reshape", [row, whole], f"{row}_r")], f"{row}_t", perm=order)
            )
        scale = model.constant(f"{name}_scale", np.float32(width**-0.5))
        scores = model.node("MatMul", [model.node("Mul", [split[0], scale], f"{name}_m"), split[1]], f"{name}_s")
        mixed = model.node("MatMul", [model.node("Softmax", [scores], f"{name}_p"), split[2]], f"{name}_v")
        side = model.constant(f"{name}_side", np.array([batch, length, heads * kernel.shapes[2][3]], np.int64))
        found = model.node("Reshape", [model.node("Transpose", [mixed], f"{name}_t", perm=[0, 2, 1, 3]), side], name)
    model.outputs.append(helper.make_tensor_value_info(found, TensorProto.FLOAT, None))


def _product(model: _Branches, name: str, kernel: Kernel) -> None:
    """A product with a float weight, or with one in codes as the exporter writes it: 4 bits have zero points.

    For weights that come from memory, as many products run one after the other as no cache holds the weights of.
    """
    (rows, inputs), (outputs, _) = kernel.shapes
    given = dict(kernel.settings)
    if given.pop("streamed", 0):
        alone = Kernel(kernel.operator, kernel.shapes, tuple(given.items()))
        for copy in range(-(-_STREAMED // (inputs * outputs))):
            _product(model, f"{name}_{copy}", alone)
        return
    bits, block, level = (given[setting] for setting in ("bits", "block", "level"))
    assert isinstance(bits, int)
    assert isinstance(block, int)
    x, blocks = f"{name}_x", -(-inputs // block)
    model.inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [rows, inputs]))
    model.feed[x] = model.random.standard_normal((rows, inputs)).astype(np.float32)

    def codes(part: str, *shape: int) -> str:
        return model.constant(f"{name}_{part}", model.random.integers(0, 256, shape).astype(np.uint8))

    if model.integer:
        scale = model.constant(f"{name}_scale", np.full((outputs, blocks), _SCALE))
        stored = [codes("w", outputs, blocks, block * bits // 8), scale]
        stored += [codes("zero", outputs, -(-blocks // 2))] if bits == 4 else []
        settings = {"N": outputs, "K": inputs, "bits": bits, "block_size": block, "accuracy_level": level}
        found = model.node("MatMulNBits", [x, *stored], name, domain=MICROSOFT, **settings)
    else:
        found = model.node("MatMul", [x, model.weight(f"{name}_w", (inputs, outputs), 1)], name)
    model.outputs.append(helper.make_tensor_value_info(found, TensorProto.FLOAT, None))


_BUILDERS: dict[str, Callable[[_Branches, str, Kernel], None]] = {
    "conv": _conv,
    "linear": _linear,
    "matmul": _several("MatMul"),
    "add": _several("Add"),
    "mul": _several("Mul"),
    "concat": _several("Concat"),
    "global_average_pool": _several("GlobalAveragePool"),
    "average_pool": _pool("AveragePool"),
    "max_pool": _pool("MaxPool"),
    "sigmoid": _several("Sigmoid"),
    "leaky_relu": _several("LeakyRelu", alpha=0.01),
    "attention": _attention,
    "product": _product,
    "convert": _convert,
}

_SESSIONS = ("attention", "product")
"""Kernels that are timed as whole sessions, both sides in turn."""


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = ONLY_FATAL  # the user need not see that it refuses a kernel
    return options


def _times(kernels: Sequence[Kernel], integer: bool, folder: Path) -> list[float]:
    """Typical microseconds of each branch."""
    model = _Branches(integer)
    for index, kernel in enumerate(kernels):
        _BUILDERS[kernel.operator](model, f"k{index}", kernel)
    path = folder / f"{integer}.onnx"
    onnx.save(model.proto(), path)
    options = _options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / f"profile-{integer}")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in repeatedly(_ROUNDS):
        session.run(None, model.feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[tuple[int, str], list[float]] = defaultdict(list)
    whole = {index for index, kernel in enumerate(kernels) if kernel.operator == "convert"}
    for event in events:
        at = re.match(r"k(\d+)(?:_|$)", str(event.get("name", "")))
        if event.get("cat") != "Node" or at is None or not event["name"].endswith("_kernel_time"):
            continue
        index = int(at[1])
        if index in whole or event["args"].get("op_name") not in _AROUND:
            spent[index, event["name"]].append(float(event["dur"]))
    totals = [0.0] * len(kernels)
    for (index, _), times in spent.items():
        totals[index] += typical(times)
    return totals
