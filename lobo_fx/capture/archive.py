"""Reads `.pt2` archives of `torch.export` after making sure that they hold data only.

`torch.export.load` can fall back to unpickling, and can resolve any attribute of torch. Therefore a file is inspected
first, and refused unless it holds only data.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from lobo_fx.axes.plugged import load_plugged_rules
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.files import check_readable, check_unpacked_size, temporary_folder
from lobo_fx.terminal.quiet import quiet

__all__ = ["PROGRAM_FILE", "read_pt2"]

PROGRAM_FILE = "program.pt2"
_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)

_TARGET = re.compile(
    r"torch\.ops\.(?!aten\.from_file)\w+\.\w+\.\w+|torch\.ops\.higher_order\.\w+"
    r"|_?operator\.\w+|math\.\w+|torch\._?sym_\w+"
)

# Keys in the contexts of output types that make torch import a module by name.
_IMPORTING = ("default_factory", "__enum__")

_NUMBERS = frozenset({"Integer", "Rational", "Float"})

# Functions that torch's size expressions call, and the syntax that they consist of.
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "PythonMod", "Max", "Min"}
)
_FUNCTIONS |= {"FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality"}
_FUNCTIONS |= {"Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"}
_SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.UAdd, ast.USub, ast.cmpop, ast.Load),
)
_SIZE_BITS, _MOST_BITS = 64, 4096
"""Assumed bits of a free size, and most bits of the value of a size expression, so that it is computed at once."""


def read_pt2(path: Path) -> ExportedProgram:
    """Loads an exported program after making sure that the file holds only data.

    Torch reads a copy of the inspected entries instead of the file, since zip readers can disagree about the entries of
    a maliciously crafted file.

    Raises:
        InvalidInput: no such file, not an archive of `torch.export.save`, or one that would run code.
    """
    check_readable(path)
    load_plugged_rules()  # so that operators of other packages exist
    with quiet(), temporary_folder() as folder:
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  operators of quantized programs
        from torch.export.pt2_archive._package import load_pt2

        copy = folder / PROGRAM_FILE
        try:
            _copy_inspected(path, copy)
            program = load_pt2(str(copy)).exported_programs["model"]
        except LoboError:
            raise
        except Exception as error:
            raise InvalidInput(f"{path} can't be loaded: {_first_line(error)}") from error
    _tie(program)
    return program


def _tie(program: ExportedProgram) -> None:
    """Makes parameters that share all their memory one object again, as before they were saved."""
    known: dict[object, torch.Tensor] = {}
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter) and tensor.numel():
            place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            program.state_dict[name] = known.setdefault(place, tensor)


def _copy_inspected(path: Path, copy: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise InvalidInput(f"{path} is not an archive written by torch.export.save")
    check_unpacked_size(path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        _inspect(path, archive)
        for entry in archive.infolist():
            with archive.open(entry) as source, written.open(entry.filename, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _inspect(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses an archive that would unpickle objects, import modules, or call anything but operators.

    Only entries that `torch.export.save` writes for one program are accepted, by exact name: torch's reader
    ignores case and falls back to older formats that unpickle.

    Raises:
        InvalidInput: says what was found in the file.
    """
    names = archive.namelist()
    prefix = names[0].partition("/")[0] if names else ""
    if len({name.lower() for name in names}) < len(names):
        raise InvalidInput(f"{path} holds two entries of one name; refused")
    for name in names:
        if not name.startswith(f"{prefix}/") or not _ENTRY.fullmatch(name[len(prefix) + 1 :]):
            raise InvalidInput(f"{path} holds '{name}', which torch.export.save does not write; refused")
    missing = {f"{prefix}/archive_format", f"{prefix}/models/model.json"} - set(names)
    if missing:
        raise InvalidInput(f"{path} is not an archive written by torch.export.save (of this torch version)")
    for name in names:
        if name.endswith("sample_inputs/model.pt"):
            _check_sample_inputs(path, archive.read(name))
        if name.endswith("_config.json"):
            for key, value in _items(json.loads(archive.read(name))):
                if key == "use_pickle" and value:
                    raise InvalidInput(f"{path} holds pickled tensors ({name}); refused")
        if name.endswith("models/model.json"):
            model = json.loads(archive.read(name))
            if any(key.startswith(_IMPORTING) for key, _ in _items(model, inside_strings=True)):
                raise InvalidInput(f"{path} has inputs or outputs whose type would import a module; refused")
            _check_model(path, model)


def _check_sample_inputs(path: Path, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{path} holds sample inputs that are more than tensors; refused") from error


def _check_model(path: Path, model: Any) -> None:
    for key, value in _items(model):
        if key == "target" and isinstance(value, str) and not _TARGET.fullmatch(value):
            raise InvalidInput(f"{path} calls '{value}', which is not an operator; refused")
        if key == "expr_str" and isinstance(value, str) and not _is_arithmetic(value):
            raise InvalidInput(f"{path} holds a size expression that is not arithmetic: {value!r}; refused")


def _is_arithmetic(expression: str) -> bool:
    """Whether a size expression, which torch evaluates as Python, only calls arithmetic on symbols and numbers."""
    try:
        tree = ast.parse(expression, mode="eval")
        nodes = list(ast.walk(tree))
        called = [node.func for node in nodes if isinstance(node, ast.Call)]
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        return (
            all(isinstance(node, _SYNTAX) for node in nodes)
            and all(isinstance(function, ast.Name) and function.id in _FUNCTIONS for function in called)
            and all(isinstance(value, (int, float, str)) for value in constants)
            and all(value.isidentifier() or value.isdecimal() for value in constants if isinstance(value, str))
            and _bits(tree.body) <= _MOST_BITS
        )
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _bits(node: ast.AST) -> float:
    """An upper bound on the bits that the value of a size expression needs."""
    if isinstance(node, ast.Constant):
        return 4 * len(str(node.value)) if isinstance(node.value, (int, str)) else _SIZE_BITS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Symbol":
            return _SIZE_BITS
        if node.func.id == "Pow":
            base, exponent = node.args
            return _bits(base) * _largest(exponent)
    return sum(map(_bits, ast.iter_child_nodes(node)))


def _largest(exponent: ast.AST) -> float:
    """The largest number in an exponent; infinite if the exponent is computed."""
    called = [node.func for node in ast.walk(exponent) if isinstance(node, ast.Call)]
    computed = any(isinstance(node, ast.BinOp) for node in ast.walk(exponent))
    if computed or any(not isinstance(name, ast.Name) or name.id not in _NUMBERS for name in called):
        return math.inf
    return max(1.0, *(abs(float(str(node.value))) for node in ast.walk(exponent) if isinstance(node, ast.Constant)))


def _items(value: Any, inside_strings: bool = False) -> Iterator[tuple[str, Any]]:
    """All key-value pairs of nested JSON; on request also of JSON inside strings."""
    if inside_strings and isinstance(value, str) and value.lstrip().startswith(("{", "[", '"')):
        with contextlib.suppress(ValueError):
            yield from _items(json.loads(value), inside_strings)
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key, entry
            yield from _items(entry, inside_strings)
    elif isinstance(value, list):
        for entry in value:
            yield from _items(entry, inside_strings)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
