"""Checksums of programs and of code, to tell whether two are the same."""

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
    """Checksum of the source files of passes, classes and functions, and of lobo-fx's own.

    For code of lobo-fx, its whole package counts (such as all passes), as a pass calls many modules; for other code,
    only its module. Code that is in no file, such as a notebook's cells, is not included.
    """
    found = {_checksum_of_sources(name) for name in (__name__, *map(_module_of, given))}
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:_DIGITS]


def _module_of(value: object) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _checksum_of_sources(name: str) -> str:
    """Checksum of a module's file, or of all files of the lobo-fx package that holds it."""
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
    """Checksum of files, cached by their times and sizes."""
    checksum = hashlib.sha256()
    for path, _, _ in files:
        checksum.update(path.read_bytes())
    return checksum.hexdigest()


def checksum_of_program(program: Program) -> str:
    """Checksum of a program's graph, the graphs of its branches, and all its tensors."""
    module = program.module
    graphs = [str(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule)]
    checksum = hashlib.sha256(f"{graphs}{program.signature}".encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):  # also non-persistent buffers
        checksum.update(name.encode())
        add_tensor(checksum, tensor)
    return checksum.hexdigest()[:_DIGITS]
