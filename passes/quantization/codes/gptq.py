"""Compensated rounding: the rest of a row makes up for the error of each weight (GPTQ)."""

from __future__ import annotations

from typing import Protocol

import torch

from lobo_fx.own_operators.formats import Format
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.quantization.codes.rounding import (
    Grid,
    Rounded,
    in_units,
    joined,
    least_squares_grid,
    rounded_on,
)

__all__ = ["round_compensated"]

_DAMPING = 0.01
"""Share of the mean diagonal that is added to XᵀX, as in the paper: it keeps the factor well conditioned."""
_LAZY = 128
"""Columns after which all later ones are updated at once (the paper's section 3.3): one large product is faster."""


def round_compensated(matrix: torch.Tensor, number: Format, block_size: int, gram: Gram) -> Rounded:
    """Rounds column after column; the columns to come make up for the error that each adds to the outputs.

    Zeros stay zero. A block's scale is chosen when its turn comes, from its weights as updated by then. If there are
    fewer rows of inputs than half the columns, they are used directly, in time linear in the columns and not cubic.

    Args:
        matrix: rows × columns.
        number: the format.
        block_size: neighbours in a row that share a scale.
        gram: Gram matrix of the layer's inputs; its groups share the rows of the matrix evenly.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """
    groups = len(gram.values)
    mean = gram.energy.mean(1) + gram.ridge
    ridges = gram.ridge + _DAMPING * torch.where(mean > 0, mean, 1.0)  # if all inputs are zero, any damping does
    is_low = not gram.is_sum and 2 * gram.values.shape[1] < gram.values.shape[2]
    values = gram.values if is_low else gram.sums

    def parts() -> list[Rounded]:
        found = []
        for rows, own, ridge in zip(matrix.chunk(groups), values, ridges.tolist(), strict=True):
            curvature = (_Rows if is_low else _Sums)(own, ridge, len(rows))
            found.append(_compensate(rows, number, block_size, curvature))
        return found

    return joined(iter(parts()))


class _Curvature(Protocol):
    """The curvature of the output error, which tells how later columns make up; asked for runs of columns in order."""

    def ahead(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The update of these columns for errors of all before them, (columns, rows), and their part of the factor U.

        U is the upper Cholesky factor of (XᵀX + λI)⁻¹ over the columns from the first of these on.
        """

    def settle(self, start: int, end: int, errors: torch.Tensor, moved: torch.Tensor) -> None:
        """Takes the result for these columns: errors divided by U's diagonal, and how far the columns moved in all."""


class _Sums:
    """Curvature from XᵀX, by one Cholesky factorization: from any column on, the rows of U serve the columns left."""

    def __init__(self, gram: torch.Tensor, ridge: float, rows: int) -> None:
        damped = gram.double().clone()
        damped.diagonal().add_(ridge)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        del damped
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()
        self.errors = torch.empty(len(gram), rows)

    def ahead(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return -self.factor[:start, start:end].T @ self.errors[:start], self.factor[start:end, start:end]

    def settle(self, start: int, end: int, errors: torch.Tensor, moved: torch.Tensor) -> None:
        self.errors[start:end] = errors


class _Rows:
    """Curvature from the rows X themselves, if they are few.

    With P = (X·Xᵀ + λI)⁻¹ over the columns that are left and r = X·moved over those that are done, the next columns B
    move by −(P·X_B)ᵀ·r, and the inverse of their own curvature, all later columns free, is S = I − X_Bᵀ·P·X_B. Without
    B, P becomes P + P·X_B·S⁻¹·(P·X_B)ᵀ (Woodbury): nothing of columns × columns is ever made.
    """

    def __init__(self, x: torch.Tensor, ridge: float, rows: int) -> None:
        self.x = x.double()
        kernel = self.x @ self.x.T
        kernel.diagonal().add_(ridge)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        self.residual = self.x.new_zeros(len(x), rows)

    def ahead(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.x[:, start:end]
        reach = self.inverse @ own
        left = torch.eye(end - start, dtype=own.dtype) - own.T @ reach
        factor = torch.linalg.cholesky(left, upper=True)
        spread = torch.linalg.solve_triangular(factor, reach, upper=True, left=False)
        self.inverse.addmm_(spread, spread.T)
        return -(reach.T @ self.residual).float(), factor.float()

    def settle(self, start: int, end: int, errors: torch.Tensor, moved: torch.Tensor) -> None:
        self.residual.addmm_(self.x[:, start:end], moved.double())


def _compensate(matrix: torch.Tensor, number: Format, block_size: int, curvature: _Curvature) -> Rounded:
    # Rounding column i leaves an error e. The columns after it move by −e · U[i, i+1:] / U[i, i], with U the upper
    # Cholesky factor of (XᵀX)⁻¹: of all changes to them, that one disturbs the layer's outputs least.
    matrix, unit = in_units(matrix)
    columns = matrix.shape[1]
    step = block_size if block_size < columns else _LAZY
    weights = matrix.T.contiguous()  # a column of the matrix in a row of memory
    frozen, values = weights == 0, torch.zeros_like(weights)  # values of frozen weights
    codes = torch.empty(weights.shape, dtype=torch.int8 if number.name == "int8" else torch.uint8)
    grids: list[Grid] = []
    for start in range(0, columns, step):
        end = min(start + step, columns)
        shift, factor = curvature.ahead(start, end)
        before = weights[start:end].clone()
        weights[start:end] += shift
        if start % block_size == 0:
            block = weights[start : start + block_size]
            grids.append(least_squares_grid(block.T.contiguous(), number))
            if number.name == "int8":  # keep the weight that sets the scale, so that rounding again changes nothing
                extreme = block.abs() == block.abs().amax(0)
                frozen[start : start + block_size] |= extreme
                values[start : start + block_size] = block * extreme
        grid, errors = grids[-1], torch.empty(end - start, len(matrix))
        column_grid = Grid(number, grid.scale.flatten(), grid.zero.flatten())
        for index in range(end - start):
            at = start + index
            codes[at] = column_grid.codes(torch.where(frozen[at], values[at], weights[at]))
            settled = column_grid.values(codes[at])
            errors[index] = (weights[at] - settled) / factor[index, index]  # (rows,)
            weights[at + 1 : end].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
            weights[at] = settled
        curvature.settle(start, end, errors, weights[start:end] - before)
    return rounded_on(codes.T.contiguous(), grids, unit)
