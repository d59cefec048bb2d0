"""Folding computed weights: what is constant, and what is not; what is frozen stays so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.passes import FoldWeights, QuantizeDynamic, QuantizeWeights

VECTORS = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """A weight times a buffer that `write` changes: before it is read, or after."""

    def __init__(self, write: Callable[[torch.Tensor], object], first: bool = True) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 64))
        self.register_buffer("k", torch.ones(1))
        self.k: torch.Tensor
        self.write, self.first = write, first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            self.write(self.k)
        y = F.linear(x, self.w * self.k)
        if not self.first:
            self.write(self.k)
        return y


@pytest.mark.parametrize("settings", [FoldWeights(), QuantizeWeights(), QuantizeDynamic()])
def test_a_weight_that_depends_on_a_state_is_not_folded(settings: FoldWeights) -> None:
    model = Scaled(lambda k: k.add_(1.0))
    result = lobo_fx.compile(model, [settings], example_inputs=VECTORS, progress=False)
    torch.testing.assert_close(result.module(VECTORS) * 1.5, result.module(VECTORS))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "write",
    [lambda k: k.view(1, 1).mul_(2.0), lambda k: k.unfold(0, 1, 1).mul_(2.0), lambda k: k.expand(3)[:1].mul_(2.0)],
    ids=["view", "unfold", "expand"],
)
def test_nor_where_the_state_is_written_through_a_view(write: Callable[[torch.Tensor], object], first: bool) -> None:
    result = lobo_fx.compile(Scaled(write, first), [FoldWeights()], example_inputs=VECTORS, progress=False)
    torch.testing.assert_close(result.module(VECTORS) * 2, result.module(VECTORS))


@pytest.mark.parametrize("trained", [True, False])
def test_a_frozen_weight_stays_frozen(trained: bool) -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)).requires_grad_(trained)
    result = lobo_fx.compile(model, [FoldWeights()], example_inputs=VECTORS, progress=False)
    assert {name: p.requires_grad for name, p in result.module.named_parameters()} == {
        "weight": trained,
        "bias": trained,
    }
