"""Files and folders: refused before work starts, written beside their place first, and never torn.

What belongs together has one leader, the file that is opened first: a model, the manifest of a folder. The others are
named by their content, and the leader names them. Moving the leader to its place is the one step that counts: before
it the old files stand, after it the new ones, whatever is killed in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput

__all__ = [
    "check_folder",
    "check_named_by_content",
    "check_unpacked_size",
    "check_writable",
    "file_name",
    "followed",
    "is_leftover",
    "make_folder",
    "name_by_content",
    "read_json",
    "write_files",
    "written_beside",
]

_UNPACKED_TIMES, _UNPACKED_BYTES = 20, 2**26
"""How much larger than the file an archive may unpack, and what any may."""

_LONGEST_NAME = 60
_DRAFT = ".draft-"
_DIGITS = 16
_NAMED_BY_CONTENT = re.compile(rf".+\.[0-9a-f]{{{_DIGITS}}}\.[^.]+", re.DOTALL)


def followed(path: Path) -> Path:
    """The file that is written where `path` is asked for: the target of a link, which stays a link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def check_writable(path: Path) -> None:
    """Refuses a path that can't be written to, before any work.

    Raises:
        InvalidInput: the folder is missing or not writable, or the path is a folder, a device or a pipe.
    """
    _check_characters(path)
    place = followed(path)
    folder = place.parent
    if path.is_dir():
        raise InvalidInput(f"{path} is a folder; give the path of a file")
    if place.is_symlink():
        raise InvalidInput(f"{path} is a link that leads in a circle")
    if place.exists() and not place.is_file():
        raise InvalidInput(f"{path} is a device or a pipe, which a file would replace; give the path of a file")
    if not folder.is_dir():
        raise InvalidInput(f"the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"the folder {folder} is not writable")
    if place.exists() and not os.access(place, os.W_OK):
        raise InvalidInput(f"{path} is write-protected")


def _check_characters(path: Path) -> None:
    if "\0" in str(path):
        raise InvalidInput(f"{str(path)!r} holds a null character, which no path may")


def file_name(title: str) -> str:
    """A title as the name of a file: letters, digits, spaces, "-" and "_" stay, so that it leads nowhere else."""
    return "".join(character if character.isalnum() or character in " _" else "-" for character in title)[
        :_LONGEST_NAME
    ]


def check_unpacked_size(path: Path) -> None:
    """Refuses an archive that unpacks to far more than it holds, before it is unpacked.

    Raises:
        InvalidInput: gives both sizes.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked, packed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if unpacked > max(_UNPACKED_BYTES, _UNPACKED_TIMES * packed):
        raise InvalidInput(
            f"{path} has {packed / 1e6:.1f} MB and unpacks to {unpacked / 1e6:.0f} MB; refused. "
            "If it is yours, write it uncompressed"
        )


def check_folder(folder: Path) -> None:
    """Refuses a folder that can't be made or written to, before any work; makes nothing.

    Raises:
        InvalidInput: something on the way is no folder or not writable.
    """
    _check_characters(folder)
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

    `path` moves last. Files that only the older `path` refers to, named by their content, are removed after that.

    Raises:
        InvalidInput: the place can't be written to.
    """
    check_writable(path)
    leader = followed(path)
    try:
        with _draft(leader) as draft:
            yield draft
            older = _companions(leader)
            files = [file for file in draft.iterdir() if file.name != path.name]
            for file in files:
                os.replace(file, leader.parent / file.name)
            os.replace(draft / path.name, leader)
            for stale in older - _companions(leader):
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInput(f"can't write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _draft(leader: Path) -> Iterator[Path]:
    """A hidden folder beside `leader`, locked while it is written to, so that what a killed process left is known."""
    start = f".{leader.name}{_DRAFT}"
    for left in leader.parent.glob(f"{glob.escape(start)}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=start, dir=leader.parent))
    try:
        with _locked(draft):
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _companions(leader: Path) -> set[Path]:
    """The files beside `leader` that are named by their content and that it names."""
    named = [file for file in leader.parent.iterdir() if _NAMED_BY_CONTENT.fullmatch(file.name)]
    content = leader.read_bytes() if named and leader.is_file() else b""
    return {file for file in named if file.name.encode() in content}


def name_by_content(file: Path) -> Path:
    """Renames a file that another one is to refer to, "weights.data" to "weights.0123456789abcdef.data".

    Its old contents keep their name, so that an older file that refers to them still finds them.
    """
    named = file.with_name(f"{file.stem}.{_checksum(file)}{file.suffix}")
    return file.rename(named)


def check_named_by_content(file: Path) -> None:
    """Refuses a file that is not what its name says.

    Raises:
        InvalidInput: it is missing, or its content is another.
    """
    if not file.is_file():
        raise InvalidInput(f"no file {file}")
    if not _NAMED_BY_CONTENT.fullmatch(file.name) or file.suffixes[-2][1:] != _checksum(file):
        raise InvalidInput(f"{file} is damaged or was replaced: its content is not what its name says")


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGITS]


def is_leftover(entry: Path, leader: str, companion: str) -> bool:
    """Whether a killed process may have left `entry`: a draft of `leader`, or a `companion` named by its content."""
    name = Path(companion)
    alike = entry.name.startswith(f"{name.stem}.") and entry.suffix == name.suffix
    named = alike and _NAMED_BY_CONTENT.fullmatch(entry.name) is not None
    return named or entry.name.startswith(f".{leader}{_DRAFT}")


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files into a folder, which is made if missing; each is whole or not there.

    All are written before the first moves to its place; the last one named moves last.

    Raises:
        InvalidInput: the folder can't be made or written to.
    """
    make_folder(folder)
    with contextlib.ExitStack() as drafts:
        for name, content in reversed(list(contents.items())):  # what is entered first is left last
            draft = drafts.enter_context(written_beside(folder / name))
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
