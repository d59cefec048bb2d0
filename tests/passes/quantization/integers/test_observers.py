"""Ranges that observers choose, against the values themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lobo_fx.passes.quantization.integers.observers import OBSERVERS

Array = npt.NDArray[Any]
NORMAL = np.random.default_rng(0).standard_normal((4, 20_000)).astype(np.float32)


def observe(name: str, batches: Array, **settings: Any) -> tuple[float, int]:
    observer = OBSERVERS[name](
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, eps=2.0**-60, **settings
    )
    for batch in batches:
        observer(torch.from_numpy(batch))
    scale, zero = observer.calculate_qparams()
    return float(scale), int(zero)


def squared_error(values: Array, scale: float, zero: int) -> float:
    rounded = np.clip(np.round(values / scale) + zero, 0, 255) - zero
    return float(np.mean((rounded * scale - values) ** 2))


def test_all_of_an_even_range_is_kept() -> None:
    even = np.linspace(-1, 3, 100_000, dtype=np.float32).reshape(4, -1)
    np.random.default_rng(1).shuffle(even.ravel())
    for name in OBSERVERS:
        scale, zero = observe(name, even)
        assert scale == pytest.approx(4 / 255, rel=0.04), name
        assert zero == pytest.approx(64, abs=3), name


def test_percentiles_are_those_of_the_values() -> None:
    for percentile in (99.0, 99.9):
        scale, zero = observe("percentile", NORMAL, percentile=percentile)
        low, high = np.percentile(NORMAL, [100 - percentile, percentile])
        assert scale == pytest.approx((high - low) / 255, rel=0.01)
        assert zero == pytest.approx(-low / scale, abs=1)


def test_the_mean_squared_error_is_near_the_smallest() -> None:
    """Against every symmetric range in steps of a hundredth."""
    tails = NORMAL * np.random.default_rng(2).choice([1, 8], NORMAL.shape, p=[0.999, 0.001]).astype(np.float32)
    best = min(squared_error(tails, 2 * limit / 255, 128) for limit in np.arange(0.5, 40, 0.1))
    found = squared_error(tails, *observe("mse", tails))
    assert found <= 1.05 * best
    assert squared_error(tails, *observe("min_max", tails)) > 1.1 * found


def test_entropy_cuts_what_hardly_occurs() -> None:
    values = NORMAL.copy()
    values[3, 0] = 60
    scale, _ = observe("entropy", values)
    assert 5 < 255 * scale < 20
    assert 255 * observe("min_max", values)[0] > 60


def test_positive_values_keep_zero_at_the_end() -> None:
    for name in OBSERVERS:
        scale, zero = observe(name, np.abs(NORMAL))
        assert zero == 0, name
        assert 2 < 255 * scale < 5.5, name


def test_a_constant_has_a_range() -> None:
    for name in OBSERVERS:
        scale, zero = observe(name, np.full((2, 10), 3.0, np.float32))
        assert scale == pytest.approx(3 / 255), name
        assert zero == 0, name


def test_memory_does_not_grow_with_the_data() -> None:
    for name, kind in OBSERVERS.items():
        observer = kind(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
        observer(torch.randn(1000))
        before = sum(buffer.numel() for buffer in observer.buffers())
        for _ in range(5):
            observer(10 * torch.randn(1000))
        assert sum(buffer.numel() for buffer in observer.buffers()) == before <= 3000, name
