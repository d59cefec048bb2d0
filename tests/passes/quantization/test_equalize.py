"""Ranges evened out: outputs as they were, ranges equal, int8 better for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.contracts.split import is_held_out
from lobo_fx.passes import EqualizeLayers, QuantizeStatic, SmoothActivations
from lobo_fx.testing import check_pass

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))


def uneven(first: nn.Module, *rest: nn.Module) -> nn.Module:
    """Channels whose sizes differ a thousandfold."""
    assert isinstance(first.weight, torch.Tensor)
    with torch.no_grad():
        sizes = torch.logspace(-2, 1, len(first.weight))
        first.weight.mul_(sizes.view(-1, *[1] * (first.weight.dim() - 1)))
        first.bias.mul_(sizes)  # type: ignore[operator]
    return nn.Sequential(first, *rest).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "relu": (lambda: uneven(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), IMAGES),
    "nothing between": (lambda: uneven(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), IMAGES),
    "depthwise": (lambda: uneven(nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 8, 3, groups=8)), IMAGES),
    "linear": (lambda: uneven(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), WORDS),
    "norm folded": (lambda: uneven(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), IMAGES),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_both_sides_get_the_same_range(kind: str) -> None:
    make, x = NETWORKS[kind]
    torch.manual_seed(0)
    result = check_pass(EqualizeLayers(), make(), x)
    matrices = [t.detach().abs().numpy() for t in result.module.parameters() if t.dim() > 1]
    made, read = matrices
    read = read if read.shape[1] == 1 else read.swapaxes(0, 1)
    np.testing.assert_allclose(made.reshape(len(made), -1).max(1), read.reshape(len(read), -1).max(1), rtol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
    ],
    ids=["sigmoid", "groups", "relu6"],
)
def test_what_factors_do_not_pass_through_is_left_alone(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = check_pass(EqualizeLayers(), model.eval(), IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.module.state_dict().items())
    assert any("found no two layers" in note for note in result.report.notes)


def test_a_shared_layer_is_left_alone() -> None:
    layer = nn.Conv2d(3, 3, 1)
    result = check_pass(EqualizeLayers(), nn.Sequential(layer, nn.ReLU(), layer).eval(), IMAGES)
    assert torch.equal(result.module.state_dict()["0.weight"], layer.weight)


class Block(nn.Module):
    """A norm read by two layers; one channel of its output dwarfs the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 12), nn.Linear(16, 12)
        with torch.no_grad():
            self.norm.weight[3] = 200

    def forward(self, x: torch.Tensor) -> Any:
        x = self.norm(x)
        return self.a(x) * torch.tanh(self.b(x))


def assert_smoothed(model: Block, result: lobo_fx.Result, seen: torch.Tensor) -> None:
    """The norm and the weights are those of the formula, from the rows that were seen."""
    x = model.norm(seen).detach().abs().numpy().reshape(-1, 16).max(0)
    w = np.stack([np.abs(layer.weight.detach().numpy()).max(0) for layer in (model.a, model.b)]).max(0)
    state = result.module.state_dict()
    np.testing.assert_allclose(state["norm.weight"].numpy(), model.norm.weight.detach().numpy() / np.sqrt(x / w), 1e-5)
    np.testing.assert_allclose(state["a.weight"].numpy(), model.a.weight.detach().numpy() * np.sqrt(x / w), 1e-5)


def test_outliers_move_into_the_weights() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    result = check_pass(SmoothActivations(0.5), model, WORDS, calibration_data=[WORDS])
    assert_smoothed(model, result, WORDS[[row for row in range(len(WORDS)) if not is_held_out(row)]])


@pytest.mark.parametrize(
    ("pass_", "model", "x", "gain"),
    [
        (EqualizeLayers(), lambda: uneven(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), IMAGES, 0.5),
        (SmoothActivations(), Block, WORDS, 3),
    ],
    ids=["equalize", "smooth"],
)
def test_int8_is_better_for_it(pass_: Any, model: Callable[[], nn.Module], x: torch.Tensor, gain: float) -> None:
    def decibels(passes: list[Any]) -> float:
        torch.manual_seed(0)
        settings: dict[str, Any] = {"example_inputs": x, "calibration_data": [x], "progress": False}
        return lobo_fx.compile(model().eval(), passes, **settings).report.rows[-1].snr

    quantize = QuantizeStatic(kernels="all", observer="min_max", target="x86-vnni")
    assert decibels([pass_, quantize]) > decibels([quantize]) + gain


class Gemma(Block):
    """A norm whose scale is computed, and whose shift is not."""

    def forward(self, x: torch.Tensor) -> Any:
        x = nn.functional.layer_norm(x, (16,), 1 + self.norm.weight, self.norm.bias)
        return self.a(x) * torch.tanh(self.b(x))


def test_a_norm_whose_scale_is_computed_is_left_alone() -> None:
    result = check_pass(SmoothActivations(), Gemma().eval(), WORDS, calibration_data=[WORDS])
    assert result.report.notes == ["smooth_activations found no norm that only linear layers read"]


def test_inputs_of_one_dimension_are_smoothed() -> None:
    model, x = Block().eval(), torch.randn(16)
    assert_smoothed(model, check_pass(SmoothActivations(), model, x, calibration_data=[x]), x)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=r"strength is 2; it must be in \[0, 1\]"):
        SmoothActivations(2)
