"""Rounds weights to the codes that they will be stored as; the rest of a row makes up for each error (GPTQ)."""

from __future__ import annotations

import dataclasses

import torch

from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.quantization.codes.compensation import with_grams
from lobo_fx.passes.quantization.codes.evening import even_columns, factor_for
from lobo_fx.passes.quantization.codes.gptq import round_compensated
from lobo_fx.passes.quantization.codes.weights import Weight, find_weights
from lobo_fx.passes.quantization.integers.placement import Placement

__all__ = ["even_floating", "restore_floating", "round_weights"]

_INT8 = FORMATS.ours("int8")


def round_weights(program: Program, placement: Placement, context: Context) -> dict[str, torch.Tensor]:
    """Rounds weights in place, so that rounding them to the nearest code later changes nothing.

    A weight whose readers all run as integers has the range of the CPU's integers, others that of stored int8. Weights
    that overrides leave float stay as they are, and so do weights that anything but a layer reads.

    Args:
        program: shapes propagated.
        placement: where integers run.
        context: gives calibration data.

    Returns:
        Factors for the columns of weights that stay float, to be multiplied with when these are stored, by each name.

    Source: see `lobo_fx.passes.quantization.codes.gptq`.
    """
    found = _weights(program, placement, context)
    # round all weights before the first is changed: Gram matrices are those of the float network
    rounded = [(weight, _round(weight, gram, placement)) for weight, gram in with_grams(program, found, context)]
    factors = dict[str, torch.Tensor]()
    for weight, result in rounded:
        if result is not None:
            values, factor = result
            weight.put(values)
            if factor is not None:
                factors |= dict.fromkeys(weight.names, factor)
    return factors


def even_floating(program: Program, placement: Placement, context: Context) -> dict[str, torch.Tensor]:
    """Factors for the columns of weights that stay float, to be multiplied with when these are stored, by each name."""
    found = [weight for weight in _weights(program, placement, context) if _stays_float(weight, placement)]
    return even_columns(program, found, _INT8, context.fitting_batches()) if found else {}


def restore_floating(program: Program, original: Program, placement: Placement, context: Context) -> None:
    """Takes the rounding back of weights whose readers all stay float.

    Args:
        program: the program whose weights `round_weights` rounded; changed.
        original: the same program with weights as they were.
        placement: where integers run.
        context: as for `round_weights`.
    """
    before = {weight.name: weight for weight in _weights(original, placement, context)}
    for weight in _weights(program, placement, context):
        if _stays_float(weight, placement):
            weight.put(before[weight.name].matrix)


def _weights(program: Program, placement: Placement, context: Context) -> list[Weight]:
    """The weights that are to become codes."""
    silent = dataclasses.replace(context, notes=[])
    return [
        weight
        for weight in find_weights(program, silent)
        if placement.overridden.isdisjoint(reader.name for reader in weight.readers)
    ]


def _stays_float(weight: Weight, placement: Placement) -> bool:
    return not any(reader.name in placement.integer for reader in weight.readers)


def _round(weight: Weight, gram: Gram | None, placement: Placement) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The rounded values of a weight, and the factors of its columns if they were evened; None leaves it alone."""
    if gram is None:
        return None
    matrix, factor = weight.matrix, None
    if _stays_float(weight, placement):
        factor = factor_for(matrix, _INT8, matrix.shape[1], gram.energy / gram.count)
        if factor is not None:
            matrix, gram = matrix * factor, gram.over(factor)
    whole = all(reader.name in placement.integer for reader in weight.readers)
    limit = placement.target.weight if whole else 127
    number = dataclasses.replace(_INT8, limits=(-limit, limit))
    rounded = round_compensated(matrix, number, matrix.shape[1], gram.shrunk())
    values = rounded.codes * rounded.scale
    return values if factor is None else values / factor, factor
