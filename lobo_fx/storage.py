"""Saving and loading without pickles: `torch.export`'s archive for the graph, JSON for the rest.

`torch.export.load` itself can fall back to unpickling and can resolve any attribute of torch; a file is
therefore read by `inspect_pt2` first and refused unless it holds data only.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lobo_fx.artifact import written_beside
from lobo_fx.axes.record import kept_indices, restore
from lobo_fx.errors import InvalidInput
from lobo_fx.masks import masks, restore_masks
from lobo_fx.measures import set_weight_names, weight_names
from lobo_fx.quiet import quiet
from lobo_fx.reexport import exported_program
from lobo_fx.report import Report, Row
from lobo_fx.tracing import trace

if TYPE_CHECKING:
    from lobo_fx.result import Result

PROGRAM_FILE = "program.pt2"
MANIFEST_FILE = "lobo_fx.json"
_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
)
_TARGET = re.compile(
    r"torch\.ops\.(?!aten\.from_file)\w+\.\w+\.\w+|torch\.ops\.higher_order\.\w+"
    r"|_?operator\.\w+|math\.\w+|torch\._?sym_\w+"
)
# Contexts of output types that make torch import a module by name.
_IMPORTING = ("default_factory", "__enum__")
# Names that torch's size expressions call, and the syntax they are made of.
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "PythonMod", "Max", "Min"}
)
_FUNCTIONS |= {"FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality"}
_FUNCTIONS |= {"Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"}
_SYNTAX = (
    *(ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.Load),
)


def save(result: Result, folder: Path) -> Path:
    """Writes `program.pt2` and `lobo_fx.json` into `folder`, which is made if missing.

    Raises:
        InvalidInput: the folder can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"can't make the folder {folder}: {error.strerror}") from None
    manifest = {
        "format": 1,
        "passes": result.passes,
        "weights": weight_names(result.module),
        "kept_indices": kept_indices(result.module),
        "masks": sorted(masks(result.program)),
        "output_types": sorted(_types(result.program.signature.structure)),
        "report": json.loads(result.report.to_json()),
    }
    with written_beside(folder / PROGRAM_FILE) as draft:
        torch.export.save(exported_program(result.program), draft / PROGRAM_FILE)
        (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, default=str), encoding="utf-8")
    return folder


def load(folder: str | Path) -> Result:
    """Loads what `Result.save` wrote: a module that runs, trains and exports, without the model's class.

    Args:
        folder: the saved folder.

    Returns:
        A result with its report; the original model is not part of it.

    Raises:
        InvalidInput: the folder is not one, or its files hold more than data.
    """
    from lobo_fx.result import Result

    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise InvalidInput(f"{folder} was not written by Result.save: it has no {MANIFEST_FILE}")
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    if manifest.get("format") != 1:
        raise InvalidInput(f"{folder} has format {manifest.get('format')}; this version reads format 1")
    for name in manifest["output_types"]:
        if name.rpartition(".")[0] not in sys.modules:
            raise InvalidInput(f"the outputs are of type {name}; import {name.rpartition('.')[0]} first, then load")
    program = trace(folder / PROGRAM_FILE)
    restore_masks(program, manifest["masks"])
    set_weight_names(program.module, manifest["weights"])
    restore(program.module, manifest["kept_indices"])
    saved = manifest["report"]
    rows = [Row(**{**row, "snr": float("inf") if row["snr"] is None else row["snr"]}) for row in saved["passes"]]
    report = Report(saved["model"], rows, list(saved["notes"]))
    return Result(program, None, report, [(name, settings) for name, settings in manifest["passes"]])


def read_pt2(path: Path) -> ExportedProgram:
    """Loads an exported program after making sure that the file holds data only.

    Raises:
        InvalidInput: no such file, not an archive of `torch.export.save`, or one that would run code.
    """
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    inspect_pt2(path)
    with quiet():
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  operators of quantized programs
        from torch.export.pt2_archive._package import load_pt2

        try:
            return load_pt2(str(path)).exported_programs["model"]
        except Exception as error:
            raise InvalidInput(f"{path} can't be loaded: {_first_line(error)}") from error


def inspect_pt2(path: Path) -> None:
    """Refuses an archive that would unpickle objects, import modules, or call anything but operators.

    Only the entries that `torch.export.save` writes for one program are let through, by exact name: torch's own
    reader ignores case and falls back to older formats that unpickle.

    Raises:
        InvalidInput: says what was found in the file.
    """
    if not zipfile.is_zipfile(path):
        raise InvalidInput(f"{path} is not an archive written by torch.export.save")
    with zipfile.ZipFile(path) as archive:
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
        nodes = list(ast.walk(ast.parse(expression, mode="eval")))
    except SyntaxError:
        return False
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return (
        all(isinstance(node, _SYNTAX) for node in nodes)
        and all(isinstance(function, ast.Name) and function.id in _FUNCTIONS for function in called)
        and all(text.isidentifier() or text.isdecimal() for text in texts)
    )


def _types(structure: pytree.TreeSpec) -> set[str]:
    """Output types that a library must register before they can be rebuilt."""
    own = structure.type
    found = set() if own is None or own in (tuple, list, dict) else {f"{own.__module__}.{own.__qualname__}"}
    return found.union(*(_types(child) for child in structure.children()))


def _items(value: Any, inside_strings: bool = False) -> Iterator[tuple[str, Any]]:
    """All key-value pairs of nested JSON, if asked for of JSON inside strings too."""
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
