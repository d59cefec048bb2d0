"""The nodes of a file, and what an exporter that can list them must offer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

__all__ = ["FileGraph", "FileNode", "ListsNodes"]


@dataclasses.dataclass(frozen=True)
class FileNode:
    """One node.

    Attributes:
        name: of it in the file, unlike all others.
        module: the user's module that it belongs to, dotted; empty for the model itself.
        outputs: names of the values that it gives.
        bytes: of stored tensors that it reads; what several nodes read is the first one's.
        precision: what it computes in (`float32`, `int8`), and after a comma what its weight is stored in, where that
            is another; empty where the file does not say.
        is_layer: whether it multiplies with a stored weight.
    """

    name: str
    module: str
    outputs: tuple[str, ...]
    bytes: int
    precision: str
    is_layer: bool


@dataclasses.dataclass(frozen=True)
class FileGraph:
    """A file's graph.

    Attributes:
        name: of the graph in the file.
        nodes: in order.
    """

    name: str
    nodes: tuple[FileNode, ...]


@runtime_checkable
class ListsNodes(Protocol):
    """An exporter whose files have nodes that can be told apart."""

    def nodes(self, path: Path) -> FileGraph:
        """The nodes of a file that it wrote."""
