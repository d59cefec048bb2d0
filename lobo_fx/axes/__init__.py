"""Axes: which dimensions of which tensors mean the same, and what can be removed from them."""

from lobo_fx.axes.algebra import Axis, AxisError
from lobo_fx.axes.inference import Call, Inference, axis_rule

__all__ = ["Axis", "AxisError", "Call", "Inference", "axis_rule"]
