"""Errors by rank against numpy's singular values of the whitened weight, and against other weights of the same rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.low_rank.spectrum import spectrum

Array = npt.NDArray[np.float64]
SIZES = st.integers(1, 7)


def problem(outputs: int, inputs: int, rows: int, seed: int = 0) -> tuple[Array, Array]:
    """A weight, and rows of inputs whose columns differ in size and go together."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((inputs, inputs)) * np.logspace(0, -1.5, inputs)
    return random.standard_normal((outputs, inputs)), random.standard_normal((rows, inputs)) @ mix


def gram_of(rows: Array) -> Gram:
    return Gram.of_rows(torch.tensor(rows)[None])


def whitened(weight: Array, second: Array) -> tuple[Array, Array, Array]:
    """U, singular values and Vᵀ of W·L, L the Cholesky root of the inputs' second moments."""
    found: Any = np.linalg.svd(weight @ np.linalg.cholesky(second))
    return found[0], found[1], found[2]


@settings(max_examples=30, deadline=None)
@given(outputs=SIZES, inputs=SIZES, more=st.integers(1, 9), seed=st.integers(0, 99))
def test_errors_are_tails_of_the_whitened_singular_values(outputs: int, inputs: int, more: int, seed: int) -> None:
    weight, rows = problem(outputs, inputs, inputs + more, seed)
    second = rows.T @ rows
    _, values, _ = whitened(weight, second)
    found = spectrum(torch.tensor(weight), gram_of(rows))
    tails = [float((values[rank:] ** 2).sum()) for rank in range(min(outputs, inputs) + 1)]
    np.testing.assert_allclose(found.errors, tails, atol=1e-9 * tails[0])
    for rank, tail in enumerate(tails):
        lost = rows @ (weight - found.nearest(rank).numpy()).T
        np.testing.assert_allclose((lost**2).sum(), tail, atol=1e-8 * tails[0])
    plain = np.linalg.svd(weight, compute_uv=False)
    assert min(outputs, inputs) < 2 or not np.allclose(found.energies / found.energies[0], plain**2 / plain[0] ** 2)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 8), (8, 12), (9, 9)])
def test_the_nearest_weight_is_the_truncated_one_taken_back_through_the_root(outputs: int, inputs: int) -> None:
    weight, rows = problem(outputs, inputs, 40)
    second = rows.T @ rows
    left, values, right = whitened(weight, second)
    found = spectrum(torch.tensor(weight), gram_of(rows))
    for rank in (1, 3, 7):
        expected = (left[:, :rank] * values[:rank]) @ right[:rank] @ np.linalg.inv(np.linalg.cholesky(second))
        np.testing.assert_allclose(found.nearest(rank), expected, atol=1e-9)
        assert not np.allclose(spectrum(torch.tensor(weight)).nearest(rank), expected, atol=1e-2)


@pytest.mark.parametrize("weighted", [True, False])
def test_no_other_weight_of_the_rank_is_nearer(weighted: bool) -> None:
    weight, rows = problem(10, 8, 30)
    found = spectrum(torch.tensor(weight), gram_of(rows) if weighted else None)
    seen = rows if weighted else np.eye(8)
    up, down = (factor.numpy() for factor in found.factors(3))
    least = ((seen @ (weight - up @ down).T) ** 2).sum()
    random = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            other = (up + size * random.standard_normal(up.shape)) @ (down + size * random.standard_normal(down.shape))
            assert ((seen @ (weight - other).T) ** 2).sum() > least
    other_way = spectrum(torch.tensor(weight), None if weighted else gram_of(rows)).nearest(3).numpy()
    assert ((seen @ (weight - other_way).T) ** 2).sum() > 1.05 * least


def test_inputs_of_few_dimensions_need_no_more_ranks() -> None:
    """Four rows, and columns that are never anything but zero: nothing is inverted."""
    weight, rows = problem(10, 8, 4)
    rows[:, :3] = 0
    for gram in (gram_of(rows), gram_of(np.concatenate([rows] * 4))):
        found = spectrum(torch.tensor(weight), gram)
        assert float(found.errors[4]) < 1e-20 * float(found.errors[0]) + 1e-12
        assert float(found.errors[3]) > 1e-6 * float(found.errors[0])
        np.testing.assert_allclose(rows @ found.nearest(4).numpy().T, rows @ weight.T, atol=1e-9)
        assert not np.allclose(found.nearest(4), weight, atol=1e-2)


@pytest.mark.parametrize("rows", [5, 30])
def test_a_shrunk_gram_adds_a_multiple_of_the_identity(rows: int) -> None:
    weight, inputs = problem(6, 8, rows)
    shrunk = gram_of(inputs).shrunk()
    second = shrunk.sums[0].numpy() + float(shrunk.ridge) * np.eye(8)
    assert float(shrunk.ridge) > 0
    _, values, _ = whitened(weight, second)
    np.testing.assert_allclose(spectrum(torch.tensor(weight), shrunk).energies, values**2, rtol=1e-7)
    found = spectrum(torch.tensor(weight), gram_of(inputs)).energies
    assert not np.allclose(found, values**2, rtol=1e-3)


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 8), (8, 12)])
def test_factors_multiply_to_the_nearest_weight_and_weigh_alike(outputs: int, inputs: int) -> None:
    weight, rows = problem(outputs, inputs, 40)
    found = spectrum(torch.tensor(weight), gram_of(rows))
    for rank in (1, 5, 8):
        up, down = found.factors(rank)
        assert (up.shape, down.shape) == ((outputs, rank), (rank, inputs))
        np.testing.assert_allclose(up @ down, found.nearest(rank), atol=1e-12)
        np.testing.assert_allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-9)
    np.testing.assert_allclose(up @ down, weight, atol=1e-10)  # of full rank


def test_a_weight_of_zeros_has_nothing_to_lose() -> None:
    found = spectrum(torch.zeros(4, 6))
    assert found.shares.tolist() == [0.0] * 5
    assert found.rank_for(20) == 1
    assert all(bool(factor.isfinite().all()) for factor in found.factors(2))


@pytest.mark.parametrize("decibels", [1, 5, 10, 20, 60])
def test_the_rank_for_a_ratio_is_the_lowest_that_reaches_it(decibels: float) -> None:
    weight, rows = problem(10, 12, 50)
    found = spectrum(torch.tensor(weight), gram_of(rows))
    rank = found.rank_for(decibels)
    outputs = rows @ weight.T

    def ratio(rank: int) -> float:
        lost = outputs - rows @ found.nearest(rank).numpy().T
        return float(10 * np.log10((outputs**2).sum() / max((lost**2).sum(), 1e-30)))

    assert ratio(rank) >= decibels
    assert rank == 1 or ratio(rank - 1) < decibels
