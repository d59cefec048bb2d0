"""An artifact: the file that an exporter wrote, with its size and parity."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Artifact"]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A deployable file, written and checked.

    Attributes:
        path: the file to load.
        files: all files that belong to it (external data beside the model).
        bytes: their size on disk when they were written.
        parity: largest difference between the runtime's outputs and PyTorch's, as a share of the output
            range, over the batches that were compared; NaN where every output is random.
        details: what the exporter says of it (opset, kernels that run as integers, ...).
        score: what `evaluate` says of the file itself, as its runtime runs it; None where it was not asked.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    parity: float
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    score: float | None = None

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
        """`gzip_bytes` if it was computed before, else None."""
        size: int | None = self.__dict__.get("gzip_bytes")
        return size


class _Counter:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing: no data is buffered."""
