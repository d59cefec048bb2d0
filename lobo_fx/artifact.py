"""What an exporter writes, and what every exporter is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from lobo_fx.errors import InvalidInput
from lobo_fx.program import Program


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A deployable file, written and checked.

    Attributes:
        path: the file to load.
        files: all files that belong to it (external data beside the model).
        bytes: their size on disk when they were written.
        parity: largest difference between the runtime's outputs and PyTorch's, as a share of the output
            range, over the batches that were compared.
        details: what the exporter says of it (opset, kernels that run as integers, ...).
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    parity: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def gzip_bytes(self) -> int:
        """Size after gzip at level 6, as a download would be. Takes seconds for large files."""
        counter = _Counter()
        with gzip.GzipFile(fileobj=counter, mode="wb", compresslevel=6, mtime=0) as stream:
            for file in self.files:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, stream, 1 << 20)
        return counter.size

    @property
    def known_gzip_bytes(self) -> int | None:
        """`gzip_bytes` if it was asked for before, else None."""
        size: int | None = self.__dict__.get("gzip_bytes")
        return size


class _Counter:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""


class Exporter(Protocol):
    """Writes a program in one format; registered under the entry-point group `lobo_fx.exporters`."""

    @property
    def suffix(self) -> str:
        """How names of its files end (".onnx")."""

    def export(self, program: Program, path: Path, metadata: Mapping[str, str]) -> Artifact:
        """Writes the file, compares it with PyTorch, and only then puts it at `path`.

        Raises:
            ExportError: the program can't be written, or the file disagrees with PyTorch; nothing is left.
        """


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
