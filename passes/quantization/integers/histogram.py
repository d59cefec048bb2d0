"""Histograms with logarithmic bins: thirty-two in every octave, for either sign.

With bins of one width, the largest value sets the width: beside a value of 1e6, all values near 1 share a bin. Here a
bin is the leading bits of a float32, so that no value makes other bins coarser, and batches add up exactly.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["BINS", "Histogram", "count_values"]

Array = npt.NDArray[np.float64]

_MANTISSA_BITS = 5
_DROPPED_BITS = 23 - _MANTISSA_BITS
_MAGNITUDES = 255 << _MANTISSA_BITS  # exponent 255 is that of infinity and NaN
BINS = 2 * _MAGNITUDES
"""Number of bins, from the most negative values to the largest; the two in the middle hold zero and little else."""


def count_values(values: torch.Tensor) -> torch.Tensor:
    """How many values are in each bin: float64, `[BINS]`."""
    bits = values.detach().float().flatten().view(torch.int32)
    magnitude = ((bits & 0x7FFFFFFF) >> _DROPPED_BITS).clamp_(max=_MAGNITUDES - 1)
    place = torch.where(bits < 0, _MAGNITUDES - 1 - magnitude, _MAGNITUDES + magnitude)
    return torch.bincount(place, minlength=BINS).double()


@functools.cache
def _edges() -> Array:
    """The ends of all bins, ascending: one more than there are bins."""
    bits = np.arange(_MAGNITUDES + 1, dtype=np.int32) << _DROPPED_BITS
    positive = np.minimum(bits.view(np.float32), np.finfo(np.float32).max).astype(np.float64)
    return np.concatenate([-positive[:0:-1], positive])


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The bins that hold values, ascending; within a bin, values are taken to be spread evenly.

    Attributes:
        low: lower end of each bin.
        high: upper end.
        count: values in it.
    """

    low: Array
    high: Array
    count: Array

    @classmethod
    def of(cls, counts: torch.Tensor, lowest: float, highest: float) -> Histogram:
        """From what `count_values` counted.

        Args:
            counts: the sum of counts over batches.
            lowest: the lowest value, where the first bin begins.
            highest: the highest value, where the last bin ends.
        """
        count, edges = counts.numpy(), _edges().clip(lowest, highest)
        filled = count > 0
        return cls(edges[:-1][filled], edges[1:][filled], count[filled])

    def where(self, kept: npt.NDArray[np.bool_]) -> Histogram:
        """Some of the bins."""
        return Histogram(self.low[kept], self.high[kept], self.count[kept])

    def without_zeros(self) -> Histogram:
        """Without the bins around zero, which hold little but zeros."""
        return self.where((self.low > 0) | (self.high < 0))

    def coarser(self, width: float) -> Histogram:
        """With bins at least `width` wide, one of them around zero; ends of bins move to the nearest of that grid."""
        ends = np.concatenate([self.low, self.high]) / width
        places = np.unique(np.concatenate([np.floor(ends), np.ceil(ends[-1:] + 0.5)]) + 0.5) * width
        places = np.unique(np.append(places, [places[0] - width, places[-1] + width]))
        count = np.diff(self.share_below(places)) * self.count.sum()
        filled = count > 0
        places = places.clip(self.low[0], self.high[-1])
        return Histogram(places[:-1][filled], places[1:][filled], count[filled])

    def mirrored(self) -> Histogram:
        """The histogram of the negated values."""
        return Histogram(-self.high[::-1], -self.low[::-1], self.count[::-1])

    def quantile(self, share: float) -> float:
        """The smallest value such that this share of all values is at or below it."""
        below = np.cumsum(self.count)
        wanted = share * below[-1]
        place = int(np.searchsorted(below, wanted * (1 - 1e-12)))  # rounding must not skip to the next bin
        part = 1 - min((below[place] - wanted) / self.count[place], 1.0)
        return float(self.low[place] + part * (self.high[place] - self.low[place]))

    def share_below(self, places: Array) -> Array:
        """The share of the values below each place."""
        ends = np.stack([self.low, self.high], 1).ravel()
        after = np.cumsum(self.count)
        found: Array = np.interp(places, ends, np.stack([after - self.count, after], 1).ravel() / after[-1])
        return found
