"""Records which indices of each original parameter are left after surgery."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lobo_fx.graph.facts import KeptIndices
from lobo_fx.graph.program import ProgramModule

__all__ = ["kept_indices", "names_of_tensors", "record", "restore"]


def record(module: ProgramModule, names: Iterable[str], dim: int, mask: torch.Tensor) -> None:
    """Records that only the positions where `mask` is True stay along `dim` of a stored tensor.

    Args:
        module: the module that holds the tensor.
        names: all names of the tensor, see `names_of_tensors`.
        dim: the dimension that is cut.
        mask: boolean, over the positions before the cut.
    """
    known = dict(kept_indices(module))
    for name in names:
        dims = dict(known.get(name, {}))
        before = torch.tensor(dims[dim]) if dim in dims else torch.arange(len(mask))
        known[name] = dims | {dim: before[mask].tolist()}
    module.set_facts(kept=known)


def names_of_tensors(module: ProgramModule) -> dict[int, list[str]]:
    """All names of each stored tensor, by its identity."""
    found: dict[int, list[str]] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        found.setdefault(id(tensor), []).append(name)
    return found


def kept_indices(module: ProgramModule) -> KeptIndices:
    """The original indices that are left of each cut tensor; uncut ones are not listed.

    Example:
        `original.conv1.weight[kept["conv1.weight"][0]]` are the filters that the compiled model still has.
    """
    return module.program_facts.kept


def restore(module: ProgramModule, kept: dict[str, dict[str, list[int]]]) -> None:
    """Restores `kept_indices` from JSON, whose keys are text."""
    module.set_facts(kept={name: {int(dim): at for dim, at in dims.items()} for name, dims in kept.items()})
