"""What the dimensions of the operator mean: so that channels which run through it can be pruned."""

from __future__ import annotations

from lobo_fx.axes import Axis, Call, any_of, axis_rule
from lobo_fx_example.operator import SCALED_TANH

__all__ = ["scaled_tanh"]


@axis_rule(SCALED_TANH, zeros=any_of("x", "weight"))
def scaled_tanh(call: Call) -> tuple[Axis, ...]:
    """x[… c], weight[c] → [… c]; zero wherever x or the weight is."""
    *rest, channels = call.axes("x")
    return (*rest, call.unify(channels, call.axes("weight")[0]))
