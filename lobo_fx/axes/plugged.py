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
"""Modules that register rules with `axis_rule` as they are imported."""


@functools.cache
def load_plugged_rules() -> None:
    """Imports the rules of all packages, once; a module that can't be imported is warned about, with its package."""
    for failure in AXIS_RULES.loadable()[1]:
        warnings.warn(failure, stacklevel=2)
