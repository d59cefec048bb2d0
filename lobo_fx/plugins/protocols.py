"""The protocols of exporters, runtimes and sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:  # so that a process that only runs a file does not import PyTorch
    from lobo_fx.graph.program import Program
    from lobo_fx.plugins.artifact import Artifact

__all__ = ["ArraySpec", "Arrays", "ChecksPrograms", "Exporter", "LoadsExactly", "Runtime", "Session"]


@runtime_checkable
class Exporter(Protocol):
    """Writes a program in one format; registered under the entry-point group `lobo_fx.exporters`."""

    @property
    def suffix(self) -> str:
        """Extension of its files (".onnx")."""

    def export(self, program: Program, path: Path, metadata: Mapping[str, str]) -> Artifact:
        """Writes the file, compares it with PyTorch, and moves it to `path` only if they agree.

        Raises:
            ExportError: the program can't be written, or the file disagrees with PyTorch; nothing is left.
        """


@runtime_checkable
class ChecksPrograms(Protocol):
    """An exporter that can refuse a program before passes run."""

    def check_program(self, program: Program) -> None:
        """Refuses a program that can't be written.

        Raises:
            ExportError: names the operator that the format can't express, its place in the user's code, and what to do.
        """


Arrays = Mapping[str, np.ndarray[Any, Any]]
"""Inputs of a session by their names."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One input of a session: name, numpy dtype, shape; None for a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        """The input as messages show it."""
        shape = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype}[{shape}]"


class Session(Protocol):
    """A loaded file, ready to run."""

    @property
    def inputs(self) -> list[ArraySpec]:
        """Its inputs."""

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        """Runs it once."""


class Runtime(Protocol):
    """Loads and runs files on CPU; registered under the entry-point group `lobo_fx.runtimes`."""

    @property
    def version(self) -> str:
        """Name and version, for reports."""

    def load(self, path: Path, threads: int) -> Session:
        """Loads a file to run on `threads` threads."""


@runtime_checkable
class LoadsExactly(Protocol):
    """A runtime that can give the outputs that a file has on another CPU, as this one's sums of products saturate."""

    def load_exact(self, path: Path) -> Session:
        """Loads a file so that no sum of integer products saturates, whatever the time it takes."""
