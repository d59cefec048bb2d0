"""Observers by name; each is imported when it is asked for, since torchao takes long."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

from lobo_fx.plugins.registry import Registry

__all__ = ["OBSERVERS"]

_HOME, _GROUP = "lobo_fx.passes.quantization.integers.observers", "lobo_fx.observers"
_OWN = {
    "histogram": "HistogramObserver",
    "mse": "MeanSquaredErrorObserver",
    "entropy": "EntropyObserver",
    "percentile": "PercentileObserver",
    "min_max": "RangeObserver",
    "moving_average": "MovingObserver",
}
OBSERVERS: Registry[Any] = Registry(
    "observer",
    _GROUP,
    own={name: EntryPoint(name, f"{_HOME}:{kind}", _GROUP) for name, kind in _OWN.items()},
    must_be="a class of observers, of lobo-fx or of torchao",
    fits=lambda plugin: isinstance(plugin, type) and hasattr(plugin, "with_args"),  # torchao takes long to import
)
"""Observers by name, as `QuantizeStatic(observer=...)` takes them. Other packages register classes; one that chooses a
range from a histogram derives from `lobo_fx.passes.quantization.integers.observers.CountingObserver`."""
