"""The names under which the original model had its parameters, kept after weights become codes."""

from __future__ import annotations

from lobo_fx.graph.program import ProgramModule

_WEIGHT_NAMES = "lobo_fx_weight_names"


def mark_weights(module: ProgramModule) -> None:
    """Adds the names of the parameters to those noted, so that a weight is still known once it is quantized."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.meta[_WEIGHT_NAMES] = sorted(names.union(weight_names(module)))


def set_weight_names(module: ProgramModule, names: list[str]) -> None:
    """Restores names noted by `mark_weights` before the module was saved."""
    module.meta[_WEIGHT_NAMES] = list(names)


def weight_names(module: ProgramModule) -> list[str]:
    """Names under which the original had its parameters."""
    names: list[str] = module.meta.get(_WEIGHT_NAMES, [])
    return names
