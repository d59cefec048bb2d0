"""Recurrent layers: what a call of one is given, and their shapes, which are known without unrolling them.

PyTorch follows a recurrent layer by unrolling it, and throws the steps away: 48 s for a bidirectional LSTM of two
layers over 160 steps. What its outputs' shapes are needs none of that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table

from lobo_fx.graph.operators import RECURRENT, arguments
from lobo_fx.process import CAPTURE, Shared

__all__ = ["Recurrent", "not_unrolled"]


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """The arguments of a recurrent call, named and in order as ATen has them.

    Parameters lie by layer, by direction, then w_ih, w_hh, both biases or none, and where states are projected w_hr.
    """

    input: Any
    hx: Any
    params: Sequence[Any]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    @classmethod
    def of(cls, node: fx.Node) -> Recurrent:
        """From a call in a graph."""
        return cls(**arguments(node))

    @property
    def states(self) -> list[Any]:
        """Where it starts: two of an LSTM, else one; each `[layers × directions, rows, hidden]`."""
        return list(self.hx) if isinstance(self.hx, Sequence) else [self.hx]

    @property
    def directions(self) -> int:
        """2 where a layer also runs backwards."""
        return 2 if self.bidirectional else 1

    @property
    def cells(self) -> list[Sequence[Any]]:
        """The parameters of every layer and direction."""
        each = len(self.params) // (self.num_layers * self.directions)
        return [self.params[at : at + each] for at in range(0, len(self.params), each)]

    @property
    def is_projected(self) -> bool:
        """Whether its states are projected."""
        return len(self.cells[0]) != (4 if self.has_biases else 2)

    @property
    def is_single(self) -> bool:
        """Whether it is one layer without a projection; tracing leaves others only where states are projected."""
        return self.num_layers == 1 and not self.is_projected


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


def _outputs(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Empty outputs of `aten.lstm.input` and its like: `[steps, rows, directions × hidden]`, and the last states."""
    call = Recurrent(*args, **kwargs)
    x, states, directions = call.input, call.states, call.directions
    rows, steps = (x.shape[dim] for dim in ((0, 1) if call.batch_first else (1, 0)))
    layers = call.num_layers * directions
    for state in states:
        _check(state.shape[0] == layers and state.shape[1] == rows, "its states are of other rows or layers")
    _check(call.params[0].shape[1] == x.shape[-1], "its input is not as wide as its weight")
    _check(call.params[1].shape[1] == states[0].shape[2], "its states are not as wide as their weight")
    every = x.new_empty((steps, rows, directions * states[0].shape[2]))
    if call.batch_first:  # as PyTorch lays it out: `contiguous` after it is no no-op
        every = every.transpose(0, 1)
    return every, *(state.new_empty(state.shape) for state in states)


def _check(holds: Any, message: str) -> None:
    torch._check(holds, lambda: message)  # type: ignore[no-untyped-call]
