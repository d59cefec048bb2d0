"""What surgery took, in terms of the original model: which indices of each parameter are still there."""

from __future__ import annotations

import torch

from lobo_fx.program import ProgramModule

_KEPT = "lobo_fx_kept_indices"
KeptIndices = dict[str, dict[int, list[int]]]
"""By parameter name and dimension: the original index of each position that is left."""


def record(module: ProgramModule, tensor: torch.Tensor, dim: int, mask: torch.Tensor) -> None:
    """Notes that only the positions where `mask` is True stay along `dim` of a stored tensor.

    Args:
        module: whose tensor it is.
        tensor: the tensor, before or after it is cut; found by identity, under all its names.
        dim: the dimension that is cut.
        mask: boolean, over the positions before the cut.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name in [name for name, known in named if known is tensor]:
        dims = kept_indices(module).setdefault(name, {})
        before = torch.tensor(dims.get(dim, range(len(mask))))
        dims[dim] = before[mask].tolist()


def kept_indices(module: ProgramModule) -> KeptIndices:
    """For every tensor that was cut, the original indices of what is left; others are whole.

    Example:
        `original.conv1.weight[kept["conv1.weight"][0]]` are the filters that the compiled model still has.
    """
    known: KeptIndices = module.meta.setdefault(_KEPT, {})
    return known


def restore(module: ProgramModule, kept: dict[str, dict[str, list[int]]]) -> None:
    """Reads back what JSON made of `kept_indices`."""
    module.meta[_KEPT] = {name: {int(dim): at for dim, at in dims.items()} for name, dims in kept.items()}
