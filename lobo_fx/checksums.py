"""Checksums of programs and of code: whether two are the same, told without keeping either."""

from __future__ import annotations

import functools
import hashlib
import sys
from pathlib import Path

from torch import fx

from lobo_fx.content import add_tensor
from lobo_fx.graph.program import Program

__all__ = ["checksum_of_code", "checksum_of_program"]

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


def _checksum_of_sources(name: str) -> str:
    """Of the file of a module, or of all files of the package of lobo-fx that holds it."""
    first, *rest = name.split(".")
    package = sys.modules.get(".".join([first, *rest[:1]])) if first == __name__.partition(".")[0] else None
    if package is not None and not hasattr(package, "__path__"):
        package = sys.modules[first]  # of the core
    folders, file = getattr(package, "__path__", ()), getattr(sys.modules.get(name), "__file__", None)
    files = [path for folder in folders for path in Path(folder).rglob("*.py")] or ([Path(file)] if file else [])
    present = sorted(path for path in files if path.is_file())
    return _checksum_of_files(tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in present))


@functools.cache
def _checksum_of_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of files with their times and sizes: read again where one was edited."""
    checksum = hashlib.sha256()
    for path, _, _ in files:
        checksum.update(path.read_bytes())
    return checksum.hexdigest()


def checksum_of_program(program: Program) -> str:
    """Of its graph, those of its branches, and all its tensors."""
    module = program.module
    graphs = [str(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule)]
    checksum = hashlib.sha256(f"{graphs}{program.signature}".encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):  # those of no state dict too
        checksum.update(name.encode())
        add_tensor(checksum, tensor)
    return checksum.hexdigest()[:_DIGITS]
