"""Axis rules of other packages."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

from lobo_fx.plugins.registry import Registry

__all__ = ["AXIS_RULES", "load_plugged_rules"]

AXIS_RULES: Registry[ModuleType] = Registry(
    "module of axis rules",
    "lobo_fx.axis_rules",
    named=False,
    must_be="a module",
    fits=lambda plugin: isinstance(plugin, ModuleType),
)
"""Modules that register axis rules with `axis_rule` when they are imported."""


@functools.cache
def load_plugged_rules() -> None:
    """Imports the axis rules of all packages, once; warns of modules that can't be imported, naming the package."""
    for failure in AXIS_RULES.loadable()[1]:
        warnings.warn(failure, stacklevel=2)
