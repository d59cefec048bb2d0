"""ONNX operators as PyTorch computes them: one function an operator, from its attributes and inputs to its outputs.

Each raises ValueError for an attribute or a form that it can't compute; the reader adds the node's name.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lobo_fx.exporters.onnx.loading import element_type
from lobo_fx.exporters.onnx.reader_sizes import as_known, as_list, as_tensor, slices

__all__ = ["ALIKE", "OPERATORS", "READS_KNOWN", "torch_type"]

Attributes = Mapping[str, Any]
Tensor = torch.Tensor

_TYPES = {1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64,
          9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}  # fmt: skip


def torch_type(number: int) -> torch.dtype:
    """An ONNX element type as torch has it."""
    if number not in _TYPES:
        raise ValueError(f"type {element_type(number)}")
    return _TYPES[number]


def _pads(given: Attributes, x: Tensor, kernel: list[int]) -> list[int]:
    """Padding as `F.pad` takes it, for the dimensions that a window slides over."""
    count = len(kernel)
    strides, dilations = given.get("strides") or [1] * count, given.get("dilations") or [1] * count
    mode = given.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = given.get("pads") or [0] * 2 * count
        return [pads[at + end * count] for at in reversed(range(count)) for end in (0, 1)]
    if mode == "VALID":
        return [0] * 2 * count
    found = []
    for at in reversed(range(count)):
        size, span = x.shape[at + 2], dilations[at] * (kernel[at] - 1) + 1
        if not isinstance(size, int):
            raise ValueError(f"auto_pad={mode} where sizes are free")
        whole = max(0, (math.ceil(size / strides[at]) - 1) * strides[at] + span - size)
        low = whole // 2 if mode == "SAME_UPPER" else whole - whole // 2
        found += [low, whole - low]
    return found


def _even(pads: list[int]) -> list[int] | None:
    """Padding that is alike at both ends, by dimension; None where it is not."""
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    return [low for low, _ in reversed(pairs)] if all(low == high for low, high in pairs) else None


def _conv(given: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    pads = _pads(given, x, kernel)
    if (padding := _even(pads)) is None:
        x, padding = F.pad(x, pads), [0] * len(kernel)
    run: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    found: Tensor = run(
        x, weight, bias, given.get("strides") or 1, padding, given.get("dilations") or 1, given.get("group", 1)
    )
    return found


def _conv_transpose(given: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    if given.get("output_shape") or given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise ValueError("output_shape or auto_pad")
    if (padding := _even(_pads(given, x, kernel))) is None:
        raise ValueError("pads that differ at both ends")
    run: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(kernel)]
    found: Tensor = run(
        x,
        weight,
        bias,
        given.get("strides") or 1,
        padding,
        given.get("output_padding") or 0,
        given.get("group", 1),
        given.get("dilations") or 1,
    )
    return found


def _pool(kind: str, given: Attributes, x: Tensor) -> Tensor:
    if given["outputs"] > 1:
        raise ValueError("the output Indices")
    kernel = list(given["kernel_shape"])
    strides, pads = given.get("strides") or [1] * len(kernel), _pads(given, x, kernel)
    padding, ceil = _even(pads), bool(given.get("ceil_mode", 0))
    if kind == "max":
        if padding is None or any(2 * low > size for low, size in zip(padding, kernel, strict=True)):
            x, padding = F.pad(x, pads, value=-math.inf), [0] * len(kernel)
        run: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
        return run(x, kernel, strides, padding, given.get("dilations") or 1, ceil)  # type: ignore[no-any-return]
    if any(step != 1 for step in given.get("dilations") or ()):
        raise ValueError("dilations")
    counted = bool(given.get("count_include_pad", 0))
    if padding is None:
        if not counted:
            raise ValueError("pads that differ at both ends and are not counted")
        x, padding = F.pad(x, pads), [0] * len(kernel)
    run = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    return run(x, kernel, strides, padding, ceil, counted)  # type: ignore[no-any-return]


def _gemm(given: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if given.get("transA", 0) else a
    b = b if given.get("transB", 0) else b.T
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    if alpha == 1 and (c is None or (beta == 1 and isinstance(c, Tensor) and c.dim() == 1)):
        return F.linear(a, b, c)
    product: Tensor = F.linear(a, b) * alpha
    return product if c is None else product + c * beta


def _batch_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if given.get("training_mode", 0):
        raise ValueError("training_mode")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, given.get("epsilon", 1e-5))


def _layer_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = given.get("axis", -1) % x.dim()
    if list(scale.shape) != list(x.shape[axis:]):
        raise ValueError("a scale that is broadcast")
    return F.layer_norm(x, scale.shape, scale, bias, given.get("epsilon", 1e-5))


def _group_norm(given: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    if scale.shape[0] != x.shape[1]:
        raise ValueError("a scale for each group (opset before 21)")
    return F.group_norm(x, given["num_groups"], scale, bias, given.get("epsilon", 1e-5))


def _softmax(run: Callable[..., Tensor], given: Attributes, x: Tensor) -> Tensor:
    if given["opset"] >= 13:
        return run(x, given.get("axis", -1))
    axis = given.get("axis", 1) % x.dim()
    if axis == x.dim() - 1:
        return run(x, -1)
    return run(x.flatten(axis), -1).reshape(x.shape)


def _axes(given: Attributes, axes: Any) -> list[int] | None:
    found = given.get("axes") if axes is None else as_list(axes)
    return None if found is None else [int(axis) for axis in found]


def _reduce(run: Callable[[Tensor, list[int], bool], Tensor], given: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    over = _axes(given, axes)
    if not over and given.get("noop_with_empty_axes", 0):
        return x
    return run(x, over or list(range(x.dim())), bool(given.get("keepdims", 1))).to(x.dtype)


def _product(x: Tensor, over: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in over), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(run: Callable[..., Tensor], given: Attributes, x: Tensor) -> Tensor:
    if given.get("select_last_index", 0):
        raise ValueError("select_last_index")
    return run(x, given.get("axis", 0), bool(given.get("keepdims", 1)))


def _reshape(given: Attributes, x: Tensor, shape: Any = None) -> Tensor:
    sizes = given["shape"] if shape is None else as_list(shape)
    if not given.get("allowzero", 0):
        sizes = [x.shape[at] if isinstance(size, int) and size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(given: Attributes, x: Tensor) -> Tensor:
    axis = given.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(1) if axis == 1 else x.flatten(axis).flatten(0, axis - 1)


def _squeeze(given: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    over = _axes(given, axes)
    return x.squeeze() if over is None else x.squeeze(over)


def _unsqueeze(given: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    over = _axes(given, axes) or []
    rank = x.dim() + len(over)
    for axis in sorted(axis % rank for axis in over):
        x = x.unsqueeze(axis)
    return x


def _split(given: Attributes, x: Tensor, sizes: Any = None) -> tuple[Tensor, ...]:
    axis, parts = given.get("axis", 0), given.get("split") if sizes is None else as_list(sizes)
    if parts is None:
        count = given.get("num_outputs") or given["outputs"]
        return torch.split(x, -(-x.shape[axis] // count), axis)
    return torch.split(x, [int(part) for part in parts], axis)


def _slice(given: Attributes, x: Tensor, *ends: Any) -> Tensor:
    for start, stop, axis, step in zip(*slices(given, x.dim(), *ends), strict=True):
        if step < 0:
            if step != -1 or start not in (-1, 2**63 - 1) or stop > -(2**31):
                raise ValueError("a step below zero")
            x = x.flip(axis)
        else:
            x = x[(slice(None),) * axis + (slice(start, None if _is_end(stop) else stop, step),)]
    return x


def _is_end(stop: Any) -> bool:
    return isinstance(stop, int) and stop >= 2**31 - 1


def _gather(given: Attributes, values: Any, at: Any) -> Tensor:
    x = as_tensor(values)
    axis = given.get("axis", 0) % x.dim()
    if not isinstance(at, Tensor):
        at = as_known([place + x.shape[axis] if place < 0 else place for place in as_list(at)]).reshape(np.shape(at))
        if at.ndim == 0:
            return x.select(axis, at.item())
    at = as_tensor(at).long()
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(at, x)
    chosen = x.index_select(axis, at.reshape(-1))
    return chosen if at.dim() == 1 else chosen.reshape([*x.shape[:axis], *at.shape, *x.shape[axis + 1 :]])


def _expand(given: Attributes, values: Any, shape: Any) -> Tensor:
    x, sizes = as_tensor(values), as_list(shape)
    rank = max(len(sizes), x.dim())
    sizes = [1] * (rank - len(sizes)) + sizes
    own = [1] * (rank - x.dim()) + list(x.shape)
    return x.expand(
        [mine if isinstance(size, int) and size == 1 else size for size, mine in zip(sizes, own, strict=True)]
    )


def _pad(given: Attributes, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    ends = [int(end) for end in (given["pads"] if pads is None else as_list(pads))]
    over = [int(axis) % x.dim() for axis in as_list(axes)] if axes is not None else list(range(x.dim()))
    by_axis = {axis: (ends[at], ends[at + len(over)]) for at, axis in enumerate(over)}
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}.get(given.get("mode", "constant"))
    if mode is None:
        raise ValueError(f"mode={given['mode']}")
    flat = [end for axis in reversed(range(x.dim())) for end in by_axis.get(axis, (0, 0))]
    filled = given.get("value", 0.0) if value is None else as_list(value)[0]
    if mode == "constant":
        return F.pad(x, flat, value=filled)
    while len(flat) > 2 and flat[-2:] == [0, 0] and len(flat) > 2 * (x.dim() - 2):
        flat = flat[:-2]
    return F.pad(x, flat, mode)


def _resize(given: Attributes, x: Tensor, *more: Any) -> Tensor:
    """Whole images by nearest neighbours, linear or cubic, as `F.interpolate` has them."""
    _, scales, sizes = (*more, None, None, None)[:3] if given["opset"] >= 11 else (None, *more, None)[:3]
    mode, place = given.get("mode", "nearest"), given.get("coordinate_transformation_mode", "half_pixel")
    place = place if given["opset"] >= 11 else "asymmetric"
    if given.get("antialias", 0) or given.get("exclude_outside", 0) or x.dim() not in (3, 4, 5):
        raise ValueError("antialias, exclude_outside, or another rank")
    if given.get("axes") or given.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ValueError("axes or keep_aspect_ratio_policy")
    by_size = sizes is not None and np.size(sizes) > 0
    wanted = as_list(sizes if by_size else scales)
    if not by_size and wanted[:2] != [1.0, 1.0]:
        raise ValueError("scales of rows or channels")
    known: Any = {"size" if by_size else "scale_factor": wanted[2:]}
    if mode == "nearest":
        rounding = given.get("nearest_mode", "round_prefer_floor")
        # where every pixel becomes a block of whole pixels, the places agree
        is_whole = not by_size and all(factor == int(factor) for factor in wanted)
        floors = place == "asymmetric" and (rounding == "floor" or given["opset"] < 11)
        if floors or (is_whole and place.endswith("half_pixel") and rounding in ("floor", "round_prefer_floor")):
            return F.interpolate(x, mode="nearest", **known)
        raise ValueError(f"nearest neighbours with {place}, {rounding}")
    modes = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()], "cubic": "bicubic"}
    if mode not in modes or place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise ValueError(f"mode={mode} with {place}")
    if mode == "cubic" and given.get("cubic_coeff_a", -0.75) != -0.75:
        raise ValueError("cubic_coeff_a")
    return F.interpolate(x, mode=modes[mode], align_corners=place == "align_corners", **known)


def _clip(given: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    ends = [given.get("min") if low is None else _number(low), given.get("max") if high is None else _number(high)]
    return x if ends == [None, None] else F.relu6(x) if ends == [0.0, 6.0] else x.clamp(*ends)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, (Tensor, np.ndarray)) else value


def _cumulative(given: Attributes, x: Tensor, axis: Any) -> Tensor:
    over = [int(as_list(axis)[0])]
    x = x.flip(over) if given.get("reverse", 0) else x
    found = x.cumsum(over[0], dtype=x.dtype)
    found = found - x if given.get("exclusive", 0) else found
    return found.flip(over) if given.get("reverse", 0) else found


def _cast(given: Attributes, x: Any) -> Tensor:
    kind = torch_type(given["to"])
    return x.to(kind) if isinstance(x, Tensor) else as_tensor(x, kind)


def _range(given: Attributes, *ends: Any) -> Tensor:
    start, stop, step = (as_list(end)[0] for end in ends)
    return torch.arange(start, stop, step)


def _filled(given: Attributes, shape: Any) -> Tensor:
    value = np.asarray(given.get("value", np.zeros(1, np.float32))).reshape(-1)[0]
    return torch.full(as_list(shape), value.item(), dtype=torch.from_numpy(np.asarray(value).reshape(1)).dtype)


def _divide(given: Attributes, a: Any, b: Any) -> Any:
    floating = any(x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float) for x in (a, b))
    return a / b if floating else torch.div(a, b, rounding_mode="trunc")


def _power(given: Attributes, a: Any, b: Any) -> Any:
    found = torch.pow(a, b)
    return found.to(a.dtype) if isinstance(a, Tensor) and found.dtype != a.dtype else found


def _attention(given: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *past: Any) -> Tensor:
    """`Attention` of ai.onnx on heads in a dimension of their own, as torch exports it."""
    if any(entry is not None for entry in past) or q.dim() != 4 or given.get("softcap", 0.0) or given["outputs"] > 1:
        raise ValueError("past keys, packed heads or softcap")
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(given.get("is_causal", 0)), scale=given.get("scale"), enable_gqa=grouped
    )


def _shape(given: Attributes, x: Any) -> Any:
    return as_known(list(x.shape)[given.get("start", 0) : given.get("end")])


def _depth_to_space(given: Attributes, x: Tensor) -> Tensor:
    if given.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, given["blocksize"])
    rows, channels, height, width = x.shape
    size = given["blocksize"]
    x = x.reshape(rows, size, size, channels // size**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(rows, channels // size**2, height * size, width * size)


def _gate_order(weight: Tensor, order: tuple[int, ...]) -> Tensor:
    parts = weight.chunk(len(order))
    return torch.cat([parts[at] for at in order])


def _recurrent(
    kind: str, given: Attributes, x: Tensor, w: Tensor, r: Tensor, b: Any = None, lengths: Any = None, *states: Any
) -> tuple[Tensor, ...]:
    """`LSTM` and `GRU`: torch orders gates otherwise, and has directions side by side."""
    activations = [name.lower() for name in given.get("activations", ())]
    h, c, peepholes = (*states, None, None, None)[:3]
    usual = {"lstm": ["sigmoid", "tanh", "tanh"], "gru": ["sigmoid", "tanh"]}[kind]
    if (
        lengths is not None
        or peepholes is not None
        or given.get("clip")
        or given.get("layout")
        or given.get("input_forget")
    ):
        raise ValueError("lengths of rows, peepholes, clip, layout or input_forget")
    if activations and activations != usual * (len(activations) // len(usual)):
        raise ValueError(f"activations {activations}")
    if kind == "gru" and not given.get("linear_before_reset", 0):
        raise ValueError("linear_before_reset=0")
    if given.get("direction", "forward") == "reverse":
        raise ValueError("direction=reverse")
    order = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2)}[kind]
    weights = []
    for direction in range(w.shape[0]):
        weights += [_gate_order(w[direction], order), _gate_order(r[direction], order)]
        if b is not None:
            weights += [_gate_order(half, order) for half in b[direction].chunk(2)]
    directions, hidden = w.shape[0], r.shape[-1]
    start = [state if isinstance(state, Tensor) else x.new_zeros(directions, x.shape[1], hidden) for state in (h, c)]
    rest = (weights, b is not None, 1, 0.0, False, directions == 2, False)
    if kind == "lstm":
        every, *last = torch.lstm(x, start, *rest)
    else:
        every, *last = torch.gru(x, start[0], *rest)
    every = every.reshape(*every.shape[:2], directions, hidden).transpose(1, 2)
    return (every, *last)


def _variadic(run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda given, *parts: functools.reduce(run, parts)


def _elementwise(run: Any) -> Callable[..., Any]:
    return lambda given, *inputs: run(*inputs)


def _both(run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An operator on two values, of which one may be a number."""
    return lambda given, a, b: run(as_tensor(a) if not isinstance(b, Tensor) else a, b)


def _extreme(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    def both(a: Any, b: Any) -> Tensor:
        kind = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), None)
        return run(as_tensor(a, kind), as_tensor(b, kind))

    return both


def _like_each_other(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    kind = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), None)
    return as_tensor(a, kind), as_tensor(b, kind)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: _elementwise(run)
        for name, run in {
            "Abs": torch.abs,
            "Acos": torch.acos,
            "Asin": torch.asin,
            "Atan": torch.atan,
            "Ceil": torch.ceil,
            "Cos": torch.cos,
            "Cosh": torch.cosh,
            "Erf": torch.erf,
            "Exp": torch.exp,
            "Floor": torch.floor,
            "HardSwish": F.hardswish,
            "Identity": torch.as_tensor,
            "IsNaN": torch.isnan,
            "Log": torch.log,
            "MatMul": torch.matmul,
            "Mish": F.mish,
            "Neg": torch.neg,
            "Not": torch.logical_not,
            "Reciprocal": torch.reciprocal,
            "Relu": torch.relu,
            "Round": torch.round,
            "Sigmoid": torch.sigmoid,
            "Sign": torch.sign,
            "Sin": torch.sin,
            "Sinh": torch.sinh,
            "Softplus": F.softplus,
            "Softsign": F.softsign,
            "Sqrt": torch.sqrt,
            "Tan": torch.tan,
            "Tanh": torch.tanh,
        }.items()
    },
    **{
        name: _both(run)
        for name, run in {
            "Add": operator.add,
            "Equal": operator.eq,
            "Greater": operator.gt,
            "GreaterOrEqual": operator.ge,
            "Less": operator.lt,
            "LessOrEqual": operator.le,
            "Mul": operator.mul,
            "Sub": operator.sub,
        }.items()
    },
    "And": lambda given, a, b: torch.logical_and(as_tensor(a), as_tensor(b)),
    "ArgMax": functools.partial(_arg, torch.argmax),
    "ArgMin": functools.partial(_arg, torch.argmin),
    "Attention": _attention,
    "AveragePool": functools.partial(_pool, "average"),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda given, x, like: as_tensor(x).to(like.dtype),
    "Celu": lambda given, x: F.celu(x, given.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda given, *parts: torch.cat([as_tensor(part) for part in parts], given["axis"]),
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _cumulative,
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Dropout": lambda given, x, *rest: (x, torch.ones_like(x, dtype=torch.bool)),
    "Einsum": lambda given, *parts: torch.einsum(given["equation"], *parts),
    "Elu": lambda given, x: F.elu(x, given.get("alpha", 1.0)),
    "Expand": _expand,
    "Flatten": _flatten,
    "GRU": functools.partial(_recurrent, "gru"),
    "Gather": _gather,
    "GatherElements": lambda given, x, at: x.gather(given.get("axis", 0), as_tensor(at).long()),
    "Gelu": lambda given, x: F.gelu(x, approximate=given.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda given, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda given, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda given, x: (x * given.get("alpha", 0.2) + given.get("beta", 0.5)).clamp(0, 1),
    "InstanceNormalization": lambda given, x, scale, bias: F.instance_norm(
        x, None, None, scale, bias, True, 0.0, given.get("epsilon", 1e-5)
    ),
    "LSTM": functools.partial(_recurrent, "lstm"),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda given, x: F.leaky_relu(x, given.get("alpha", 0.01)),
    "LogSoftmax": functools.partial(_softmax, torch.log_softmax),
    "Max": _variadic(_extreme(torch.maximum)),
    "MaxPool": functools.partial(_pool, "max"),
    "Min": _variadic(_extreme(torch.minimum)),
    "Mod": lambda given, a, b: torch.fmod(torch.as_tensor(a), b) if given.get("fmod", 0) else torch.remainder(a, b),
    "Or": lambda given, a, b: torch.logical_or(as_tensor(a), as_tensor(b)),
    "PRelu": lambda given, x, slope: torch.where(x < 0, x * slope, x),
    "Pad": _pad,
    "Pow": _power,
    "Range": _range,
    "ReduceL2": functools.partial(_reduce, lambda x, over, keep: torch.linalg.vector_norm(x, 2, over, keep)),
    "ReduceMax": functools.partial(_reduce, torch.amax),
    "ReduceMean": functools.partial(_reduce, torch.mean),
    "ReduceMin": functools.partial(_reduce, torch.amin),
    "ReduceProd": functools.partial(_reduce, _product),
    "ReduceSum": functools.partial(_reduce, torch.sum),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda given, x: F.elu(x, given.get("alpha", 1.6732632)) * given.get("gamma", 1.0507010),
    "Shape": _shape,
    "Size": lambda given, x: as_known(math.prod(x.shape)),
    "Slice": _slice,
    "Softmax": functools.partial(_softmax, torch.softmax),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _variadic(operator.add),
    "ThresholdedRelu": lambda given, x: torch.where(x > given.get("alpha", 1.0), x, 0.0),
    "Tile": lambda given, x, times: as_tensor(x).repeat(as_list(times)),
    "Transpose": lambda given, x: x.permute(given.get("perm") or list(reversed(range(x.dim())))),
    "Trilu": lambda given, x, k=None: (torch.triu if given.get("upper", 1) else torch.tril)(
        as_tensor(x), int(as_list(k)[0]) if k is not None else 0
    ),
    "Unsqueeze": _unsqueeze,
    "Upsample": lambda given, x, scales=None: _resize(given, x, given.get("scales") if scales is None else scales),
    "Where": lambda given, condition, a, b: torch.where(as_tensor(condition), *_like_each_other(a, b)),
    "Xor": lambda given, a, b: torch.logical_xor(as_tensor(a), as_tensor(b)),
}
"""Functions by operator of ai.onnx: each takes attributes, with `opset` and the number of `outputs`, and inputs."""

ALIKE = frozenset(
    {"Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mod", "Mul"}
    | {"Sub", "Sum"}
)
"""Operators whose inputs are of one type: known numbers, which don't say theirs, are of the others'."""

READS_KNOWN = frozenset(
    {name for name in OPERATORS if name.startswith("Reduce")}
    | {"Cast", "Clip", "Concat", "ConstantOfShape", "CumSum", "Expand", "Gather", "Pad", "Range", "Reshape", "Resize"}
    | {"Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Trilu", "Unsqueeze", "Upsample", "Where"}
)
"""Operators that read known values themselves; others are given them as numbers or tensors."""
