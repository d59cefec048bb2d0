"""Reads reports back from the folders that they were written to."""

from __future__ import annotations

import os
from pathlib import Path

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_readable, read_json
from lobo_fx.report.report import LEADER, Report
from lobo_fx.report.schema import SCHEMA, first_fault

__all__ = ["read_report"]


def read_report(folder: str | Path) -> Report:
    """Reads the report of a run; files that it names may no longer exist.

    Args:
        folder: a folder that `Report.save` or `lobo-fx compile -o` wrote to.

    Raises:
        InvalidInput: the folder has no report, the report is of another schema, or it is damaged.
    """
    folder = Path(folder)
    if folder.name == LEADER and os.path.isfile(folder):
        raise InvalidInput(f"{folder} is a file; give its folder, {folder.parent}")
    file = folder / LEADER
    check_readable(file, f"{folder} holds no {LEADER}; give a folder that `lobo-fx compile -o` wrote")
    saved = read_json(file)
    if saved.get("schema") != SCHEMA:
        found = f"schema {saved['schema']!r}" if "schema" in saved else "no schema number, as before there was one"
        raise InvalidInput(f"{file} has {found}; this version reads schema {SCHEMA}: compile the model again")
    if fault := first_fault(saved):
        raise InvalidInput(f"{file} is damaged: {fault}")
    try:
        return Report.from_json(saved, check_files=False)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{file} is damaged ({type(error).__name__}: {error})") from error
