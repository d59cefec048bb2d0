"""Saves a compiled program in a folder, without pickles: `torch.export`'s archive for the graph, JSON for the rest."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind, SymBoolArgument
from torch.utils import _pytree as pytree

from lobo_fx.axes.kept import kept_indices, restore
from lobo_fx.capture.archive import PROGRAM_FILE
from lobo_fx.capture.lifting import exported_program
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.passbase import shown
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.files import (
    check_folder,
    check_named_by_content,
    check_readable,
    is_leftover,
    make_folder,
    name_by_content,
    read_json,
    written_beside,
)
from lobo_fx.graph.masks import restore_masks
from lobo_fx.graph.program import Program, seal
from lobo_fx.graph.weight_names import set_weight_names, weight_names
from lobo_fx.report.report import Report
from lobo_fx.terminal.quiet import quiet

__all__ = ["MANIFEST_FILE", "Saved", "check_target", "read", "write"]

MANIFEST_FILE = "lobo_fx.json"
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Saved:
    """The contents of a saved folder.

    Attributes:
        program: the compiled program.
        report: what was done and what it changed.
        passes: name and settings of every pass, in order.
    """

    program: Program
    report: Report
    passes: list[tuple[str, dict[str, Any]]]


def write(saved: Saved, folder: Path) -> Path:
    """Writes the program and `lobo_fx.json` into `folder`; the program's file is named by its content.

    The folder is created if missing. A folder that holds an older result keeps it until the new one is complete.

    Raises:
        InvalidInput: the folder holds something else, or can't be made or written to; or the outputs are of a type
            that `torch.export` can't write.
    """
    check_target(folder)
    module = saved.program.module
    manifest = {
        "format": _FORMAT,
        "passes": saved.passes,
        "weights": weight_names(module),
        "kept_indices": kept_indices(module),
        "names": dict(module.program_facts.names),
        "estimated": module.program_facts.estimated,
        "output_types": sorted(_types(saved.program.signature.structure)),
        "report": saved.report.as_json(),
    }
    archive = io.BytesIO()  # torch aborts the interpreter where the disk is full
    try:
        program = exported_program(saved.program)
        _check_outputs(program)
        with quiet():  # torch warns of every weight that is transposed in memory, and writes it all the same
            torch.export.save(program, archive)
    except NotImplementedError as error:
        raise InvalidInput(f"the result can't be saved: {str(error).splitlines()[0]}") from error
    make_folder(folder)
    with written_beside(folder / MANIFEST_FILE) as draft:
        (draft / PROGRAM_FILE).write_bytes(archive.getbuffer())
        manifest["program"] = name_by_content(draft / PROGRAM_FILE).name
        (draft / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, default=shown), encoding="utf-8")
    return folder


def _check_outputs(program: ExportedProgram) -> None:
    """Refuses outputs that torch can't write, or writes and can't read.

    Raises:
        InvalidInput: names the output.
    """
    outputs = [spec for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    for place, spec in enumerate(outputs):
        text = isinstance(spec.arg, ConstantArgument) and isinstance(spec.arg.value, str)
        if text or isinstance(spec.arg, SymBoolArgument):
            told = f"the text {spec.arg.value!r}" if isinstance(spec.arg, ConstantArgument) else "a computed bool"
            raise InvalidInput(f"the result can't be saved: output {place} is {told}; leave it out with outputs=")


def check_target(folder: Path) -> None:
    """Refuses a folder that `write` must not or can't write to, before any work.

    Raises:
        InvalidInput: it holds files, but no saved program; or it can't be made or written to.
    """
    check_folder(folder)
    if not folder.is_dir() or (folder / MANIFEST_FILE).is_file():
        return
    if not all(is_leftover(entry, MANIFEST_FILE, PROGRAM_FILE) for entry in folder.iterdir()):
        raise InvalidInput(f"the folder {folder} holds other files; give a new or an empty one")


def read(folder: Path) -> Saved:
    """Reads what `write` wrote.

    Raises:
        InvalidInput: `write` did not write the folder, its files hold more than data, or they are damaged.
    """
    file = folder / MANIFEST_FILE
    check_readable(file, f"{folder} was not written by Result.save: it has no {MANIFEST_FILE}")
    manifest = read_json(file)
    if manifest.get("format") != _FORMAT:
        raise InvalidInput(f"{folder} has format {manifest.get('format')}; this version reads format {_FORMAT}")
    try:
        for name in manifest["output_types"]:
            if name.rpartition(".")[0] not in sys.modules:
                raise InvalidInput(f"the outputs are of type {name}; import {name.rpartition('.')[0]} first, then load")
        report = Report.from_json(manifest["report"])
        passes = [(name, dict(settings)) for name, settings in manifest["passes"]]
        archive = folder / Path(manifest["program"]).name
        check_named_by_content(archive)
        program = trace(archive)
        restore_masks(program)
        set_weight_names(program.module, manifest["weights"])
        restore(program.module, manifest["kept_indices"])
        names = {str(old): str(new) for old, new in manifest.get("names", {}).items()}
        program.module.set_facts(estimated=bool(manifest.get("estimated", False)), names=names)
        seal(program.module)
    except LoboError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InvalidInput(f"{file} is damaged ({type(error).__name__}: {error}); save the result again") from error
    return Saved(program, report, passes)


def _types(structure: pytree.TreeSpec) -> set[str]:
    """Output types that a library must register before they can be rebuilt; of nested classes, the outermost."""
    own = structure.type
    plain = own is None or own in (tuple, list, dict)
    found = set() if plain else {f"{own.__module__}.{own.__qualname__.partition('.')[0]}"}
    return found.union(*(_types(child) for child in structure.children()))
