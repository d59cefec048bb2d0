"""Observers: how the range of an activation is chosen from calibration data.

All but two keep a histogram of fixed size (torchao's), so memory does not grow with the data; they differ in the
range that they read off it. `moving_average` and `min_max` keep two numbers.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import torch
from torchao.quantization.pt2e import (
    FakeQuantize,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from lobo_fx.passes.quantization.integers.placement import Observing

__all__ = [
    "OBSERVERS",
    "SMALLEST_SCALE",
    "EntropyObserver",
    "MeanSquaredErrorObserver",
    "Observers",
    "PercentileObserver",
    "observers",
]

SMALLEST_SCALE = 2.0**-60
"""Far below any scale in use, and its square is still a normal float32."""

_SHRINKS = 64
"""How many shorter ranges are tried at each end, down to a fiftieth of the whole."""

_SMALLEST_SHARE = 0.02


class PercentileObserver(HistogramObserver):
    """Cuts the same share of the values off at each end that has any beyond zero.

    Args:
        percentile: share of the values that stays below the upper limit, in percent.
    """

    def __init__(self, percentile: float = 99.99, **settings: Any) -> None:
        super().__init__(**settings)
        self.percentile = percentile

    def _non_linear_param_search(self) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.histogram.double().cumsum(0) / self.histogram.sum()
        rest = 1 - self.percentile / 100
        width = (self.max_val - self.min_val) / self.bins
        low = self.min_val + width * int((share <= rest).sum())
        high = self.min_val + width * (int((share < 1 - rest).sum()) + 1)
        return torch.minimum(low, self.max_val), torch.minimum(high, self.max_val)


class _SearchingObserver(HistogramObserver, abc.ABC):
    """Tries shorter ranges, first from above, then from below, and takes the one that loses least."""

    def _non_linear_param_search(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = float(self.min_val), float(self.max_val)
        if not low < high:
            return self.min_val, self.max_val
        width = (high - low) / self.bins
        centers = low + width * (torch.arange(self.bins, dtype=torch.float64) + 0.5)
        counts = self.histogram.double()
        shares = torch.linspace(1, _SMALLEST_SHARE, _SHRINKS).tolist()
        high = min((share * high for share in shares), key=lambda limit: self.loss(centers, counts, low, limit))
        low = min((share * low for share in shares), key=lambda limit: self.loss(centers, counts, limit, high))
        return torch.tensor(low), torch.tensor(high)

    @abc.abstractmethod
    def loss(self, centers: torch.Tensor, counts: torch.Tensor, low: float, high: float) -> float:
        """What is lost when values are quantized to this range, which holds zero after rounding."""

    def quantized(self, values: torch.Tensor, low: float, high: float) -> torch.Tensor:
        """Values after quantization to the range, zero exactly representable."""
        low, high = min(low, 0.0), max(high, 0.0)
        levels = int(self.quant_max) - int(self.quant_min)
        scale = max((high - low) / levels, torch.finfo(torch.float32).tiny)
        zero = round(-low / scale)
        return ((values / scale).round() + zero).clamp(0, levels).sub(zero) * scale


class MeanSquaredErrorObserver(_SearchingObserver):
    """The range with the smallest squared error over all values seen, rounding and clipping together."""

    def loss(self, centers: torch.Tensor, counts: torch.Tensor, low: float, high: float) -> float:
        """Sum of squared errors."""
        return float(((centers - self.quantized(centers, low, high)).square() * counts).sum())


class EntropyObserver(_SearchingObserver):
    """The range whose quantized distribution diverges least from the values' own.

    Source: Migacz, "8-bit Inference with TensorRT", 2017.
    """

    def loss(self, centers: torch.Tensor, counts: torch.Tensor, low: float, high: float) -> float:
        """Kullback-Leibler divergence of the quantized values' histogram, spread over the bins of each level."""
        clipped = centers.clamp(min(low, 0.0), max(high, 0.0))
        inside = clipped == centers
        kept = counts * inside
        kept[inside.nonzero()[0]] += counts[centers < clipped].sum()
        kept[inside.nonzero()[-1]] += counts[centers > clipped].sum()
        level = torch.unique(self.quantized(centers, low, high), return_inverse=True)[1]
        filled = (counts > 0) & inside
        mass = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, level, counts * inside)
        bins = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, level, filled.double())
        spread = torch.where(filled, mass[level] / bins[level].clamp_min(1), 0)
        p, q = kept / kept.sum(), spread / spread.sum().clamp_min(1e-300)
        seen = p > 0
        return float((p[seen] * (p[seen] / q[seen].clamp_min(1e-12)).log()).sum())


OBSERVERS: dict[str, type] = {
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "percentile": PercentileObserver,
    "histogram": HistogramObserver,
    "entropy": EntropyObserver,
    "mse": MeanSquaredErrorObserver,
}
"""By name, as `QuantizeStatic(observer=...)` takes them; `histogram` minimises an approximate squared error."""


@dataclasses.dataclass(frozen=True)
class Observers:
    """Constructors of observers (or fake quantizers), one for each kind of tensor.

    Attributes:
        activation: for what an operator reads and gives, one range a tensor.
        weight: for weights, a range for each output channel.
    """

    activation: Any
    weight: Any


def observers(observing: Observing, training: bool) -> Observers:
    """What watches the values around an operator.

    While weights train, activations move: their ranges follow moving averages, whatever was asked for.

    Args:
        observing: what was asked for.
        training: whether values are rounded on the way (fake quantizers), so that training feels it.

    Source: of training: Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018, section 3.
    """
    if training:
        fake = functools.partial(FakeQuantize.with_args, eps=SMALLEST_SCALE)
        # an average of the last alone: the range of the weights as they are, not of all that they have been
        weight = fake(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0)
        return Observers(fake(observer=MovingAverageMinMaxObserver), weight)
    more = {"percentile": observing.percentile} if observing.observer == "percentile" else {}
    activation = OBSERVERS[observing.observer].with_args(eps=SMALLEST_SCALE, **more)  # type: ignore[attr-defined]
    return Observers(activation, PerChannelMinMaxObserver.with_args(eps=SMALLEST_SCALE))
