"""Checksums of data, programs and code: whether two are the same, told without keeping either."""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from lobo_fx.graph.program import Program

__all__ = ["checksum_of", "checksum_of_code", "checksum_of_data", "checksum_of_program"]

_DIGITS = 16
_PLAIN = (bool, int, float, complex, bytes, slice, range, np.generic, torch.dtype, torch.device)


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


def checksum_of(*values: object) -> str:
    """Of all that values hold: data, functions with what they refer to, modules, objects; empty where it is not known.

    Functions count by their code, defaults and what they close over, so that two of one name are told apart. Text that
    names a file counts with the file's content.
    """
    try:
        return hashlib.sha256(repr(_Reader().read(values)).encode()).hexdigest()[:_DIGITS]
    except (_UnknownError, RecursionError):
        return ""


def checksum_of_data(data: object) -> str:
    """Of the content of a list, tuple or dict; empty for a loader, which may read other rows each time."""
    return checksum_of(data) if isinstance(data, (list, tuple, dict)) else ""


class _UnknownError(Exception):
    """Nothing is known of a value."""


class _Reader:
    """Tells what values hold in plain parts, whose text tells them apart from all others.

    An object that is met again, as a trainer that its own callbacks hold, is told by its place among those seen.
    """

    def __init__(self) -> None:
        self.seen = dict[int, int]()

    def read(self, value: Any) -> Any:
        if value is None or value is ... or isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, (str, Path)):
            return type(value).__name__, str(value), _checksum_of_file(value)
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return _content_of_numbers(value)
        if isinstance(value, Mapping):
            return type(value).__name__, [(self.read(key), self.read(entry)) for key, entry in value.items()]
        if isinstance(value, (list, tuple)):
            return type(value).__name__, [self.read(entry) for entry in value]
        if isinstance(value, (set, frozenset)):
            return type(value).__name__, sorted(repr(_Reader().read(entry)) for entry in value)
        if isinstance(value, types.CodeType):
            return value.co_code.hex(), value.co_names, [self.read(constant) for constant in value.co_consts]
        if isinstance(value, types.FunctionType):
            return self._read_function(value)
        if isinstance(value, types.MethodType):
            return self.read(value.__func__), self.read(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self.read((value.func, value.args, value.keywords))
        if isinstance(value, types.BuiltinFunctionType):
            return value.__module__, value.__qualname__
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, enum.Enum)):
            return str(value)
        if isinstance(value, type):
            return str(value), self._place(value) or self._read_class(value)
        if hasattr(value, "__dict__") and not isinstance(value, types.ModuleType):
            return self._read_object(value)
        raise _UnknownError

    def _read_function(self, value: types.FunctionType) -> Any:
        if place := self._place(value):
            return place
        cells = [self._read_cell(cell) for cell in value.__closure__ or ()]
        given = value.__defaults__, value.__kwdefaults__
        return value.__module__, value.__qualname__, self.read(value.__code__), self.read(given), cells

    def _read_cell(self, cell: types.CellType) -> Any:
        try:
            held = cell.cell_contents
        except ValueError:  # the name is not bound
            return "unbound"
        return self.read(held)

    def _read_class(self, value: type) -> Any:
        """The methods and plain attributes of a class that comes with no library, and its bases."""
        if not _is_someones(value):
            return ""
        parts = [getattr(part, "__func__", getattr(part, "fget", part)) for part in vars(value).values()]
        own = [part for part in parts if isinstance(part, (types.FunctionType, torch.Tensor, str, *_PLAIN))]
        return [self.read(part) for part in (*own, *value.__bases__)]

    def _read_object(self, value: object) -> Any:
        return self._place(value) or (self.read(type(value)), self.read(vars(value)))

    def _place(self, value: object) -> str:
        """Where a value stands among those seen; empty where it is met for the first time."""
        if id(value) in self.seen:
            return f"seen {self.seen[id(value)]}"
        self.seen[id(value)] = len(self.seen)
        return ""


def _checksum_of_file(name: str | Path) -> str:
    """Of the file of this name; empty where there is none."""
    with contextlib.suppress(OSError, ValueError):  # no name of a file at all
        return hashlib.sha256(Path(name).read_bytes()).hexdigest() if Path(name).is_file() else ""
    return ""


def _is_someones(kind: type) -> bool:
    """Whether a class is neither ours nor of a library: in a notebook, a script or a module beside it."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    is_standard = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    return not is_standard and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _content_of_numbers(value: torch.Tensor | np.ndarray[Any, Any]) -> Any:
    checksum = hashlib.sha256()
    try:
        _add(checksum, value if isinstance(value, torch.Tensor) else torch.from_numpy(value))
    except (RuntimeError, TypeError) as error:  # sparse, nested, of objects
        raise _UnknownError from error
    return checksum.hexdigest(), getattr(value, "requires_grad", False)


def checksum_of_program(program: Program) -> str:
    """Of its graph, those of its branches, and all its tensors."""
    module = program.module
    graphs = [str(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule)]
    checksum = hashlib.sha256(f"{graphs}{program.signature}".encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):  # those of no state dict too
        checksum.update(name.encode())
        _add(checksum, tensor)
    return checksum.hexdigest()[:_DIGITS]


def _add(checksum: Any, tensor: torch.Tensor) -> None:
    checksum.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    checksum.update(dense.view(torch.uint8).numpy().data)
