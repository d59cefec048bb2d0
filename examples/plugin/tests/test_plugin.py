"""What lobo-fx's kits ask of a pass, a criterion, and an operator."""

from __future__ import annotations

import pytest
import torch
from lobo_fx_example import scaled_tanh
from lobo_fx_example.fuse_scaled_tanh import FuseScaledTanh
from lobo_fx_example.operator import SCALED_TANH
from lobo_fx_example.peak import Peak
from torch import nn

import lobo_fx
from lobo_fx import testing


class Scaled(nn.Module):
    """Two layers with a bend between them: `tanh(x) · weight`, or another one."""

    def __init__(self, bend: str = "tanh") -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.bend = bend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        bent = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "fused": torch.neg}[self.bend](x)
        found: torch.Tensor = self.last(scaled_tanh(x, self.weight) if self.bend == "fused" else bent * self.weight)
        return found


ROWS = torch.randn(3, 6)


def test_the_pass() -> None:
    testing.check_pass_battery(FuseScaledTanh(), Scaled(), ROWS, twins=[(Scaled("sigmoid"), ROWS)])
    result = testing.check_pass(FuseScaledTanh(), Scaled(), ROWS)
    assert any(node.target is SCALED_TANH for node in result.program.graph.nodes)


def test_a_product_with_too_few_channels_is_left_alone() -> None:
    result = testing.check_pass(FuseScaledTanh(least=9), Scaled(), ROWS)
    assert not any(node.target is SCALED_TANH for node in result.program.graph.nodes)
    assert any("not fused: it has 8 channels" in str(note) for note in result.report.notes)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match="least is 0; it must be a whole number of at least 1"):
        FuseScaledTanh(least=0)
    with pytest.raises(lobo_fx.InvalidInput, match="others is 'loud'; it must be one of silent, noted"):
        FuseScaledTanh(others="loud")  # type: ignore[arg-type]
    with pytest.raises(lobo_fx.InvalidInput, match=r"power is 0; it must be in \(0, 16\]"):
        Peak(power=0)


def test_the_criterion() -> None:
    testing.check_criterion(Peak())


def test_the_operator() -> None:
    torch.library.opcheck(scaled_tanh, (torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)))


def test_the_axis_rule() -> None:
    testing.check_axis_rule(scaled_tanh, torch.randn(3, 6), torch.rand(6), free=(3, 6))
    testing.check_axis_rule(lambda x, w: scaled_tanh(x, w).flip(1), torch.randn(3, 6), torch.rand(6), free=(3,))


def test_the_translation() -> None:
    cases = [(torch.randn(*shape, 5), torch.rand(5)) for shape in ((3,), (2, 3), (1, 2, 3))]
    testing.check_translation(scaled_tanh, *cases)


def test_a_network_with_the_operator_is_pruned() -> None:
    prune = lobo_fx.passes.PruneChannels(0.5, importance="peak", round_to=1)
    result = testing.check_pass(prune, Scaled("fused"), ROWS, export=True)
    assert result.module.state_dict()["weight"].shape == (4,)
