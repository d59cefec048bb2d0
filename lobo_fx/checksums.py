"""Checksums of data, programs and code: whether two are the same, told without keeping either."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lobo_fx.graph.program import Program

__all__ = ["checksum_of_code", "checksum_of_data", "checksum_of_program"]

_DIGITS = 16


def checksum_of_code(*given: object) -> str:
    """Of the sources that these passes, classes and functions are from, and of lobo-fx's own.

    Of lobo-fx a whole package counts, such as its passes, for a pass calls many modules; of others the module alone.
    What is in no file, such as a notebook's cells, is not known.
    """
    found = {_checksum_of_sources(name) for name in (__name__, *map(_module_of, given))}
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:_DIGITS]


def _module_of(value: object) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return str(getattr(value, "__module__", None) or type(value).__module__)


@functools.cache
def _checksum_of_sources(name: str) -> str:
    """Of the file of a module, or of all files of the package of lobo-fx that holds it."""
    first, *rest = name.split(".")
    package = sys.modules.get(".".join([first, *rest[:1]])) if first == __name__.partition(".")[0] else None
    if package is not None and not hasattr(package, "__path__"):
        package = sys.modules[first]  # of the core
    folders, file = getattr(package, "__path__", ()), getattr(sys.modules.get(name), "__file__", None)
    files = [path for folder in folders for path in Path(folder).rglob("*.py")] or ([Path(file)] if file else [])
    checksum = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        checksum.update(path.read_bytes())
    return checksum.hexdigest()


def checksum_of_data(data: object) -> str:
    """Of tensors, numbers and text in lists and dicts; empty where anything is of another kind."""
    if not isinstance(data, (list, tuple, dict)):
        return ""
    checksum = hashlib.sha256()
    for path, leaf in pytree.tree_flatten_with_path(data)[0]:
        checksum.update(pytree.keystr(path).encode())
        if isinstance(leaf, torch.Tensor):
            _add(checksum, leaf)
        elif leaf is None or type(leaf) in (bool, int, float, str):
            checksum.update(repr(leaf).encode())
        else:
            return ""
    return checksum.hexdigest()[:_DIGITS]


def checksum_of_program(program: Program) -> str:
    """Of its graph and all its tensors."""
    checksum = hashlib.sha256(f"{program.graph}{program.signature}".encode())
    module = program.module
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):  # those of no state dict too
        checksum.update(name.encode())
        _add(checksum, tensor)
    return checksum.hexdigest()[:_DIGITS]


def _add(checksum: Any, tensor: torch.Tensor) -> None:
    checksum.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    checksum.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
