"""Checksums of the contents of values, to tell whether two are the same.

Values are decomposed as `pickle` does, but nothing is pickled: an object is described by what it would be rebuilt from.
Functions and classes of a script, a notebook or a module beside it are described by their code and all that it refers
to; those of libraries by their names.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

__all__ = ["add_tensor", "checksum_of", "checksum_of_data", "holds_rows"]

_DIGITS = 16
_PLAIN = (type(None), type(...), type(NotImplemented), bool, int, float, complex, bytes, torch.dtype, torch.device)
_NO_CONTENT = {"__dict__", "__weakref__", "__doc__", "__slotnames__", "_abc_impl"}
"""Entries of a class that do not affect its behaviour."""
_SMALL = 1 << 20
"""Larger files (in bytes) count by their size and time."""
_LIBRARIES = ("site-packages", "dist-packages")
_OURS, _STANDARD = Path(__file__).parent.resolve(), Path(sysconfig.get_paths()["stdlib"])


def checksum_of(*values: object) -> str:
    """Checksum of all that values hold: data, functions, modules, objects; empty where that is not known.

    Functions count by their code, defaults, globals and closures, so that two of the same name are told apart. Text
    that names a file counts with the file's content. An imported module counts by its file, without changes made to it
    since.
    """
    try:
        return hashlib.sha256(repr(_Reader().read(values)).encode()).hexdigest()[:_DIGITS]
    except Exception:  # objects may raise anything while they are decomposed
        return ""


def checksum_of_data(data: object) -> str:
    """Checksum of a list, tuple or dict; empty for a loader, which may read other rows each time."""
    return checksum_of(data) if holds_rows(data) else ""


def holds_rows(data: object) -> bool:
    """Whether data is a list, tuple or dict, the same at every read."""
    return isinstance(data, (list, tuple, dict))


class _Reader:
    """Decomposes values into plain parts whose text identifies them.

    A value that was seen before, as in a reference cycle, is described by its number. Seen values are kept alive, so
    that no later value gets the address of a temporary one.
    """

    def __init__(self) -> None:
        self.seen = dict[int, tuple[int, object]]()

    def read(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return kind.__name__, repr(value)
        if kind is str or isinstance(value, PurePath):
            return kind.__name__, str(value), _of_file(value)
        if id(value) in self.seen:
            return f"seen {self.seen[id(value)][0]}"
        self.seen[id(value)] = len(self.seen), value
        return kind.__module__, kind.__qualname__, self._read_parts(value)

    def _read_parts(self, value: Any) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return self._all(value)
        if kind in (dict, types.MappingProxyType):
            return [(self.read(key), self.read(entry)) for key, entry in value.items()]
        if kind in (set, frozenset):
            return sorted(repr(_Reader().read(entry)) for entry in value)
        if kind in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            checksum = hashlib.sha256(str(value.requires_grad).encode())
            add_tensor(checksum, value)
            return checksum.hexdigest()
        if kind is np.ndarray:
            if value.dtype.hasobject:
                raise TypeError("an array of objects")
            return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()
        if kind is types.FunctionType:
            return self._read_function(value)
        if kind is types.CodeType:
            return self._read_code(value)
        if kind is types.ModuleType:
            file = getattr(value, "__file__", None)
            return value.__name__, _of_file(file) if file and _is_someones(file) else ""
        if isinstance(value, type):
            return self._read_class(value)
        if kind is types.MethodType:
            return self._all((value.__func__, value.__self__))
        if kind in (staticmethod, classmethod):
            return self.read(value.__func__)
        if kind is property:
            return self._all((value.fget, value.fset, value.fdel))
        if kind is functools.cached_property:
            return self.read(value.func)
        if kind is type(functools.lru_cache(len)):
            return self.read(value.__wrapped__)
        if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            return str(value)
        made_from = value.__reduce_ex__(2)
        if isinstance(made_from, str):
            return getattr(value, "__module__", None), made_from
        return [self._all(part) if hasattr(part, "__next__") else self.read(part) for part in made_from]

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [self.read(value) for value in values]

    def _read_function(self, value: types.FunctionType) -> Any:
        name, code = (value.__module__, value.__qualname__), value.__code__
        beside = [value.__defaults__, value.__kwdefaults__, vars(value)]
        cells = [self._read_cell(cell) for cell in value.__closure__ or ()]
        if not _is_someones(code.co_filename):
            return name, self._all(beside) if "<locals>" in value.__qualname__ else "", cells
        known = value.__globals__
        referred = [(name, self.read(known[name])) for name in sorted(_globals_of(code)) if name in known]
        return name, self.read(code), self._all(beside), cells, referred

    def _read_cell(self, cell: types.CellType) -> Any:
        try:
            held = cell.cell_contents
        except ValueError:  # the name is not bound
            return "unbound"
        return self.read(held)

    def _read_code(self, code: types.CodeType) -> Any:
        taken = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_varnames
        run = code.co_code.hex(), code.co_exceptiontable.hex(), code.co_names, code.co_freevars
        return taken, run, self._all(code.co_consts)

    def _read_class(self, kind: type) -> Any:
        name = kind.__module__, kind.__qualname__
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names or not _is_someones(_file_of(kind)):
            return name
        entries = [(key, self.read(entry)) for key, entry in vars(kind).items() if key not in _NO_CONTENT]
        return name, entries, self._all((*kind.__bases__, type(kind)))


def _globals_of(code: types.CodeType) -> set[str]:
    """The global names that code, and code within it, looks up."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_globals_of(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _file_of(kind: type) -> str:
    """The file of a class's module; empty in notebooks."""
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


def _is_someones(file: str) -> bool:
    """Whether a file is neither ours nor a library's: a script, a notebook or a module beside it."""
    path = Path(file)
    within = path.parents
    return not (
        set(_LIBRARIES) & set(path.parts) or _OURS in within or _STANDARD in within or file.startswith("<frozen")
    )


def _of_file(name: str | PurePath) -> str:
    """The checksum of the file of this name, or size and time of a large one; empty if there is no such file."""
    try:
        path = Path(name)
        facts = path.stat() if path.is_file() else None
        if facts is None:
            return ""
        if facts.st_size > _SMALL:
            return f"{facts.st_size} {facts.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):  # the text can't be the name of a file
        return ""


def add_tensor(checksum: Any, tensor: torch.Tensor) -> None:
    """Adds a tensor's dtype, shape and values to a checksum."""
    checksum.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
    checksum.update(dense.view(torch.uint8).numpy().data)
