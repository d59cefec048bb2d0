"""How far to move towards a fit, against a search along the way; and which of several fits is taken."""

from __future__ import annotations

import math

import pytest
import torch

from lobo_fx.passes.fitting.held_out import Affine, HeldOut
from lobo_fx.passes.pruning.compensation import chosen


def affine(seed: int, groups: int = 2) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, 3, 5, generator=generator, dtype=torch.double)
    return Affine(weight, torch.randn(groups, 3, generator=generator, dtype=torch.double))


def rows(seed: int, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 40, 5, generator=generator, dtype=torch.double)
    return x, torch.randn(groups, 40, 3, generator=generator, dtype=torch.double) + x[..., :3]


@pytest.mark.parametrize("seed", range(8))
def test_the_share_is_the_best_of_a_search(seed: int) -> None:
    start, end, held_out = affine(seed), affine(seed + 100), HeldOut()
    for part in range(2):
        held_out.add(*rows(seed + 10 * part))
    moved, share, error = held_out.approach(start, end)

    def errors(steps: range) -> dict[float, float]:
        return {step / 1000: held_out.error(start.towards(end, step / 1000)) for step in steps}

    searched = errors(range(0, 1001, 20))  # a sum of squares along a line has one minimum
    nearest = round(1000 * min(searched, key=lambda at: searched[at]))
    searched = errors(range(max(nearest - 20, 0), min(nearest + 21, 1001)))
    best = min(searched, key=lambda at: searched[at])
    assert share == pytest.approx(best, abs=2e-3)
    assert error == pytest.approx(searched[best], rel=1e-5)
    assert held_out.error(moved) == pytest.approx(error, rel=1e-9)


def test_a_fit_that_is_as_good_as_the_best_mixture_is_taken_whole() -> None:
    start, end, held_out = affine(1), affine(3), HeldOut()
    x, _ = rows(2)
    held_out.add(x, end.towards(start, 0.02)(x))  # most of the way, and two hundredths short of the whole
    held_out.add(x, end.towards(start, -0.0201)(x))
    moved, share, _ = held_out.approach(start, end)
    assert share == 1
    assert torch.equal(moved.weight, end.weight)
    assert held_out.approach(end, start)[1] < 0.01


@pytest.mark.parametrize(
    ("decibels", "taken"),
    [
        ({"none": 3.0, "recalibrate": 3.2, "bias": 3.4}, "none"),  # half a decibel on few rows says nothing
        ({"none": 3.0, "recalibrate": 3.2, "bias": 3.6}, "bias"),
        ({"none": 3.0, "bias": 6.0, "reconstruct": 6.4}, "bias"),
        ({"none": 3.0, "bias": 6.0, "reconstruct": 7.0}, "reconstruct"),
        ({"none": 3.0, "bias": -9.0, "reconstruct": -30.0}, "none"),
        ({"none": 3.0, "bias": math.nan, "reconstruct": 9.0}, "reconstruct"),
        ({"none": -math.inf, "bias": -math.inf}, "none"),
        ({"none": math.inf, "bias": 80.0}, "none"),
    ],
)
def test_more_is_taken_only_where_it_is_worth_it(decibels: dict[str, float], taken: str) -> None:
    assert chosen(decibels) == taken
