"""Recurrent layers: the arguments of a call, and its output shapes, computed without unrolling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.operators import arguments
from lobo_fx.graph.tensors import require

__all__ = ["Recurrent", "empty_outputs"]


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """The arguments of a recurrent call, with ATen's names and order.

    Parameters are ordered by layer, then direction; each has w_ih, w_hh, both biases or none, and w_hr if it is
    projected.
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
        """Reads the arguments of a call in a graph."""
        return cls(**arguments(node))

    @property
    def states(self) -> list[Any]:
        """The initial states: two for an LSTM, else one; each `[layers × directions, rows, hidden]`."""
        return list(self.hx) if isinstance(self.hx, Sequence) else [self.hx]

    @property
    def directions(self) -> int:
        """2 for bidirectional layers, else 1."""
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
        """Whether it is one layer without a projection; after tracing, only projected ones are not."""
        return self.num_layers == 1 and not self.is_projected


def empty_outputs(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Empty outputs of `aten.lstm.input` and its like: `[steps, rows, directions × hidden]`, and the last states.

    Raises:
        RuntimeError: shapes of the arguments do not fit together.
    """
    call = Recurrent(*args, **kwargs)
    x, states, directions = call.input, call.states, call.directions
    rows, steps = (x.shape[dim] for dim in ((0, 1) if call.batch_first else (1, 0)))
    layers = call.num_layers * directions
    for state in states:
        require(state.shape[0] == layers and state.shape[1] == rows, "its states are of other rows or layers")
    require(call.params[0].shape[1] == x.shape[-1], "its input is not as wide as its weight")
    require(call.params[1].shape[1] == states[0].shape[2], "its states are not as wide as their weight")
    every = x.new_empty((steps, rows, directions * states[0].shape[2]))
    if call.batch_first:  # PyTorch returns a transposed tensor here, so a `contiguous` after it copies
        every = every.transpose(0, 1)
    return every, *(state.new_empty(state.shape) for state in states)
