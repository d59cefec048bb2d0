"""The nodes of a file, and the protocol of an exporter that can list them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol, runtime_checkable

__all__ = ["FileGraph", "FileNode", "ListsNodes"]


@dataclasses.dataclass(frozen=True)
class FileNode:
    """One node.

    Attributes:
        name: name in the file; unique.
        module: dotted name of the user's module that it belongs to; empty for the model itself.
        outputs: names of its outputs.
        bytes: size of the stored tensors that it reads; a tensor that several nodes read counts for the first.
        precision: the type it computes in (`float32`, `int8`); if its weight is stored in another type, that follows
            after a comma. Empty where the file does not say.
        is_layer: whether it multiplies by a stored weight.
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
        name: name of the graph in the file.
        nodes: its nodes, in order.
    """

    name: str
    nodes: tuple[FileNode, ...]


@runtime_checkable
class ListsNodes(Protocol):
    """An exporter that can list the nodes of its files."""

    def nodes(self, path: Path) -> FileGraph:
        """The nodes of a file that this exporter wrote."""
