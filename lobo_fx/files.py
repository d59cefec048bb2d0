"""Files and folders: refused before work starts, written to a temporary place first, and never half-written.

Of files that belong together, one is the leader, which is opened first: a model, the manifest of a folder. The others
are named by their content, and the leader refers to them. Moving the leader into place is the decisive step: before
it, readers find the old files, and after it the new ones, even if the process is killed.
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
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput

__all__ = [
    "check_folder",
    "check_named_by_content",
    "check_readable",
    "check_unpacked_size",
    "check_writable",
    "checksum",
    "file_name",
    "followed",
    "is_leftover",
    "make_folder",
    "name_by_content",
    "named_by",
    "read_json",
    "temporary_folder",
    "write_files",
    "written_beside",
]

_UNPACKED_TIMES, _UNPACKED_BYTES = 20, 2**26
"""How many times larger than itself an archive may unpack, and how many bytes any archive may."""

_LONGEST_NAME = 60
_DRAFT, _DOUBTFUL = ".draft-", ".doubtful"
_LONGEST_WAIT = 5.0
_DIGITS = 16
_NAMED_BY_CONTENT = re.compile(rf".+\.[0-9a-f]{{{_DIGITS}}}\.[^.]+", re.DOTALL)


def followed(path: Path) -> Path:
    """The file that is written for `path`: the target of a link; the link itself stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def check_writable(path: Path) -> None:
    """Refuses a path that can't be written to, before any work.

    Raises:
        InvalidInput: the folder is missing or not writable, or the path is a folder, a device or a pipe.
    """
    _check_characters(path)
    with _refused(f"can't write {path}"):
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


def check_readable(path: Path, missing: str = "") -> None:
    """Refuses a path at which there is no file that can be read.

    Args:
        path: the file.
        missing: what to say if there is no file; by default, that there is none.

    Raises:
        InvalidInput: there is no file, or it is out of reach: its folder or the file itself is locked.
    """
    _check_characters(path)
    with _refused(f"can't read {path}"):
        if not path.is_file():
            raise InvalidInput(missing or f"no file {path}")
        path.open("rb").close()


def _check_characters(path: Path) -> None:
    if "\0" in str(path):
        raise InvalidInput(f"{str(path)!r} holds a null character, which no path may")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidInput(f"{str(path)!r} holds a character that no path may") from None


def file_name(title: str) -> str:
    """Turns a title into a file name: letters, digits, spaces, "_" and "-" stay, so that it is no path.

    Of a long title, the first words are kept whole, if possible.
    """
    name = "".join(character if character.isalnum() or character in " _" else "-" for character in title)
    if len(name) <= _LONGEST_NAME:
        return name
    words, space, _ = name[: _LONGEST_NAME + 1].rpartition(" ")
    return words.rstrip() if space and words.strip() else name[:_LONGEST_NAME]


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
    """Refuses a folder that can't be created or written to, before any work; creates nothing.

    Raises:
        InvalidInput: a file is in the way, or a folder is not writable.
    """
    _check_characters(folder)
    with _refused(f"can't make the folder {folder}"):
        near = folder.absolute()
        while not near.exists() and near != near.parent:
            near = near.parent
        if not near.is_dir():
            raise InvalidInput(f"can't make the folder {folder}: {near} is a file")
        if not os.access(near, os.W_OK):
            raise InvalidInput(f"can't make the folder {folder}: {near} is not writable")


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents, where missing.

    Raises:
        InvalidInput: it can't be created.
    """
    check_folder(folder)
    with _refused(f"can't make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def written_beside(path: Path, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `path`; its files move there on success, and are deleted otherwise.

    `path` moves last. After that, files named by content to which only the older `path` refers are removed. If the
    process is killed before, the next one that writes `path` removes them, and files that the killed process had moved.

    Args:
        path: the leader.
        replaced: names of files that belong to it and are not named by their content. They must state which `path` they
            are meant for, as a kill may leave them beside another one. Those that the folder lacks are removed.

    Raises:
        InvalidInput: the place can't be written to.
    """
    check_writable(path)
    leader = followed(path)
    for name in replaced:
        check_writable(leader.with_name(name))
    with _refused(f"can't write {path}"), _draft(leader) as draft:
        yield draft
        moved = [file for file in draft.iterdir() if file.name != path.name]
        with _locked(leader.parent):
            doubtful = sorted({*named_by(leader), *(file.name for file in moved)})
            (draft / _DOUBTFUL).write_text(json.dumps(doubtful), encoding="utf-8")
            for file in moved:
                os.replace(file, leader.parent / file.name)
            os.replace(draft / path.name, leader)
            for name in set(replaced) - {file.name for file in moved}:
                leader.with_name(name).unlink(missing_ok=True)
            _remove_unnamed(leader, doubtful)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for files that only this process needs.

    Raises:
        InvalidInput: it can't be written to.
    """
    with (
        _refused("can't write temporary files (the environment variable TMPDIR names their folder)"),
        tempfile.TemporaryDirectory() as folder,
    ):
        yield Path(folder)


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turns errors of the file system into our own."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _draft(leader: Path) -> Iterator[Path]:
    """A hidden folder beside `leader`, locked while it is in use, so that those of killed processes are recognised."""
    start = f".{leader.name}{_DRAFT}"
    with contextlib.ExitStack() as held:
        with _locked(leader.parent):
            for left in leader.parent.glob(f"{glob.escape(start)}*"):
                _remove_left(leader, left)
            draft = Path(tempfile.mkdtemp(prefix=start, dir=leader.parent))
            held.callback(shutil.rmtree, draft, ignore_errors=True)
            held.enter_context(_locked(draft, wait=0))
        yield draft


def _remove_left(leader: Path, draft: Path) -> None:
    """Removes the draft of a killed process, and files that it was about to remove or had moved in vain."""
    with contextlib.suppress(OSError), _locked(draft, wait=0) as dead:
        if dead:
            with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
                _remove_unnamed(leader, json.loads((draft / _DOUBTFUL).read_text(encoding="utf-8")))
            shutil.rmtree(draft, ignore_errors=True)


def _remove_unnamed(leader: Path, doubtful: list[str]) -> None:
    """Removes doubtful files named by content that neither `leader` nor a copy of it refers to."""
    unnamed = _named_by_content(leader.parent).intersection(doubtful) - named_by(leader)
    with contextlib.suppress(OSError):  # what can't be removed stays
        for copy in leader.parent.glob(f"*{glob.escape(leader.suffix)}") if unnamed else ():
            unnamed -= named_by(copy)
        for name in unnamed:
            (leader.parent / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: float = _LONGEST_WAIT) -> Iterator[bool]:
    """Locks a folder; yields False where the file system has no locks, or another holder keeps it too long.

    Args:
        folder: a folder that processes and threads use in turn.
        wait: seconds to wait for another holder.
    """
    handle, until, ours = os.open(folder, os.O_RDONLY), time.monotonic() + wait, False
    try:
        with contextlib.suppress(OSError):
            while not ours:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    ours = True
                except BlockingIOError:
                    if time.monotonic() >= until:
                        break
                    time.sleep(_LONGEST_WAIT / 100)
        yield ours
    finally:
        os.close(handle)


def named_by(leader: Path) -> set[str]:
    """The files beside `leader` that are named by their content and that it refers to."""
    names = _named_by_content(leader.parent)
    content = leader.read_bytes() if names and leader.is_file() else b""
    return {name for name in names if name.encode() in content}


def _named_by_content(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if _NAMED_BY_CONTENT.fullmatch(file.name)}


def name_by_content(file: Path) -> Path:
    """Renames a file to which another one will refer, "weights.data" to "weights.0123456789abcdef.data".

    Older versions keep their names, so that an older file that refers to them still finds them.
    """
    named = file.with_name(f"{file.stem}.{checksum(file)}{file.suffix}")
    return file.rename(named)


def check_named_by_content(file: Path) -> None:
    """Refuses a file whose content does not match its name.

    Raises:
        InvalidInput: the file is missing, or has another content.
    """
    check_readable(file)
    if not _NAMED_BY_CONTENT.fullmatch(file.name) or file.suffixes[-2][1:] != checksum(file):
        raise InvalidInput(f"{file} is damaged or was replaced: its content is not what its name says")


def checksum(file: Path) -> str:
    """The checksum of a file, as used in the names of files named by content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGITS]


def is_leftover(entry: Path, leader: str, companion: str) -> bool:
    """Whether a killed process may have left `entry`: a draft of `leader`, or a `companion` named by its content."""
    name = Path(companion)
    alike = entry.name.startswith(f"{name.stem}.") and entry.suffix == name.suffix
    named = alike and _NAMED_BY_CONTENT.fullmatch(entry.name) is not None
    return named or entry.name.startswith(f".{leader}{_DRAFT}")


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files into a folder, which is created if missing; each is complete or absent.

    All are written before the first is moved into place; the last one named is moved last.

    Raises:
        InvalidInput: the folder can't be made or written to.
    """
    make_folder(folder)
    with contextlib.ExitStack() as drafts:
        for name, content in reversed(list(contents.items())):  # contexts exit in reverse order
            draft = drafts.enter_context(written_beside(folder / name))
            (draft / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [folder / name for name in contents]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        InvalidInput: it can't be read, or holds something else.
    """
    check_readable(path)
    with _refused(f"can't read {path}"):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}; expected an object with named entries")
    return found
