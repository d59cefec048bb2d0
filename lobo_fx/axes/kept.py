"""What surgery took, in terms of the original model: which indices of each parameter are still there."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lobo_fx.graph.facts import KeptIndices
from lobo_fx.graph.program import ProgramModule

__all__ = ["kept_indices", "names_of_tensors", "record", "restore"]


def record(module: ProgramModule, names: Iterable[str], dim: int, mask: torch.Tensor) -> None:
    """Notes that only the positions where `mask` is True stay along `dim` of a stored tensor.

    Args:
        module: whose tensor it is.
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
    """By identity of a stored tensor: all its names."""
    found: dict[int, list[str]] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        found.setdefault(id(tensor), []).append(name)
    return found


def kept_indices(module: ProgramModule) -> KeptIndices:
    """For every tensor that was cut, the original indices of what is left; others are whole.

    Example:
        `original.conv1.weight[kept["conv1.weight"][0]]` are the filters that the compiled model still has.
    """
    return module.program_facts.kept


def restore(module: ProgramModule, kept: dict[str, dict[str, list[int]]]) -> None:
    """Reads back what JSON made of `kept_indices`."""
    module.set_facts(kept={name: {int(dim): at for dim, at in dims.items()} for name, dims in kept.items()})
