"""Evens the columns of a weight by the size of their inputs: columns of small inputs need fewer steps.

A row of codes has one scale, or one per block, which its largest weight sets. Where inputs differ in size (power
spectra, several sensors side by side), the largest weights are those of the smallest inputs, and steps fine enough for
them are too coarse for other columns. So `W·f` is rounded, and multiplied by `1/f` where it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.own_operators.formats import Format
from lobo_fx.passes.fitting.layer_grams import collect_energies
from lobo_fx.passes.quantization.codes.compensation import roles_of_weight
from lobo_fx.passes.quantization.codes.rounding import full_range
from lobo_fx.passes.quantization.codes.weights import Weight

__all__ = ["best_factor", "even_columns", "factor_for", "weight_noise"]

_STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Powers of the inputs' sizes that are tried as factors; at 1 all columns weigh the same in the outputs."""
_GAIN = 10**0.1
"""A factor must lower the noise by this much: a decibel."""
_LEAST = 1e-4
"""Least size of an input, as a share of the largest: other data may have larger values of it."""


def weight_noise(matrix: torch.Tensor, number: Format, block_size: int, energy: torch.Tensor) -> float:
    """Expected energy of the errors that rounding adds to the outputs, if errors are uniform within a step.

    Args:
        matrix: rows × columns.
        number: an integer format.
        block_size: neighbours in a row that share a scale.
        energy: mean squares of the inputs, (columns,).
    """
    missing = -matrix.shape[1] % block_size
    blocks = torch.nn.functional.pad(matrix, (0, missing)).view(len(matrix), -1, block_size)
    steps = full_range(blocks, number).scale.squeeze(-1).double()  # (rows, blocks)
    per_block = torch.nn.functional.pad(energy.double(), (0, missing)).view(-1, block_size).sum(1)
    return float((steps.square() @ per_block).sum() / 12)


def best_factor(energy: torch.Tensor, noise: Callable[[torch.Tensor], float]) -> torch.Tensor | None:
    """The best factor for each column of a weight, (columns,); None if no factor gains a decibel.

    Args:
        energy: mean squares of the inputs, (columns,).
        noise: gives the noise at a factor.
    """
    largest = energy.max()
    if not bool(largest > 0):
        return None
    typical = energy[energy > 0].median()  # stands in for inputs that were always zero
    size = torch.where(energy > 0, energy, typical).clamp_min(_LEAST**2 * largest).sqrt().float()
    size = size / size.log().mean().exp()
    best, least = None, noise(torch.ones_like(size)) / _GAIN
    for strength in _STRENGTHS:
        factor = size**strength
        if (found := noise(factor)) < least:
            best, least = factor, found
    return best


def factor_for(
    matrix: torch.Tensor, number: Format, block_size: int, energy: torch.Tensor | None
) -> torch.Tensor | None:
    """The best factor for a weight that is decoded, (columns,); None where there is none.

    Args:
        matrix: rows × columns.
        number: the format.
        block_size: neighbours in a row that share a scale.
        energy: mean squares of the inputs, (groups, columns).
    """
    if energy is None or len(energy) != 1 or not number.is_integer:
        return None
    (own,) = energy
    return best_factor(own, lambda factor: weight_noise(matrix * factor, number, block_size, own / factor.square()))


def even_columns(
    program: Program, weights: Sequence[Weight], number: Format, batches: Iterable[Inputs]
) -> dict[str, torch.Tensor]:
    """Factors for weights that are decoded with one scale a row, by each name; those that gain nothing have none."""
    energies = collect_energies(program, [role for weight in weights for role in roles_of_weight(weight)], batches)
    found = dict[str, torch.Tensor]()
    for weight in weights:
        own = roles_of_weight(weight)
        if all(role in energies for role in own):
            energy = torch.stack([energies[role] for role in own]).mean(0)
            factor = factor_for(weight.matrix, number, weight.matrix.shape[1], energy)
            if factor is not None:
                found |= dict.fromkeys(weight.names, factor)  # a converted graph has only the names that it reads
    return found
