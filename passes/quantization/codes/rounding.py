"""Codes and scales for a weight: rounding to the nearest, half-quadratic, and with the error compensated (GPTQ).

A weight is a matrix of rows (outputs) × columns (inputs); every block of neighbours in a row has a scale, and int4
a zero point too. Zero points are whole numbers, so zero is a code in every format and pruned weights stay zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from lobo_fx.own_operators.formats import Format

__all__ = [
    "Grid",
    "Rounded",
    "full_range",
    "half_quadratic_grid",
    "in_units",
    "joined",
    "least_squares_grid",
    "round_nearest",
    "rounded_on",
]

_FACTORS = tuple(1.08 - 0.06 * step for step in range(9))
"""Shares of the full range that are tried in formats of less than 8 bits."""

_CHUNK = 1 << 22
"""Weights that are rounded at a time, so that temporaries stay small."""

_HQQ_NORM, _HQQ_BETA, _HQQ_GROWTH, _HQQ_STEPS = 0.7, 10.0, 1.01, 20


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight in codes.

    Attributes:
        codes: `[rows, columns]`, one entry a code.
        scale: `[rows, blocks]`.
        zero_point: `[rows, blocks]` codes of zero; None where the format has a fixed one.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def values(self, number: Format, block_size: int) -> torch.Tensor:
        """The weight that the codes stand for."""
        block = torch.arange(self.codes.shape[1]) // block_size
        values = number.decode(self.codes)
        if self.zero_point is not None:
            values = values - number.decode(self.zero_point)[:, block]
        return values * self.scale[:, block]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that codes can take: `[…, 1]` scales and zero points (relative to the format's own).

    Attributes:
        number: the format.
        scale: scale of each block.
        zero: zero point of each block, added after rounding.
    """

    number: Format
    scale: torch.Tensor
    zero: torch.Tensor

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        if not self.number.is_integer:
            return self.number.encode(values / self.scale)
        # rounding comes before the zero point, as a runtime has it: a tie goes to the even multiple of the scale
        return self.number.encode((values / self.scale).round() + self.zero)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return (self.number.decode(codes) - self.zero) * self.scale

    def error(self, values: torch.Tensor, power: float = 2.0) -> torch.Tensor:
        """Sum of the errors of each block, to a power."""
        return (self.values(self.codes(values)) - values).abs().pow(power).sum(-1, keepdim=True)

    def where(self, condition: torch.Tensor, other: Grid) -> Grid:
        return Grid(
            self.number,
            torch.where(condition, self.scale, other.scale),
            torch.where(condition, self.zero, other.zero),
        )


def round_nearest(matrix: torch.Tensor, number: Format, block_size: int, method: str = "round") -> Rounded:
    """Rounds each weight to its nearest code.

    Args:
        matrix: rows × columns, float32.
        number: the format.
        block_size: neighbours in a row that share a scale.
        method: `round` takes the scale of least squared error; `hqq` refines it with outliers set apart.
    """
    fit = {"round": least_squares_grid, "hqq": half_quadratic_grid}[method]
    return joined(_round_chunk(chunk, number, block_size, fit) for chunk in _chunks(matrix))


def in_units(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides every row by a power of two that brings its largest weight near 1; also gives these powers, `[rows, 1]`.

    Without this, squares of weights of 1e-25 would be zero in float32. Dividing by a power of two loses no bit.
    """
    _, exponent = torch.frexp(matrix.abs().amax(1, keepdim=True))
    half = exponent.div(2, rounding_mode="floor")  # in two steps: the inverse of a subnormal is no float32
    divided = torch.ldexp(torch.ldexp(matrix, -half), half - exponent)
    return divided, torch.ldexp(torch.ones_like(exponent, dtype=matrix.dtype), exponent)


def _round_chunk(matrix: torch.Tensor, number: Format, block_size: int, fit: object) -> Rounded:
    rows, columns = matrix.shape
    matrix, unit = in_units(matrix)
    blocks = torch.nn.functional.pad(matrix, (0, -columns % block_size)).view(rows, -1, block_size)
    grid = fit(blocks, number)  # type: ignore[operator]
    codes = grid.codes(blocks).view(rows, -1)[:, :columns].contiguous()
    return rounded_on(codes, [grid], unit)


def _chunks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(torch.split(matrix, max(1, _CHUNK // max(1, matrix.shape[1]))))


def joined(parts: Iterator[Rounded]) -> Rounded:
    codes, scales, zeros = zip(*((part.codes, part.scale, part.zero_point) for part in parts), strict=True)
    return Rounded(torch.cat(codes), torch.cat(scales), None if zeros[0] is None else torch.cat(zeros))


def rounded_on(codes: torch.Tensor, grids: list[Grid], unit: torch.Tensor) -> Rounded:
    """Codes with the scales and zero points of their blocks, scales times the unit of each row."""
    rows, number = len(codes), grids[0].number
    scale, zero = (torch.cat([part.view(rows, -1) for part in parts], 1) for parts in zip(*_parts(grids), strict=True))
    stored = (zero + number.zero_point).to(torch.uint8) if number.zero_point else None
    return Rounded(codes, _positive(scale * unit), stored)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """The scale, or 1 where it is not positive: a block of zeros may have any scale."""
    return torch.where(scale > 0, scale, 1.0)


def _parts(grids: list[Grid]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((grid.scale, grid.zero) for grid in grids)


def least_squares_grid(blocks: torch.Tensor, number: Format) -> Grid:
    """The scale of least squared error among shares of the full range, then fitted to the codes it gives.

    With 8 bits the full range is taken: cutting it would gain nothing worth having.

    Args:
        blocks: `[…, block size]`.
        number: the format.
    """
    full = full_range(blocks, number)
    if number.bits == 8:
        return full
    best, least = full, full.error(blocks)
    for factor in _FACTORS:
        candidate = Grid(number, full.scale * factor, full.zero)
        best, least = _better(candidate, best, least, blocks)
    steps = number.decode(best.codes(blocks)) - best.zero
    fitted = (blocks * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
    return _better(Grid(number, _positive(fitted), best.zero), best, least, blocks)[0]


def _better(
    candidate: Grid, best: Grid, least: torch.Tensor, blocks: torch.Tensor, power: float = 2.0
) -> tuple[Grid, torch.Tensor]:
    error = candidate.error(blocks, power)
    return candidate.where(error < least, best), torch.minimum(error, least)


def full_range(blocks: torch.Tensor, number: Format) -> Grid:
    """The grid whose ends are the smallest and the largest value; only int4 has a zero point to move."""
    if number.name != "int4":
        scale = blocks.abs().amax(-1, keepdim=True) / number.largest
        return Grid(number, _positive(scale), torch.zeros_like(scale))
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = _positive((high - low) / 15)
    return Grid(number, scale, (-low / scale).round() - number.zero_point)


def half_quadratic_grid(blocks: torch.Tensor, number: Format) -> Grid:
    """The grid of least error in a norm that forgives outliers: they are split off, and the rest is fitted.

    It works in units of the scale, so that the result does not depend on the size of the weights. Only int4
    has a zero point to move; the scale is fitted in every format.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
    """
    grid = best = full_range(blocks, number)
    least, beta = best.error(blocks, _HQQ_NORM), _HQQ_BETA
    for _ in range(_HQQ_STEPS):
        steps = number.decode(grid.codes(blocks))
        error = blocks / grid.scale - (steps - grid.zero)
        outliers = error.sign() * (error.abs() - error.abs().pow(_HQQ_NORM - 1) / beta).clamp(min=0)
        rest = blocks - outliers.nan_to_num() * grid.scale
        zero = grid.zero
        if number.zero_point:
            zero = (steps - rest / grid.scale).mean(-1, keepdim=True).round()
            zero = zero.clamp(-number.zero_point, 15 - number.zero_point)
        centred = steps - zero
        scale = (rest * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True)
        grid = Grid(number, _positive(scale), zero)
        best, least = _better(grid, best, least, blocks, _HQQ_NORM)
        beta *= _HQQ_GROWTH
    return best
