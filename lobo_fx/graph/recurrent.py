"""Recurrent layers: how their parameters lie, and their shapes, which are known without unrolling them.

PyTorch follows a recurrent layer by unrolling it, and throws the steps away: 48 s for a bidirectional LSTM of two
layers over 160 steps. What its outputs' shapes are needs none of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table

from lobo_fx.graph.operators import RECURRENT
from lobo_fx.process import CAPTURE, Shared

__all__ = ["Parameters", "not_unrolled"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How the parameters of a recurrent call lie: by layer, by direction, then w_ih, w_hh and both biases.

    Attributes:
        directions: 2 where a layer also runs backwards.
        each: how many parameters a direction of a layer has, without a projection.
        is_projected: whether each has one more, which projects its states.
    """

    directions: int
    each: int
    is_projected: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Parameters:
        """From the arguments of the call, by schema name."""
        directions, each = 2 if given["bidirectional"] else 1, 4 if given["has_biases"] else 2
        return cls(directions, each, len(given["params"]) != each * directions * given["num_layers"])


_OF_THREAD = threading.local()
_originals: dict[Any, tuple[dict[Any, Any], Callable[..., Any]]] = {}


@contextlib.contextmanager
def not_unrolled() -> Iterator[None]:
    """Within, and in this thread alone, recurrent operators on fake tensors give shapes without being unrolled.

    One thread at a time.
    """
    before = getattr(_OF_THREAD, "active", False)
    with CAPTURE, _REPLACED:
        _OF_THREAD.active = True
        try:
            yield
        finally:
            _OF_THREAD.active = before


@contextlib.contextmanager
def _replaced() -> Iterator[None]:
    # Fake tensors look for a Python kernel of the operator first, and for a decomposition then.
    for target in RECURRENT:
        _originals[target] = dict(target.py_kernels), decomposition_table[target]
        for key, unrolled in target.py_kernels.items():
            target.py_kernels[key] = _shaped(unrolled)
        decomposition_table[target] = _shaped(decomposition_table[target])
        target._dispatch_cache.clear()
    yield
    for target, (kernels, decomposition) in _originals.items():
        target.py_kernels.update(kernels)
        decomposition_table[target] = decomposition
        target._dispatch_cache.clear()
    _originals.clear()


_REPLACED = Shared(_replaced)


def _shaped(unrolled: Callable[..., Any]) -> Callable[..., Any]:
    """What gives shapes in a thread that asked for it, and does as before in others."""

    @functools.wraps(unrolled)
    def shaped(*args: Any, **kwargs: Any) -> Any:
        return _outputs(*args, **kwargs) if getattr(_OF_THREAD, "active", False) else unrolled(*args, **kwargs)

    return shaped


def _outputs(
    x: torch.Tensor,
    hx: torch.Tensor | Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """Empty outputs of `aten.lstm.input` and its like: `[steps, rows, directions × hidden]`, and the last states."""
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    rows, directions = x.shape[0 if batch_first else 1], 2 if bidirectional else 1
    layers = num_layers * directions
    for state in states:
        _check(state.shape[0] == layers and state.shape[1] == rows, "its states are of other rows or layers")
    _check(params[0].shape[1] == x.shape[-1], "its input is not as wide as its weight")
    _check(params[1].shape[1] == states[0].shape[2], "its states are not as wide as their weight")
    steps, width = x.shape[1 if batch_first else 0], directions * states[0].shape[2]
    every = x.new_empty((steps, rows, width))
    every = every.transpose(0, 1) if batch_first else every  # as PyTorch lays it out: `contiguous` after it is no no-op
    return every, *(state.new_empty(state.shape) for state in states)


def _check(holds: Any, message: str) -> None:
    torch._check(holds, lambda: message)  # type: ignore[no-untyped-call]
