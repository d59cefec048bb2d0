"""Shapes of results that are known without running an operator, or its decomposition, on fake tensors.

PyTorch propagates shapes through an operator's decomposition: `relu` becomes a comparison and a choice, a layer norm a
dozen operators, and a recurrent layer is unrolled, 48 s for a bidirectional LSTM of two layers over 160 steps. A
pointwise operator on one tensor keeps its shape, whatever it computes; the shapes of other operators are stated here.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._prims_common import suggest_memory_format
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from lobo_fx.graph.operators import RECURRENT, aten
from lobo_fx.graph.recurrent import empty_outputs
from lobo_fx.graph.tensors import require
from lobo_fx.process import CAPTURE_LOCK, Shared

__all__ = ["known_result", "shapes_known"]


def known_result(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Empty fake tensors in the shapes of the call's results; None where the operator has to be run.

    Args:
        target: the operator.
        args: its arguments, with fake tensors in place of tensors.
        kwargs: likewise.

    Raises:
        RuntimeError: shapes of the arguments do not fit together.
    """
    if target in _KNOWN:
        return _KNOWN[target](*args, **kwargs)
    if not args or not isinstance(args[0], torch.Tensor) or not _is_pointwise(target):
        return None
    others = (*args[1:], *kwargs.values())
    if not all(other is None or isinstance(other, bool | int | float | str | torch.dtype) for other in others):
        return None
    return torch.empty_like(
        args[0], dtype=_dtype(torch.get_default_dtype(), target, args[0].dtype, *args[1:], **kwargs)
    )


_OF_THREAD = threading.local()


@contextlib.contextmanager
def shapes_known() -> Iterator[None]:
    """Within this context, PyTorch's own fake tensors use the shapes that are known here.

    Other threads that enter it wait; those that don't are not affected.
    """
    with CAPTURE_LOCK, _REPLACED, _asked(True):
        yield


@contextlib.contextmanager
def _asked(active: bool) -> Iterator[None]:
    before = getattr(_OF_THREAD, "active", False)
    _OF_THREAD.active = active
    try:
        yield
    finally:
        _OF_THREAD.active = before


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    # Fake tensors look for a Python kernel of the operator first, then for a decomposition.
    _FORMS.read(decomposition_table)
    kernels = {target: dict(target.py_kernels) for target in RECURRENT}
    decomposition_table.update(_FORMS.shaped)
    for target, forms in kernels.items():
        target.py_kernels.update({key: _shaped(target, form) for key, form in forms.items()})
        target._dispatch_cache.clear()
    yield
    decomposition_table.update(_FORMS.own)
    for target, forms in kernels.items():
        target.py_kernels.update(forms)
        target._dispatch_cache.clear()


class _Forms:
    """The decompositions of operators whose shapes may be known, and their replacements.

    Both are collected anew only if the table has changed: there are hundreds, and PyTorch hashes operators in Python.
    """

    def __init__(self) -> None:
        self.table: dict[Any, Callable[..., Any]] = {}
        self.own: dict[Any, Callable[..., Any]] = {}
        self.shaped: dict[Any, Callable[..., Any]] = {}

    def read(self, table: dict[Any, Callable[..., Any]]) -> None:
        if table != self.table:
            self.table = table.copy()
            self.own = {target: form for target, form in table.items() if _may_be_known(target)}
            self.shaped = {target: _shaped(target, form) for target, form in self.own.items()}


_FORMS = _Forms()
_REPLACED = Shared(_replaced)


def _shaped(target: Any, form: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a decomposition: known shapes in threads that asked for them, unless it is being recorded; else itself."""

    @functools.wraps(form)
    def shaped(*args: Any, **kwargs: Any) -> Any:
        asked = getattr(_OF_THREAD, "active", False) and (target in RECURRENT or get_proxy_mode() is None)
        known = known_result(target, args, kwargs) if asked else None
        return form(*args, **kwargs) if known is None else known

    return shaped


@functools.cache
def _may_be_known(target: Any) -> bool:
    return target in _KNOWN or _is_pointwise(target)


@functools.cache
def _is_pointwise(target: Any) -> bool:
    """Whether PyTorch tags an operator as pointwise, and it returns one new tensor.

    Operators that draw random numbers are excluded, as their outputs have other memory layouts.
    """
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return False
    given, returns = target._schema.arguments, target._schema.returns
    one = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
    return one and not any(value.alias_info for value in (*given, *returns))


@functools.lru_cache(maxsize=None, typed=True)  # by type: 2 and 2.0 are equal, and give other dtypes
def _dtype(default: torch.dtype, target: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.dtype:
    """Dtype of the operator's result on a tensor of this dtype, under this default dtype of PyTorch."""
    with _asked(False):
        return target(torch.empty(1, dtype=dtype, device="meta"), *args, **kwargs).dtype  # type: ignore[no-any-return]


def _empty(sizes: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """As `like.new_empty(sizes)`, which PyTorch decomposes in Python."""
    return torch.empty(tuple(sizes), dtype=like.dtype, device=like.device)


def _batch_norm(input: torch.Tensor, *parameters: torch.Tensor | None, **settings: Any) -> torch.Tensor:
    """Input `[rows, channels, …]`, and up to four parameters with one number per channel."""
    for parameter in parameters[:4]:
        if isinstance(parameter, torch.Tensor):
            require(parameter.numel() == input.shape[1], "its parameters are not of as many channels as its input")
    return torch.empty_like(input, memory_format=suggest_memory_format(input))


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """Input `[…, *normalized_shape]`; the parameters have the shape `normalized_shape`."""
    sizes = list(normalized_shape)
    shapes = [input.shape[input.dim() - len(sizes) :], *(p.shape for p in (weight, bias) if p is not None)]
    require(all(list(shape) == sizes for shape in shapes), "it normalises other sizes than those of its input")
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    """Input `[…, inputs]`, weight `[outputs, inputs]`, or `[inputs]` for one output, which the result then drops.

    Biases of other shapes broadcast; they are left to the operator.
    """
    require(input.shape[-1] == weight.shape[-1], "its input is not as wide as its weight")
    if input.dtype != weight.dtype or (bias is not None and bias.shape != weight.shape[:-1]):
        return None
    return _empty((*input.shape[:-1], *weight.shape[:-1]), input)


def _addmm(
    bias: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor | None:
    """Input `[rows, inputs]`, weight `[inputs, outputs]`, bias `[outputs]`; others are left to the operator."""
    if (
        not input.dim() == weight.dim() == 2
        or not bias.dtype == input.dtype == weight.dtype
        or bias.shape != weight.shape[1:]
    ):
        return None
    require(input.shape[1] == weight.shape[0], "its input is not as wide as its weight")
    return _empty((input.shape[0], weight.shape[1]), input)


def _native_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """As `_layer_norm`, with the mean and the inverse deviation of every row, which inference does not read."""
    rows = (*input.shape[: input.dim() - len(normalized_shape)], *[1] * len(normalized_shape))
    told = (_empty(rows, input if weight is None else weight) for _ in range(2))
    return _layer_norm(input, normalized_shape, weight, bias), *told


def _native_batch_norm(
    input: torch.Tensor, *parameters: torch.Tensor | None, **settings: Any
) -> tuple[torch.Tensor, ...]:
    """As `_batch_norm`, with two tensors that inference leaves empty."""
    return _batch_norm(input, *parameters), _empty((0,), input), _empty((0,), input)


_KNOWN: dict[Any, Callable[..., Any]] = {
    aten.batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit_no_training.default: _native_batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.native_layer_norm.default: _native_layer_norm,
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    **dict.fromkeys(RECURRENT, empty_outputs),
}
