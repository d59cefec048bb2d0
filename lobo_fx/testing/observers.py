"""Test kit for observers of activations."""

from __future__ import annotations

from typing import Any

import torch

from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.plugins.registry import PASSES
from lobo_fx.testing.networks import networks
from lobo_fx.testing.passes import check_saved

__all__ = ["check_observer"]

_NAME = "observer_under_test"
_CODES = {"quant_min": 0, "quant_max": 255, "dtype": torch.uint8, "qscheme": torch.per_tensor_affine}


def check_observer(observer: type, *, decibels: float = 20) -> None:
    """Runs the observer on several distributions, and quantizes networks with it.

    Asserts: the scale is positive and finite and the zero point is a code, whatever the values (also zeros, a constant,
    tiny and huge values, an outlier); batches of any shape pass through unchanged; doubling the values doubles the
    scale; normal and one-sided values keep `decibels`; a network quantized with it exports, saves and loads.

    Args:
        observer: the class, as the entry point names it.
        decibels: least signal-to-noise ratio of normal values at 8 bits.
    """
    from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS

    random = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 3, 16, generator=random)
    seen = {
        "normal values": normal,
        "values of one sign": normal.abs(),
        "negative values": -normal.abs(),
        "zeros": torch.zeros(4, 5),
        "a constant": torch.full((7,), 3.0),
        "tiny values": normal * 1e-30,
        "huge values": normal * 1e30,
        "an outlier": torch.cat([normal.flatten(), torch.tensor([1e4])]),
        "one value": torch.tensor([[0.5]]),
    }
    for name, values in seen.items():
        _range(observer, values, name)
    for name in ("normal values", "values of one sign"):
        values = seen[name]
        scale, zero = _range(observer, values, name)
        rounded = ((values / scale).round() + zero).clamp(0, 255).sub(zero) * scale
        found = signal_to_noise(values, rounded)
        assert found >= decibels, f"{name} keep {found:.1f} decibels, less than {decibels}"
        twice = _range(observer, 2 * values, name)[0]
        assert abs(twice / scale - 2) < 0.05, f"twice the {name} get {twice / scale:.2f} times the scale"
    OBSERVERS.register(_NAME, observer)
    try:
        for _, model, inputs in networks():
            quantize = PASSES.ours("quantize_static")(observer=_NAME, kernels="all")
            check_saved([quantize], model, inputs, calibration_data=[inputs])
    finally:
        OBSERVERS.unregister(_NAME)


def _range(observer: Any, values: torch.Tensor, name: str) -> tuple[float, int]:
    """Scale and zero point after observing a batch and the first half of it."""
    made = observer(**_CODES, eps=torch.finfo(torch.float32).tiny)
    before = values.clone()
    for batch in (values, values[: max(1, len(values) // 2)]):
        assert torch.equal(made(batch), batch), f"{name} are not passed through"
    assert torch.equal(values, before), f"{name} are changed in place"
    scale, zero = (tensor.item() for tensor in made.calculate_qparams())
    assert 0 < scale < float("inf"), f"{name} get the scale {scale}"
    assert 0 <= zero <= 255, f"{name} get the zero point {zero}, which is no code"
    return scale, int(zero)
