"""Ranges that observers choose, against the values themselves."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import nn

import lobo_fx
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import QuantizeStatic
from lobo_fx.passes.quantization.integers.histogram import BINS, Histogram, count_values
from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS

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


@pytest.mark.parametrize("sign", [1, -1])
def test_values_far_from_zero_and_near_each_other_have_a_range(sign: int) -> None:
    """No shorter range than up to the nearest of them is one."""
    for name in OBSERVERS:
        scale, zero = observe(name, sign * np.linspace(5, 5.01, 1000, dtype=np.float32).reshape(2, -1))
        assert scale == pytest.approx(5 / 255, rel=0.01), name
        assert zero == (0 if sign > 0 else 255), name


def test_memory_does_not_grow_with_the_data() -> None:
    for name, kind in ((name, OBSERVERS[name]) for name in OBSERVERS):
        observer = kind(dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine)
        observer(torch.randn(1000))
        before = sum(buffer.numel() for buffer in observer.buffers())
        for _ in range(5):
            observer(10 * torch.randn(1000))
        assert sum(buffer.numel() for buffer in observer.buffers()) == before <= 2 * BINS + 10, name


def made(name: str) -> Any:
    return OBSERVERS[name](
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, eps=2.0**-126
    )


# Histograms.


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_every_value_is_in_its_bin(scale: float) -> None:
    """Against a search of each value among the ends that the histogram gives."""
    values = scale * np.concatenate([NORMAL[0], np.exp(3 * NORMAL[1]), [0.0]]).astype(np.float32)
    found = Histogram.of(count_values(torch.from_numpy(values)), float(values.min()), float(values.max()))
    assert found.count.sum() == len(values)
    for low, high, count in list(zip(found.low, found.high, found.count, strict=True))[::50]:
        assert ((values >= low) & (values < high)).sum() + ((values == values.max()) & (values == high)).sum() == count
    apart = (found.low > 1e-30 * scale) & (found.high < found.high.max())
    assert (found.high[apart] / found.low[apart]).max() <= 1 + 1 / 32 + 1e-9


def test_batches_add_up_to_all_of_them_whatever_their_order() -> None:
    parts = [1e6 * NORMAL[0], NORMAL[1], 1e-6 * NORMAL[2]]
    whole = count_values(torch.from_numpy(np.concatenate(parts)))
    added = torch.stack([count_values(torch.from_numpy(part)) for part in reversed(parts)]).sum(0)
    assert torch.equal(added, whole)


def test_a_quantile_does_not_cross_a_gap() -> None:
    """Exactly one of ten thousand values is above the quantile: the rest of them ends far below it."""
    values = torch.cat([torch.rand(9_999), torch.tensor([1e6])])
    found = Histogram.of(count_values(values), float(values.min()), 1e6)
    assert found.quantile(0.9999) <= 1.04
    assert found.quantile(0.99991) > 1e5
    assert found.mirrored().quantile(1.0) == pytest.approx(-float(values.min()))


@pytest.mark.parametrize("limits", [(-1.0, 2.0), (-5.0, 5.0), (0.0, 0.5), (-300.0, 0.1), (0.0, 1e-3)])
def test_the_squared_error_is_that_of_the_values(limits: tuple[float, float]) -> None:
    observer = made("mse")
    values = NORMAL.ravel()
    seen = Histogram.of(count_values(torch.from_numpy(values)), float(values.min()), float(values.max()))
    low, high = limits
    scale = (high - low) / 255
    exact = squared_error(values.astype(np.float64), scale, round(-low / scale)) * values.size
    assert observer.loss(seen, low, high) == pytest.approx(exact, rel=0.02)


# Outliers.

ROBUST = ("percentile", "entropy", "histogram")


def decibels(values: Array, low: float, high: float) -> float:
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    error = squared_error(values.astype(np.float64), scale, round(-min(low, 0.0) / scale))
    return float(10 * np.log10(np.mean(values.astype(np.float64) ** 2) / error))


@pytest.mark.parametrize("outlier", [100.0, 1e6, 1e8])
@pytest.mark.parametrize("both", [False, True])
def test_one_outlier_does_not_take_the_range(outlier: float, both: bool) -> None:
    values = np.concatenate([NORMAL, -NORMAL], 1).reshape(8, -1)
    wild = values.copy()
    wild[5, 0] = outlier
    if both:
        wild[5, 1] = -outlier
    for name in ROBUST:
        scale, zero = observe(name, wild)
        assert decibels(values, -zero * scale, (255 - zero) * scale) > 37, name
        one = made(name)  # the same rows in one batch
        one.rows = len(wild)
        one(torch.from_numpy(wild))
        found = one.calculate_qparams()
        assert (float(found[0]), int(found[1])) == (scale, zero), name
    assert 255 * observe("min_max", wild)[0] >= outlier, "the twin that follows it"
    if outlier > 1e3:
        assert 255 * observe("mse", wild)[0] >= outlier, "of all values, the largest hold all the energy"


def test_what_many_rows_reach_is_held_however_rare_it_is() -> None:
    """Activations of a few huge values in every row, as language models have them."""
    values = NORMAL.reshape(16, -1).copy()
    values[::2, 0] = 1000
    assert 255 * observe("histogram", values)[0] >= 1000
    rows = made("histogram")
    rows.rows = 16
    rows(torch.from_numpy(values))
    assert 255 * float(rows.calculate_qparams()[0]) >= 1000


def test_rows_that_are_large_throughout_are_held() -> None:
    """Speech between silences: a sixteenth of the rows is a thousand times as loud."""
    values = NORMAL.reshape(32, -1).copy()
    values[:2] *= 1000
    for name in ROBUST:
        scale, zero = observe(name, values)
        assert decibels(values, -zero * scale, (255 - zero) * scale) > 30, name


def test_rare_signals_among_zeros_are_held() -> None:
    values = np.zeros((8, 5000), np.float32)
    values[3, :5] = [1, 2, 3, 4, 5]
    for name in ("histogram", "mse"):
        assert 255 * observe(name, values)[0] == pytest.approx(5, rel=0.05), name


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)).eval()


@pytest.mark.parametrize("observer", ROBUST)
def test_what_follows_a_clipped_outlier_is_observed_without_it(observer: str) -> None:
    """A convolution spreads it over so many values that no later observer can tell it from the others."""
    images = torch.randn(20, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    fresh, data = images[:4], images[4:].clone()
    model = network()
    found = []
    for value in (None, 1e6):
        if value is not None:
            data[2, 0, 0, 0] = value
        result = lobo_fx.compile(
            model,
            [QuantizeStatic(kernels="all", observer=observer)],
            example_inputs=fresh,
            calibration_data=[data[at : at + 4] for at in range(0, 16, 4)],
            progress=False,
        )
        found.append(signal_to_noise(model(fresh), result.module(fresh)))
    assert found[0] > 30
    assert found[1] > found[0] - 3


# Entropy beside ONNX Runtime's.

SHAPES: dict[str, Callable[[Array], Any]] = {
    "normal": lambda x: x,
    "relu": lambda x: x.clip(0),
    "gelu": lambda x: torch.nn.functional.gelu(torch.from_numpy(2 * x)).numpy(),
    "silu": lambda x: torch.nn.functional.silu(torch.from_numpy(3 * x)).numpy(),
    "leaky": lambda x: np.where(x > 0, x, 0.01 * x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "lognormal": np.exp,
    "few": lambda x: x[:, :3000],
}


def runtimes_entropy(batches: Array) -> tuple[float, float]:
    """The range that ONNX Runtime's calibrator takes, at its own settings."""
    collector = HistogramCollector("entropy", False, 128, 128, 99.99, "same")
    with contextlib.redirect_stdout(io.StringIO()):
        for batch in batches:
            collector.collect({"x": batch.astype(np.float32)})
        low, high = collector.compute_collection_result()["x"][:2]
    return float(low), float(high)


@pytest.mark.parametrize("shape", SHAPES)
def test_entropy_is_no_worse_than_onnx_runtimes(shape: str) -> None:
    values = SHAPES[shape](NORMAL).astype(np.float32)
    scale, zero = observe("entropy", values)
    ours = decibels(values, -zero * scale, (255 - zero) * scale)
    assert ours > decibels(values, *runtimes_entropy(values)) - 0.6


# Sizes of any kind.


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e20, 1e36])
def test_ranges_scale_with_the_values(size: float) -> None:
    for name in OBSERVERS:
        scale, zero = made_of(name, NORMAL)
        sized, same = made_of(name, (size * NORMAL.astype(np.float64)).astype(np.float32))
        assert sized == pytest.approx(size * scale, rel=0.1), name
        assert abs(same - zero) <= 5, name


def made_of(name: str, batches: Array) -> tuple[float, int]:
    observer = made(name)
    for batch in batches:
        observer(torch.from_numpy(batch))
    scale, zero = observer.calculate_qparams()
    return float(scale), int(zero)


def test_zeros_throughout_have_a_scale() -> None:
    for name in OBSERVERS:
        assert made_of(name, np.zeros((2, 10), np.float32)) == (2.0**-8, 0), name


@pytest.mark.parametrize("factor", [1.0, pytest.param(1e-16, marks=pytest.mark.slow), 1e-30])
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_layer_of_tiny_weights_loses_nothing(factor: float, rounding: Any) -> None:
    model = network()
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            model.get_parameter(name).mul_(factor)
        model.get_parameter("2.weight").div_(factor)
    images = torch.randn(8, 8, 10, 10, generator=torch.Generator().manual_seed(3))
    result = lobo_fx.compile(
        model,
        [QuantizeStatic(kernels="all", rounding=rounding)],
        example_inputs=images,
        calibration_data=[images],
        progress=False,
    )
    assert signal_to_noise(model(images), result.module(images)) > 33
