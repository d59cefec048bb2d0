"""The operator in ONNX, written with onnxscript."""

from __future__ import annotations

from typing import Any

from onnxscript import opset18

from lobo_fx_example.operator import SCALED_TANH

__all__ = ["TRANSLATIONS"]

op: Any = opset18


def scaled_tanh(x: Any, weight: Any) -> Any:
    """Two standard operators."""
    return op.Mul(op.Tanh(x), weight)


TRANSLATIONS = {SCALED_TANH: scaled_tanh}
"""By operator, as the entry point names it."""
