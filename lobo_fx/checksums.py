"""Checksums of data and of programs: whether two are the same, told without keeping either."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lobo_fx.graph.program import Program

__all__ = ["checksum_of_data", "checksum_of_program"]

_DIGITS = 16


def checksum_of_data(data: object) -> str:
    """Of tensors in lists and dicts; empty for what may come in another order at every read."""
    if not isinstance(data, (list, tuple, dict)):
        return ""
    checksum = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(data)[0]:
        checksum.update(pytree.keystr(path).encode())
        if isinstance(leaf, torch.Tensor):
            _add(checksum, leaf)
    return checksum.hexdigest()[:_DIGITS]


def checksum_of_program(program: Program) -> str:
    """Of its graph and all its tensors."""
    checksum = hashlib.sha256(f"{program.graph}{program.signature}".encode())
    for name, tensor in sorted(program.module.state_dict(keep_vars=True).items()):
        checksum.update(name.encode())
        _add(checksum, tensor)
    return checksum.hexdigest()[:_DIGITS]


def _add(checksum: Any, tensor: torch.Tensor) -> None:
    checksum.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    checksum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
