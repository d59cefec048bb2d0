"""Observers: how the range of an activation is chosen from calibration data.

All but two keep a histogram of fixed size, so memory does not grow with the data; they differ in the range that they
read off it. `moving_average` and `min_max` keep two numbers, and follow every outlier.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np
import torch
from torchao.quantization.pt2e import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

from lobo_fx.passes.quantization.integers.histogram import BINS, Histogram, count_values
from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS
from lobo_fx.passes.quantization.integers.placement import PERCENTILE, Observing

__all__ = [
    "SMALLEST_SCALE",
    "ChannelObserver",
    "CountingObserver",
    "EntropyObserver",
    "HistogramObserver",
    "MeanSquaredErrorObserver",
    "MovingObserver",
    "Observers",
    "PercentileObserver",
    "RangeObserver",
    "observers",
]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Smaller scales are subnormal."""
_SCALE_OF_ZEROS = 2.0**-8
"""Scale of a tensor that was always zero: any scale holds zeros, and with this one biases get a fine scale."""

_OCTAVES = 30
"""How many octaves below the largest value the end of a range is searched."""
_STEPS = 16
"""Ends tried in an octave around the best one, which is first found in steps of half an octave."""

_ISOLATED = 1e-3
"""Most isolated values that are left out, as a share of all values but zeros."""
_FAR = 4.0
"""Isolated values are this many times further out than other rows reach. If values are this many times beyond an
observer's range, whatever is computed from them is observed again."""
_RAREST = 1e-3
"""Share of the values at either end that the width of `EntropyObserver`'s bins ignores."""
_FEW = 1 / 64
"""Share of the rows that may hold isolated values; one row always may, if there are three others."""


class _Scaled(UniformQuantizationObserverBase):
    """Gives a tensor that was always zero a scale of its own; all others keep the scale of their range."""

    def _calculate_qparams(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = super()._calculate_qparams(low, high)
        return (scale.masked_fill((low == 0) & (high == 0), _SCALE_OF_ZEROS) if low.numel() else scale), zero


class RangeObserver(_Scaled, MinMaxObserver):
    """The range from the smallest to the largest value."""


class MovingObserver(_Scaled, MovingAverageMinMaxObserver):
    """Moving averages of the smallest and the largest value of a batch."""


class ChannelObserver(_Scaled, PerChannelMinMaxObserver):
    """The range from the smallest to the largest weight of each channel."""


class TrainingChannelObserver(_Scaled, MovingAveragePerChannelMinMaxObserver):
    """The range of each channel's weights while weights train: that of the latest weights alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(averaging_constant=1.0, **settings)


class CountingObserver(_Scaled, abc.ABC):
    """Counts values in a histogram; the range is chosen when it is asked for. A subclass says how: `choose`.

    Attributes:
        rows: how many rows the next batch has; they are equal parts of the value, one after another.
    """

    counts: torch.Tensor
    min_val: torch.Tensor
    max_val: torch.Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))
        self.rows = 1
        self._found: tuple[float, float] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            self.see(x.detach())
            self._found = None
        return x

    def see(self, x: torch.Tensor) -> None:
        """Adds the values of one batch."""
        low, high = x.aminmax()
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))
        self.counts += count_values(x)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self.range
        return self._calculate_qparams(torch.tensor(low), torch.tensor(high))

    @property
    def range(self) -> tuple[float, float]:
        """The range that was chosen."""
        if self._found is None:
            low, high = float(self.min_val), float(self.max_val)
            self._found = self.choose(Histogram.of(self.counts, low, high)) if low < high else (low, high)
        return self._found

    @property
    def limits(self) -> tuple[float, float] | None:
        """The ends of the range where values far beyond them were seen, else None."""
        low, high = min(self.range[0], 0.0), max(self.range[1], 0.0)
        far = _FAR * max(high, -low)
        return (low, high) if max(float(self.max_val), -float(self.min_val)) > far else None

    @abc.abstractmethod
    def choose(self, seen: Histogram) -> tuple[float, float]:
        """The range for the values that were seen."""


class PercentileObserver(CountingObserver):
    """Cuts off the same share of the values at each end that has values beyond zero.

    Args:
        percentile: share of the values that stays below the upper limit, in percent.
    """

    def __init__(self, percentile: float = PERCENTILE, **settings: Any) -> None:
        super().__init__(**settings)
        self.percentile = percentile

    def choose(self, seen: Histogram) -> tuple[float, float]:
        share = self.percentile / 100
        return -seen.mirrored().quantile(share), seen.quantile(share)


class _SearchingObserver(CountingObserver):
    """Tries ranges cut to one magnitude at both ends, then refines each end; takes the shortest of the least loss."""

    def choose(self, seen: Histogram) -> tuple[float, float]:
        if not len(seen.count):
            return float(self.min_val), float(self.max_val)
        lowest, highest = float(seen.low[0]), float(seen.high[-1])
        reach = max(-lowest, highest)

        def lost(low: float, high: float) -> float:
            return self.loss(seen, min(low, 0.0), max(high, 0.0))

        def tried(around: float, end: float) -> list[float]:
            """Ends up to half an octave from one that was found, the nearest to zero first; none of the wrong sign."""
            steps = np.exp2(np.arange(-_STEPS // 2, _STEPS // 2 + 1) / _STEPS)
            return sorted({min(around * float(step), end) for step in steps}) if end > 0 else [end]

        magnitudes = [reach * 2 ** (-step / 2) for step in reversed(range(2 * _OCTAVES))]
        limit = min(magnitudes, key=lambda limit: lost(max(lowest, -limit), min(highest, limit)))
        low = max(lowest, -limit)
        high = min(tried(limit, highest), key=lambda high: lost(low, high))
        low = -min(tried(limit, -lowest), key=lambda end: lost(-end, high))
        return low, high

    def grid(self, low: float, high: float) -> tuple[float, int, int]:
        """Scale, zero point and largest code of a range that holds zero."""
        largest = int(self.quant_max) - int(self.quant_min)
        scale = max((high - low) / largest, SMALLEST_SCALE)
        return scale, round(-low / scale), largest

    @abc.abstractmethod
    def loss(self, seen: Histogram, low: float, high: float) -> float:
        """The loss when values are quantized to a range that holds zero."""


class MeanSquaredErrorObserver(_SearchingObserver):
    """The range with the smallest squared error over all values seen, rounding and clipping together."""

    def loss(self, seen: Histogram, low: float, high: float) -> float:
        """Sum of squared errors."""
        scale, zero, largest = self.grid(low, high)

        def code(x: Any) -> Any:
            return np.clip(np.round(x), -zero, largest - zero)

        def integral(x: Any) -> Any:
            """Integral of (x - code(x))², x in units of the scale: from code to code it grows by 1/12."""
            return code(x) / 12 + (x - code(x)) ** 3 / 3

        start, end = seen.low / scale, seen.high / scale
        wide = end > start
        width = np.where(wide, end - start, 1.0)
        mean = np.where(wide, (integral(end) - integral(start)) / width, (start - code(start)) ** 2)
        return float((seen.count * mean).sum()) * scale**2


class HistogramObserver(MeanSquaredErrorObserver):
    """The range of least squared error without isolated values: a few far from all others, in hardly any of the rows.

    An isolated value tells more about its row than about the data. Values that many rows reach count, however rare they
    are in each.
    """

    peaks: torch.Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("peaks", torch.zeros(BINS, dtype=torch.float64))

    def see(self, x: torch.Tensor) -> None:
        super().see(x)
        self.peaks += count_values(x.reshape(self.rows, -1).abs().amax(1))

    def choose(self, seen: Histogram) -> tuple[float, float]:
        peaks = Histogram.of(self.peaks, 0.0, max(-float(self.min_val), float(self.max_val)))
        rows = float(peaks.count.sum())
        others = 1 - max(1 / rows, _FEW) if rows > 3 else 1.0
        limit = _FAR * float(peaks.high[np.searchsorted(np.cumsum(peaks.count), others * rows * (1 - 1e-12))])
        near = (seen.high <= limit) & (seen.low >= -limit)
        let_go, values = float(seen.count[~near].sum()), float(seen.without_zeros().count.sum())
        return super().choose(seen.where(near) if let_go <= _ISOLATED * values else seen)


class EntropyObserver(_SearchingObserver):
    """The range whose quantized distribution diverges least from the values' own.

    Zeros are left out: they stay zeros in every range.

    Source: Migacz, "8-bit Inference with TensorRT", 2017. There, the bins that are compared are far finer than a level,
        and what few values leave to chance in each, or a peak in one, counts as divergence: ranges get too short. Here
        all but the rarest values span half as many bins as there are levels, and a level holds whole bins, so that
        only a range that is too long for them merges bins.
    """

    _bin = 1.0

    def choose(self, seen: Histogram) -> tuple[float, float]:
        values = seen.without_zeros()
        if not len(values.count):
            return float(self.min_val), float(self.max_val)
        low, high = -values.mirrored().quantile(1 - _RAREST), values.quantile(1 - _RAREST)
        levels = int(self.quant_max) - int(self.quant_min) + 1
        self._bin = 2 * (max(high, 0.0) - min(low, 0.0)) / levels
        return super().choose(values.coarser(self._bin))

    def loss(self, seen: Histogram, low: float, high: float) -> float:
        """I-divergence of the clipped values from the values inside the range, spread evenly over each level."""
        scale = self.grid(low, high)[0]
        merged = max(1, int(scale / self._bin))
        start, end = low - scale / 2, high + scale / 2
        first, last = (round(place / self._bin / merged) for place in (start, end))
        inner = (np.arange(first, last + 1) * merged - merged // 2 - 0.5) * self._bin
        lowest, highest = max(start, seen.low[0]), min(end, seen.high[-1])  # a level is spread where values are
        levels = np.concatenate([[lowest], inner[(inner > lowest) & (inner < highest)], [highest]])
        below = seen.share_below(levels)
        ends = np.concatenate([seen.low, seen.high])
        places = np.union1d(levels, ends[(ends > start) & (ends < end)])
        share, spread = np.diff(seen.share_below(places)), np.diff(np.interp(places, levels, below))
        filled = share > 0
        found = float((share[filled] * np.log(share[filled] / np.maximum(spread[filled], 1e-300))).sum())
        one = 1 / seen.count.sum()
        edges = seen.share_below(np.array([start, start + scale, end - scale, end]))
        for clipped, level in ((edges[0], edges[1] - edges[0]), (1 - edges[3], edges[3] - edges[2])):
            if clipped > 0:
                whole, level = clipped + level, max(level, one)
                found += float(whole * np.log(whole / level) - whole + level)
        return max(found, 0.5 * float(one))  # half a value more or less says nothing


@dataclasses.dataclass(frozen=True)
class Observers:
    """Constructors of observers (or fake quantizers), one for each kind of tensor.

    Attributes:
        activation: for inputs and outputs of operators, one range for each tensor.
        weight: for weights, one range for each output channel.
    """

    activation: Any
    weight: Any


def observers(observing: Observing, training: bool) -> Observers:
    """Constructors of the observers for the values around an operator.

    While weights train, activations change: their ranges follow moving averages, whatever was asked for.

    Args:
        observing: what was asked for.
        training: whether to use fake quantizers, so that training sees rounded values.

    Source: of training: Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018, section 3.
    """
    if training:
        kinds = (MovingObserver, TrainingChannelObserver)
        return Observers(*(FakeQuantize.with_args(observer=kind, eps=SMALLEST_SCALE) for kind in kinds))
    more = {"percentile": observing.percentile} if observing.observer == "percentile" else {}
    activation = OBSERVERS[observing.observer].with_args(eps=SMALLEST_SCALE, **more)
    return Observers(activation, ChannelObserver.with_args(eps=SMALLEST_SCALE))
