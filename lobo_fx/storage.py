"""Saving and loading without pickles: `torch.export`'s archive for the graph, JSON for the rest.

`torch.export.load` itself can fall back to unpickling and can resolve any attribute of torch; a file is
therefore inspected first and refused unless it holds data only.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lobo_fx.artifact import Artifact, check_folder, make_folder, read_json, written_beside
from lobo_fx.axes.record import kept_indices, restore
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.masks import restore_masks
from lobo_fx.measures import set_weight_names, weight_names  # which brings our own operators, too
from lobo_fx.quiet import quiet
from lobo_fx.reexport import exported_program
from lobo_fx.report import Report, Row, Sheet
from lobo_fx.runtime import Benchmark, Latency
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
        InvalidInput: the folder holds something else, or can't be made or written to.
    """
    check_target(folder)
    manifest = {
        "format": 1,
        "passes": result.passes,
        "weights": weight_names(result.module),
        "kept_indices": kept_indices(result.module),
        "output_types": sorted(_types(result.program.signature.structure)),
        "report": report_as_json(result.report),
    }
    text = json.dumps(manifest, indent=1, default=str)
    make_folder(folder)
    with written_beside(folder / PROGRAM_FILE) as draft:
        torch.export.save(exported_program(result.program), draft / PROGRAM_FILE)
        (draft / MANIFEST_FILE).write_text(text, encoding="utf-8")
    return folder


def check_target(folder: Path) -> None:
    """Refuses a folder that `save` must not or can't write to, before any work.

    Raises:
        InvalidInput: it holds files, but no saved program; or it can't be made or written to.
    """
    check_folder(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise InvalidInput(f"the folder {folder} holds other files; give a new or an empty one")


def load(folder: str | Path) -> Result:
    """Loads what `Result.save` wrote: a module that runs, trains and exports, without the model's class.

    Args:
        folder: the saved folder.

    Returns:
        A result with its report; the original model is not part of it.

    Raises:
        InvalidInput: the folder is not one, its files hold more than data, or they are damaged.
    """
    from lobo_fx.result import Result

    folder = Path(folder)
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise InvalidInput(f"{folder} was not written by Result.save: it has no {MANIFEST_FILE}")
    manifest = read_json(file)
    if manifest.get("format") != 1:
        raise InvalidInput(f"{folder} has format {manifest.get('format')}; this version reads format 1")
    try:
        for name in manifest["output_types"]:
            if name.rpartition(".")[0] not in sys.modules:
                raise InvalidInput(f"the outputs are of type {name}; import {name.rpartition('.')[0]} first, then load")
        report = report_from_json(manifest["report"])
        passes = [(name, dict(settings)) for name, settings in manifest["passes"]]
        program = trace(folder / PROGRAM_FILE)
        restore_masks(program)
        set_weight_names(program.module, manifest["weights"])
        restore(program.module, manifest["kept_indices"])
    except LoboError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InvalidInput(f"{file} is damaged ({type(error).__name__}: {error}); save the result again") from error
    return Result(program, None, report, passes)


def report_as_json(report: Report) -> dict[str, Any]:
    """All of a report, to be read back as it was: numbers that JSON lacks are text."""
    return {
        "model": report.model,
        "notes": report.notes,
        "sheets": [dataclasses.asdict(sheet) for sheet in report.sheets],
        "passes": [
            {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in vars(row).items()}
            for row in report.rows
        ],
        "artifacts": {
            label: {
                "path": str(a.path),
                "files": [str(file) for file in a.files],
                "bytes": a.bytes,
                "gzip_bytes": a.known_gzip_bytes,
                "parity": a.parity,
                "details": dict(a.details),
            }
            for label, a in report.artifacts.items()
        },
        "benchmark": report.benchmark and dataclasses.asdict(report.benchmark),
    }


def report_from_json(saved: dict[str, Any]) -> Report:
    """Reads `report_as_json` back; artifacts whose files are gone or have another size are left out."""
    rows = [Row(**row) for row in saved["passes"]]
    rows = [dataclasses.replace(r, snr=float(r.snr), score=None if r.score is None else float(r.score)) for r in rows]
    artifacts = {label: _artifact(entry) for label, entry in saved["artifacts"].items()}
    measured = saved["benchmark"]
    if measured is not None:
        latencies = {label: Latency(**entry) for label, entry in measured["latencies"].items()}
        measured = Benchmark(**{**measured, "latencies": latencies})
    there = {label: artifact for label, artifact in artifacts.items() if _is_there(artifact)}
    sheets = [Sheet(s["title"], tuple(s["columns"]), tuple(map(tuple, s["rows"]))) for s in saved.get("sheets", ())]
    return Report(saved["model"], rows, list(saved["notes"]), there, measured, sheets)


def _artifact(saved: dict[str, Any]) -> Artifact:
    files = tuple(Path(file) for file in saved["files"])
    artifact = Artifact(Path(saved["path"]), files, saved["bytes"], saved["parity"], saved["details"])
    if saved["gzip_bytes"] is not None:
        vars(artifact)["gzip_bytes"] = saved["gzip_bytes"]  # as the cached property would
    return artifact


def _is_there(artifact: Artifact) -> bool:
    there = all(file.is_file() for file in artifact.files)
    return there and sum(file.stat().st_size for file in artifact.files) == artifact.bytes


def read_pt2(path: Path) -> ExportedProgram:
    """Loads an exported program after making sure that the file holds data only.

    Torch reads a copy of the entries that were inspected, not the file: readers of zip files disagree about what
    is in one that was made to deceive them.

    Raises:
        InvalidInput: no such file, not an archive of `torch.export.save`, or one that would run code.
    """
    if not path.is_file():
        raise InvalidInput(f"no file {path}")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from torch.ao.quantization.fx import _decomposed  # noqa: F401  operators of quantized programs
        from torch.export.pt2_archive._package import load_pt2

        copy = Path(folder) / PROGRAM_FILE
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
    """Makes parameters that share all their memory one object again, as they were when they were saved."""
    known: dict[object, torch.Tensor] = {}
    for name, tensor in program.state_dict.items():
        if isinstance(tensor, torch.nn.Parameter) and tensor.numel():
            place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            program.state_dict[name] = known.setdefault(place, tensor)


def _copy_inspected(path: Path, copy: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise InvalidInput(f"{path} is not an archive written by torch.export.save")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as written:
        _inspect(path, archive)
        for entry in archive.infolist():
            with archive.open(entry) as source, written.open(entry.filename, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)


def _inspect(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses an archive that would unpickle objects, import modules, or call anything but operators.

    Only the entries that `torch.export.save` writes for one program are let through, by exact name: torch's own
    reader ignores case and falls back to older formats that unpickle.

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
