"""Files and folders: refused before work starts, and written beside their place first."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput

__all__ = ["check_folder", "check_writable", "make_folder", "read_json", "write_files", "written_beside"]


def check_writable(path: Path) -> None:
    """Refuses a path that can't be written to, before any work.

    Raises:
        InvalidInput: the folder is missing or not writable, or the path is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; give the path of a file")
    if not folder.is_dir():
        raise InvalidInput(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"the folder {folder} is not writable")


def check_folder(folder: Path) -> None:
    """Refuses a folder that can't be made or written to, before any work; makes nothing.

    Raises:
        InvalidInput: something on the way is no folder or not writable.
    """
    near = folder.absolute()
    while not near.exists() and near != near.parent:
        near = near.parent
    if not near.is_dir():
        raise InvalidInput(f"can't make the folder {folder}: {near} is a file")
    if not os.access(near, os.W_OK):
        raise InvalidInput(f"can't make the folder {folder}: {near} is not writable")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where missing.

    Raises:
        InvalidInput: it can't be made.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"can't make the folder {folder}: {error.strerror}") from error


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` whose files move there when all went well, and vanish when not.

    Weights that an older file at `path` kept apart, in `path` + ".data", go with it.

    Raises:
        InvalidInput: the place can't be written to.
    """
    check_writable(path)
    place, draft = path.absolute().parent, None
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=place))
        yield draft
        apart = f"{path.name}.data"
        stale = path.exists() and not (draft / apart).exists()
        for file in sorted(draft.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, place / file.name)
        if stale:
            (place / apart).unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInput(f"can't write {path}: {error.strerror or error}") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files into a folder, which is made if missing; each is whole or not there.

    Raises:
        InvalidInput: the folder can't be made or written to.
    """
    make_folder(folder)
    with written_beside(folder / next(iter(contents))) as draft:
        for name, content in contents.items():
            (draft / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [folder / name for name in contents]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        InvalidInput: it can't be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}; expected an object with named entries")
    return found
