"""What an exporter writes, and what every exporter is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
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


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` whose files move there when all went well, and vanish when not."""
    check_writable(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.absolute().parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
