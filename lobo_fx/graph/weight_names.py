"""Names of the original model's parameters, kept after weights become codes."""

from __future__ import annotations

from lobo_fx.graph.program import ProgramModule

__all__ = ["mark_weights", "set_weight_names", "weight_names"]


def mark_weights(module: ProgramModule) -> None:
    """Adds the names of the parameters to those recorded, so that a weight is recognised once it is quantized."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    module.set_facts(weight_names=tuple(sorted(names.union(weight_names(module)))))


def set_weight_names(module: ProgramModule, names: list[str]) -> None:
    """Restores recorded names, after a saved module was loaded."""
    module.set_facts(weight_names=tuple(names))


def weight_names(module: ProgramModule) -> list[str]:
    """Names of the original's parameters."""
    return list(module.program_facts.weight_names)
