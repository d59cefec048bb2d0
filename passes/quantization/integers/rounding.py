"""Weights put on the codes that they will be stored as, the rest of a row making up for what rounding adds."""

from __future__ import annotations

import dataclasses

from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes.fitting.layer_grams import collect_grams, gram_of
from lobo_fx.passes.quantization.codes.gptq import round_compensated
from lobo_fx.passes.quantization.codes.weights import find_weights
from lobo_fx.passes.quantization.integers.placement import Placement

__all__ = ["round_weights"]

_INT8 = FORMATS["int8"]


def round_weights(program: Program, placement: Placement, context: Context) -> Program:
    """Rounds weights in place; whatever rounds them to the nearest later changes nothing.

    A weight whose readers all run as integers has the range of the CPU's integers, others that of stored int8. What
    overrides leave float stays as it is, and so does what is read by something else than a layer.

    Args:
        program: shapes propagated.
        placement: where integers run.
        context: its calibration data says what rounding costs a layer's outputs.

    Source: see `lobo_fx.passes.quantization.codes.gptq`.
    """
    silent = dataclasses.replace(context, notes=[])
    found = [
        weight
        for weight in find_weights(program, silent)
        if placement.overridden.isdisjoint(reader.name for reader in weight.readers)
    ]
    grams = collect_grams(program, [layer for weight in found for layer in weight.layers], context)
    for weight in found:
        if (gram := gram_of(weight.readers, grams)) is not None:
            whole = all(reader.name in placement.integer for reader in weight.readers)
            limit = placement.target.weight if whole else 127
            number = dataclasses.replace(_INT8, limits=(-limit, limit))
            rounded = round_compensated(weight.matrix, number, weight.matrix.shape[1], gram)
            weight.put(rounded.codes * rounded.scale)
    return program
