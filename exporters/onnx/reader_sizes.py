"""ONNX operators on values that are known while a model is read: constants of whole numbers, and sizes, also free ones.

Files compute with sizes: `Reshape(x, Concat(Gather(Shape(x), 0), [-1]))`. Here such values are numpy arrays of objects,
Python numbers or symbols of `torch.export`, so that sizes that are free in a file stay free in the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["SIZES", "Known", "as_known", "as_list", "as_tensor", "slices"]

Known = np.ndarray[Any, Any]
"""A known value: an array of objects, each a number or a symbol."""


def as_known(values: Any) -> Known:
    """Numbers as a known value."""
    array = np.asarray(values)
    found = np.empty(array.shape, object)
    found[...] = values if array.dtype == object else array.tolist()
    return found


def as_list(value: Any) -> list[Any]:
    """Axes or sizes that must be known, in a list.

    Raises:
        ValueError: they are computed from the data.
    """
    if isinstance(value, torch.Tensor):
        raise ValueError("sizes or axes that are computed from data")
    return list(np.asarray(value, object).reshape(-1))


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A known value as a tensor."""
    if isinstance(value, torch.Tensor):
        return value
    flat = list(np.asarray(value, object).reshape(-1))
    if dtype is None:
        kinds = {type(entry) for entry in flat}
        dtype = torch.bool if kinds == {bool} else torch.float32 if float in kinds else torch.int64
    if all(isinstance(entry, (bool, int, float)) for entry in flat):
        return torch.tensor(flat, dtype=dtype).reshape(np.shape(value))
    return torch.stack([torch.full((), entry, dtype=dtype) for entry in flat]).reshape(np.shape(value))


def _each(function: Callable[[Any, Any], Any]) -> Callable[..., Known]:
    return lambda given, a, b: as_known(np.frompyfunc(function, 2, 1)(a, b))


def _cast(given: Mapping[str, Any], x: Known) -> Known:
    kind = {1: float, 11: float, 10: float, 9: bool}.get(given["to"], int)
    return as_known(np.frompyfunc(lambda value: value if isinstance(value, torch.SymInt) else kind(value), 1, 1)(x))


def _divide(a: Any, b: Any) -> Any:
    """Whole numbers as ONNX divides them: towards zero."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) or a * b >= 0 else -(-a // b)


def _slice(given: Mapping[str, Any], x: Known, *ends: Any) -> Known:
    starts, stops, axes, steps = slices(given, x.ndim, *ends)
    cut = [slice(None)] * x.ndim
    for start, stop, axis, step in zip(starts, stops, axes, steps, strict=True):
        limit = x.shape[axis]
        stop = None if step < 0 and stop < -limit else stop
        cut[axis] = slice(int(start), None if stop is None else int(min(stop, limit)), int(step))
    return x[tuple(cut)]


def slices(given: Mapping[str, Any], rank: int, *ends: Any) -> tuple[list[Any], list[Any], list[int], list[int]]:
    """Starts, stops, axes and steps of a `Slice`, from its attributes (before opset 10) or inputs."""
    starts, stops = (given["starts"], given["ends"]) if not ends else map(as_list, ends[:2])
    axes = given.get("axes") if not ends else as_list(ends[2]) if len(ends) > 2 and ends[2] is not None else None
    steps = as_list(ends[3]) if len(ends) > 3 and ends[3] is not None else [1] * len(starts)
    return starts, stops, [int(axis) % rank for axis in (range(len(starts)) if axes is None else axes)], steps


def _unsqueeze(given: Mapping[str, Any], x: Known, axes: Any = None) -> Known:
    wanted = given["axes"] if axes is None else as_list(axes)
    return np.expand_dims(x, tuple(wanted))


def _squeeze(given: Mapping[str, Any], x: Known, axes: Any = None) -> Known:
    wanted = given.get("axes") if axes is None else as_list(axes)
    return np.squeeze(x, None if wanted is None else tuple(wanted))


def _reduce(function: Callable[[list[Any]], Any]) -> Callable[..., Known]:
    def reduced(given: Mapping[str, Any], x: Known, axes: Any = None) -> Known:
        wanted = given.get("axes") if axes is None else as_list(axes)
        if x.ndim != 1 or list(wanted or [0]) not in ([0], [-1]):
            raise ValueError("a reduction of known numbers over several axes")
        return as_known([function(list(x))] if given.get("keepdims", 1) else function(list(x)))

    return reduced


def _where(given: Mapping[str, Any], condition: Known, a: Known, b: Known) -> Known:
    return as_known(np.frompyfunc(lambda c, one, other: one if c else other, 3, 1)(condition, a, b))


def _filled(given: Mapping[str, Any], shape: Known) -> Known:
    value = given.get("value", 0.0)
    return as_known(np.full([int(size) for size in as_list(shape)], np.asarray(value).reshape(-1)[0].item()))


SIZES: dict[str, Callable[..., Known]] = {
    "Add": _each(operator.add),
    "And": _each(lambda a, b: bool(a) and bool(b)),
    "Cast": _cast,
    "Concat": lambda given, *parts: np.concatenate(parts, given["axis"]),
    "ConstantOfShape": _filled,
    "Div": _each(_divide),
    "Equal": _each(lambda a, b: bool(a == b)),
    "Expand": lambda given, x, shape: np.broadcast_to(
        x, np.broadcast_shapes(x.shape, tuple(int(size) for size in as_list(shape)))
    ),
    "Gather": lambda given, x, at: as_known(np.take(x, np.asarray(at, np.int64), given.get("axis", 0))),
    "Greater": _each(lambda a, b: bool(a > b)),
    "Identity": lambda given, x: x,
    "Less": _each(lambda a, b: bool(a < b)),
    "Max": _each(max),
    "Min": _each(min),
    "Mod": _each(operator.mod),
    "Mul": _each(operator.mul),
    "Neg": lambda given, x: as_known(np.frompyfunc(operator.neg, 1, 1)(x)),
    "Not": lambda given, x: as_known(np.frompyfunc(operator.not_, 1, 1)(x)),
    "Or": _each(lambda a, b: bool(a) or bool(b)),
    "Range": lambda given, start, stop, step: as_known(list(range(*(int(end.item()) for end in (start, stop, step))))),
    "ReduceMax": _reduce(max),
    "ReduceMin": _reduce(min),
    "ReduceProd": _reduce(math.prod),
    "ReduceSum": _reduce(sum),
    "Reshape": lambda given, x, shape: x.reshape([int(size) for size in as_list(shape)]),
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _each(operator.sub),
    "Transpose": lambda given, x: x.transpose(given.get("perm")),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""Functions by operator, for calls whose inputs are all known; each takes the attributes first."""
