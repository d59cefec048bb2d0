"""Compensated rounding: the rest of a row makes up for the error of each weight (GPTQ)."""

from __future__ import annotations

import torch

from lobo_fx.own_operators.formats import Format
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
"""Columns after which all that follow are updated at once (the paper's section 3.3): one large product is faster."""


def round_compensated(matrix: torch.Tensor, number: Format, block_size: int, gram: torch.Tensor) -> Rounded:
    """Column after column is rounded, and what that adds to the outputs is taken back by the columns to come.

    Zeros stay zero. A scale is chosen when its block's turn comes, from the weights as they are by then.

    Args:
        matrix: rows × columns.
        number: the format.
        block_size: neighbours in a row that share a scale.
        gram: XᵀX of the layer's inputs, groups × columns × columns; each group has as many rows.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """
    parts = zip(matrix.chunk(len(gram)), gram, strict=True)
    return joined(_compensate(rows, number, block_size, own) for rows, own in parts)


def _compensate(matrix: torch.Tensor, number: Format, block_size: int, gram: torch.Tensor) -> Rounded:
    # Rounding column i leaves an error e. The columns after it move by −e · U[i, i+1:] / U[i, i], with U the upper
    # Cholesky factor of (XᵀX)⁻¹: of all changes to them, that one disturbs the layer's outputs least.
    matrix, unit = in_units(matrix)
    columns = matrix.shape[1]
    step = block_size if block_size < columns else _LAZY
    weights = matrix.T.contiguous()  # a column of the matrix in a row of memory
    frozen, inverse = weights == 0, _inverse_factor(gram)  # (columns, rows), (columns, columns)
    values = torch.zeros_like(weights)  # of what is frozen
    codes = torch.empty(weights.shape, dtype=torch.int8 if number.name == "int8" else torch.uint8)
    grids: list[Grid] = []
    for start in range(0, columns, step):
        end = min(start + step, columns)
        if start % block_size == 0:
            block = weights[start : start + block_size]
            grids.append(least_squares_grid(block.T.contiguous(), number))
            if number.name == "int8":  # what the scale comes from stays: rounded once more, nothing would change
                extreme = block.abs() == block.abs().amax(0)
                frozen[start : start + block_size] |= extreme
                values[start : start + block_size] = block * extreme
        grid, errors = grids[-1], torch.empty(end - start, len(matrix))
        scale, zero = grid.scale.flatten(), grid.zero.flatten()
        column_grid = Grid(number, scale, zero)
        for index in range(start, end):
            codes[index] = column_grid.codes(torch.where(frozen[index], values[index], weights[index]))
            error = (weights[index] - column_grid.values(codes[index])) / inverse[index, index]  # (rows,)
            weights[index + 1 : end].addr_(inverse[index, index + 1 : end], error, alpha=-1)
            errors[index - start] = error
        weights[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return rounded_on(codes.T.contiguous(), grids, unit)


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped inverse; an input that is always zero has no say."""
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
