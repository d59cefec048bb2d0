"""Ranks within a budget, against all combinations tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lobo_fx.passes.low_rank.ranks import Option, Shape, best_within, options
from lobo_fx.passes.low_rank.spectrum import spectrum

SHAPES = [Shape(6, 6), Shape(9, 4), Shape(5, 12)]


def choices(seed: int) -> dict[str, list[Option]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, shape in enumerate(SHAPES):
        weight = torch.randn(shape.outputs, shape.inputs, generator=generator)
        weight *= torch.logspace(0, -float(torch.rand((), generator=generator)) * 2, shape.inputs)
        cost = float(torch.rand((), generator=generator)) + 0.1
        found[str(number)] = options(shape, spectrum(weight), cost, 1)
    return found


def costs(chosen: dict[str, Option]) -> float:
    return sum(one.cost for one in chosen.values())


def errors(chosen: dict[str, Option]) -> float:
    return sum(one.error for one in chosen.values())


def combinations(given: dict[str, list[Option]]) -> list[dict[str, Option]]:
    return [dict(zip(given, chosen, strict=True)) for chosen in itertools.product(*given.values())]


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (64, 256), (30, 10), (2, 2), (1, 9)])
def test_the_highest_rank_is_the_last_that_makes_a_layer_smaller(outputs: int, inputs: int) -> None:
    shape = Shape(outputs, inputs)
    smaller = [rank for rank in range(1, shape.full + 1) if rank * (outputs + inputs) < outputs * inputs]
    assert shape.highest == max(smaller, default=0)


def test_options_are_the_whole_layer_and_multiples_that_make_it_cheaper() -> None:
    shape, found = Shape(64, 48), spectrum(torch.randn(64, 48))
    given = options(shape, found, 10.0, 8)
    assert [one.rank for one in given] == [48, 24, 16, 8]
    assert [one.cost for one in given] == pytest.approx([10.0, *(10 * rank * 112 / 3072 for rank in (24, 16, 8))])
    assert given[0].error == 0.0
    assert [one.error for one in given[1:]] == [float(found.shares[rank]) for rank in (24, 16, 8)]
    assert [one.rank for one in options(Shape(6, 6), spectrum(torch.randn(6, 6)), 1.0, 8)] == [6, 2, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), part=st.floats(0.0, 1.2))
def test_a_budget_is_kept_and_hardly_any_combination_is_better(seed: int, part: float) -> None:
    given = choices(seed)
    dearest, cheapest = ({name: some[at] for name, some in given.items()} for at in (0, -1))
    budget = costs(cheapest) + part * (costs(dearest) - costs(cheapest))
    chosen = best_within(given, budget)
    assert costs(chosen) <= budget * (1 + 1e-8)
    best = min(errors(other) for other in combinations(given) if costs(other) <= budget)
    steps = [a.error - b.error for some in given.values() for a, b in itertools.pairwise(reversed(some))]
    assert errors(chosen) <= best + max(steps)
    if part >= 1:
        assert errors(chosen) == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), price=st.floats(0.05, 5.0))
def test_for_what_the_best_at_a_price_costs_no_combination_is_better(seed: int, price: float) -> None:
    given = choices(seed)
    at_price = {name: min(some, key=lambda one: one.error + price * one.cost) for name, some in given.items()}
    budget = costs(at_price) * (1 + 1e-8)
    best = min(errors(other) for other in combinations(given) if costs(other) <= budget)
    assert errors(best_within(given, budget)) == pytest.approx(best, abs=1e-12)


def test_a_budget_that_nothing_fits_gives_the_cheapest() -> None:
    given = choices(0)
    assert best_within(given, 0.0) == {name: some[-1] for name, some in given.items()}
