"""The names under which the original model had its parameters, kept after weights become codes."""

from __future__ import annotations

from lobo_fx.graph.program import ProgramModule

__all__ = ["mark_weights", "set_weight_names", "weight_names"]


def mark_weights(module: ProgramModule) -> None:
    """Adds the names of the parameters to those noted, so that a weight is still known once it is quantized."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.set_facts(weight_names=tuple(sorted(names.union(weight_names(module)))))


def set_weight_names(module: ProgramModule, names: list[str]) -> None:
    """Restores names noted by `mark_weights` before the module was saved."""
    module.set_facts(weight_names=tuple(names))


def weight_names(module: ProgramModule) -> list[str]:
    """Names under which the original had its parameters."""
    return list(module.program_facts.weight_names)
