"""Recurrent cells and einsum with an ellipsis: pruned where they are free, and equal to zeroing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lobo_fx.passes import PruneChannels
from lobo_fx.testing import check_pass

SEQUENCES = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


class Steps(nn.Module):
    """A cell called step by step, and a head."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Layer(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(6, 8, batch_first=True, **settings), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.cells(x)[0])


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.first, self.weight, self.equation = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8)), equation

    def forward(self, x: torch.Tensor) -> Any:
        return torch.einsum(self.equation, self.first(x), self.weight)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "lstm cell": (lambda: Steps(nn.LSTMCell), {"cell.weight_ih": (16, 6), "cell.weight_hh": (16, 4)}),
    "gru cell": (lambda: Steps(nn.GRUCell), {"cell.weight_ih": (12, 6), "cell.weight_hh": (12, 4)}),
    "rnn cell": (lambda: Steps(nn.RNNCell), {"cell.weight_ih": (4, 6), "cell.weight_hh": (4, 4)}),
    "rnn": (Layer, {"cells.weight_ih_l0": (4, 6), "cells.weight_hh_l0": (4, 4), "head.weight": (4, 4)}),
    "rnn, relu": (lambda: Layer(nonlinearity="relu"), {"cells.weight_hh_l0": (4, 4), "head.weight": (4, 4)}),
    "ellipsis": (lambda: Einsum("...i,oi->...o"), {"first.weight": (4, 6), "weight": (5, 4)}),
    "ellipsis, no arrow": (lambda: Einsum("...i,oi"), {"first.weight": (4, 6), "weight": (5, 4)}),
}


SLOW = ("lstm cell", "gru cell", "rnn", "rnn, relu", "ellipsis, no arrow")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in NETWORKS]
)
def test_half_of_the_width_goes(kind: str, tmp_path: Path) -> None:
    make, shapes = NETWORKS[kind]
    torch.manual_seed(0)
    result = check_pass(PruneChannels(0.5, round_to=1), make().eval(), SEQUENCES)
    state = result.module.state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert not any("no axis rule" in note or "more than zeroing" in note for note in result.report.notes)
    result.export(tmp_path / "model.onnx")
