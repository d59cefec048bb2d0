"""Weights with the Gram matrices of their inputs, a few at a time, so that memory stays bounded."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence

from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import layer_of
from lobo_fx.graph.operators import RECURRENT, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.fitting.layer_grams import Role, collect_grams, in_parts, roles_of
from lobo_fx.passes.quantization.codes.weights import Weight
from lobo_fx.terminal.progress import track

__all__ = ["roles_of_weight", "with_grams"]


def with_grams(program: Program, weights: Sequence[Weight], context: Context) -> Iterator[tuple[Weight, Gram | None]]:
    """Yields every weight and the Gram matrix of its inputs over all calls that read it; None if a call has none.

    Args:
        program: the program to run; don't change it before the last weight was given.
        weights: weights of the program.
        context: gives calibration data, and notes which weights of products can't be compensated.
    """
    description = "round weights"
    for group in track(in_parts(weights, roles_of_weight), description, context.show_progress):
        grams = collect_grams(program, [role for weight in group for role in roles_of_weight(weight)], context)
        for weight in group:
            roles = roles_of_weight(weight)
            missing = [role.call for role in roles if role not in grams]
            if missing and any(layer_of(role.call) or is_call(role.call, *RECURRENT) for role in roles):
                what = f"nothing is known of what {describe(missing[0])} multiplies it with"
                context.note(f"is rounded to the nearest code, without compensation: {what}", parameter=weight.name)
            yield weight, None if missing else functools.reduce(operator.add, (grams[role] for role in roles))


def roles_of_weight(weight: Weight) -> list[Role]:
    """All calls that read a weight."""
    return [role for read in weight.reads for role in roles_of(read)]
