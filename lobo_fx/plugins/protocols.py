"""What an exporter, a runtime and a session must offer, and what kernels are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lobo_fx.graph.program import Program
from lobo_fx.plugins.artifact import Artifact


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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operator on tensors of given shapes.

    Attributes:
        operator: `conv`, `linear`, `matmul`, `add`, `mul`, `concat`, `average_pool`, `global_average_pool`,
            `sigmoid`, `leaky_relu`, `attention`, or `convert` (float to integer and back).
        shapes: of the inputs, one row of the batch; the weight's after them.
        settings: what else the cost depends on (strides, groups).
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """A line that names it in a table."""
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        return " ".join([self.operator, shapes, *(f"{name}={_flat(value)}" for name, value in self.settings)])


def _flat(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Microseconds of one call, one thread.

    Attributes:
        floating: as a float32 kernel; of `convert`, from float to integers; of `attention`, as several.
        integer: as an 8-bit integer kernel; of `convert`, from integers to float; of `attention`, as one fused
            float kernel.
    """

    floating: float
    integer: float


@runtime_checkable
class MeasuresKernels(Protocol):
    """A runtime that can tell what its kernels cost."""

    def measure_kernels(self, kernels: Sequence[Kernel]) -> dict[Kernel, Cost]:
        """Times operators as float and as integer kernels, one thread."""


Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One input of a session: name, numpy dtype, shape; None for a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Session(Protocol):
    """A loaded file, ready to run."""

    @property
    def inputs(self) -> list[ArraySpec]:
        """What it takes."""

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        """Runs it once."""


class Runtime(Protocol):
    """Loads and runs files on CPU; registered under the entry-point group `lobo_fx.runtimes`."""

    @property
    def version(self) -> str:
        """Name and version, for reports."""

    def load(self, path: Path, threads: int) -> Session:
        """Loads a file to run on `threads` threads."""
