"""Number formats of few bits: what each code stands for, rounding to the nearest code, and packing.

A format holds unscaled values; a stored weight is `value(code) × scale`, with a scale for each block of a row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch

from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.registry import Registry

__all__ = ["FORMATS", "Format", "pack", "unit", "unpack"]


_BITS = (2, 3, 4, 6, 8)
"""Widths of codes that can be packed; the codes that fill whole bytes together fit in an int32."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A set of numbers and a code for each.

    Attributes:
        name: its name in passes and files.
        bits: width of a code: 2, 3, 4, 6 or 8.
        magnitudes: for a sign-magnitude format, the values of the codes without a sign: zero first, ascending and
            finite. Empty for integers, whose values are the codes minus a zero point.
        limits: smallest and largest code of an integer format; int8 is symmetric.
    """

    name: str
    bits: int
    magnitudes: tuple[float, ...] = ()
    limits: tuple[int, int] = (-127, 127)

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise InvalidInput(f"{self.name}: bits is {self.bits!r}; it must be one of {', '.join(map(str, _BITS))}")
        values = self.magnitudes
        ascend = all(low < high for low, high in itertools.pairwise(values))
        most = 2 ** (self.bits - 1)
        if values and not (values[0] == 0 and ascend and values[-1] < math.inf and len(values) <= most):
            raise InvalidInput(
                f"{self.name}: magnitudes must start at zero, ascend and be finite, and be at most {most}"
            )

    @property
    def is_integer(self) -> bool:
        return not self.magnitudes

    @property
    def zero_point(self) -> int:
        """The code of zero where no zero point is stored: int8 codes are signed, int4 codes are not."""
        return 8 if self.name == "int4" else 0

    @property
    def largest(self) -> float:
        """The largest magnitude that can have either sign."""
        return self.magnitudes[-1] if self.magnitudes else float(self.limits[1] - self.zero_point)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """The code nearest to each value; ties go to the even code, and values out of range to the largest."""
        if self.is_integer:
            low, high = self.limits
            rounded = (values.round() + self.zero_point).clamp(low, high)
            return rounded.to(torch.uint8 if self.zero_point else torch.int8)
        codes = torch.bucketize(values.abs(), self._boundaries, out_int32=True).to(torch.uint8)
        return codes | values.signbit().to(torch.uint8) << (self.bits - 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The value of each code, float32."""
        if self.is_integer:
            return codes.float() - self.zero_point
        return self.table.index_select(0, codes.flatten().int()).view(codes.shape)  # faster than table[codes]

    @functools.cached_property
    def table(self) -> torch.Tensor:
        """The value of every code; NaN for one that `encode` never gives."""
        half = 1 << (self.bits - 1)
        positive = torch.full((half,), math.nan)
        positive[: len(self.magnitudes)] = torch.tensor(self.magnitudes)
        return torch.cat([positive, -positive])

    @functools.cached_property
    def _boundaries(self) -> torch.Tensor:
        """The largest magnitude that still rounds to each code but the last."""
        values = torch.tensor(self.magnitudes)
        middles = (values[1:] + values[:-1]) / 2
        lower_is_odd = torch.arange(len(middles)) % 2 == 1
        return torch.where(lower_is_odd, torch.nextafter(middles, torch.tensor(0.0)), middles)


def _minifloat(exponent_bits: int, mantissa_bits: int, codes_left_out: int) -> tuple[float, ...]:
    """Magnitudes of a format with sign, exponent, mantissa and subnormals, without the last codes (infinity and NaN).

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - codes_left_out):
        exponent, mantissa = divmod(code, steps)
        significand = mantissa / steps + (exponent > 0)
        found.append(math.ldexp(significand, max(exponent, 1) - bias))
    return tuple(found)


def _logarithmic(bits: int) -> tuple[float, ...]:
    """Zero, and powers of two down from 1, in steps of an octave (4 bits), a quarter (6) or a sixteenth of one (8).

    More bits add resolution instead of range, as weights below a hundredth of the largest hardly matter.

    Source: Miyashita et al., "Convolutional Neural Networks using Logarithmic Data Representation", 2016.
    """
    largest, octave = 2 ** (bits - 1) - 1, 2 ** (bits - 4)
    powers = torch.exp2(torch.arange(1 - largest, 1, dtype=torch.float64) / octave)
    return (0.0, *powers.float().tolist())


_OWN = (
    Format("int8", 8),
    Format("int4", 4, limits=(0, 15)),
    Format("log2_4", 4, _logarithmic(4)),
    Format("log2_6", 6, _logarithmic(6)),
    Format("log2_8", 8, _logarithmic(8)),
    Format("e4m3", 8, _minifloat(4, 3, codes_left_out=1)),  # OCP's: NaN, but no infinity
    Format("e5m2", 8, _minifloat(5, 2, codes_left_out=4)),
    Format("e3m4", 8, _minifloat(3, 4, codes_left_out=16)),
)
FORMATS: Registry[Format] = Registry(
    "number format",
    "lobo_fx.number_formats",
    own={format.name: format for format in _OWN},
    must_be="a lobo_fx.own_operators.formats.Format",
    fits=lambda plugin: isinstance(plugin, Format),
)
"""Number formats by name, as `QuantizeWeights(format=...)` takes them. Those of other packages must have magnitudes,
and the name that they are registered under."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as a little-endian stream of bits, each row padded to whole bytes with zeros.

    Args:
        codes: unsigned, `[rows, columns]`.
        bits: width of a code; 8 returns the codes as they are.
    """
    if bits == 8:
        return codes
    count, width = unit(bits)
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes.int(), (0, -columns % count)).view(rows, -1, count)
    words = (padded << (bits * torch.arange(count, dtype=torch.int32))).sum(-1, keepdim=True)
    return (words >> (8 * torch.arange(width, dtype=torch.int32)) & 255).to(torch.uint8).flatten(1)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes that `pack` packed, `[rows, columns]`."""
    if bits == 8:
        return packed.flatten(1)
    count, width = unit(bits)
    grouped = packed.view(len(packed), packed.shape[1] // width, width).int()
    words = (grouped << (8 * torch.arange(width, dtype=torch.int32))).sum(-1, keepdim=True)
    codes = words >> (bits * torch.arange(count, dtype=torch.int32)) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def unit(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fill whole bytes, and how many bytes those are."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
