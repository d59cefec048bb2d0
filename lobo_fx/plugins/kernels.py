"""Names and costs of kernels, and the protocols of runtimes that measure them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lobo_fx.plugins.protocols import Arrays

__all__ = ["Cost", "Kernel", "MeasuresKernels", "NoCost", "ProfilesNodes", "Setting"]

Setting = int | tuple[int, ...]
"""A number beside the shapes that a kernel's cost depends on, or one number for each dimension."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operator on tensors of given shapes, as a runtime computes it.

    Attributes:
        operator: `conv`, `linear`, `matmul`, `add`, `mul`, `concat`, `average_pool`, `global_average_pool`,
            `max_pool`, `sigmoid`, `leaky_relu`, `attention`, `product` (with a weight in codes of few bits), or
            `convert` (float to integer and back).
        shapes: shapes of the inputs, for one row of the batch, then of the weight. For `product`: rows × inputs,
            outputs × inputs.
        settings: what else the cost depends on (strides, groups; for `product`: bits of a code, size of a block that
            shares a scale, and ONNX Runtime's accuracy level: 1 for float activations, 4 for int8).
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[tuple[str, Setting], ...] = ()

    @property
    def key(self) -> str:
        """The kernel's key in a cost table."""
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        return " ".join([self.operator, shapes, *(f"{name}={_flat(value)}" for name, value in self.settings)])


def _flat(value: Setting) -> str:
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Microseconds of one call on one thread.

    Attributes:
        floating: as a float32 kernel. For `convert`: float to integer; for `attention`: as separate operators.
        integer: as an 8-bit integer kernel. For `convert`: integer to float; for `attention`: as one fused float
            kernel; for `product`: with packed codes.
    """

    floating: float
    integer: float


@dataclasses.dataclass(frozen=True)
class NoCost:
    """A kernel that could not be measured, and why."""

    reason: str


@runtime_checkable
class MeasuresKernels(Protocol):
    """A runtime that can measure the costs of kernels."""

    def measure_kernels(self, kernels: Sequence[Kernel]) -> Mapping[Kernel, Cost | NoCost]:
        """Times operators as float and as integer kernels, on one thread.

        A kernel that the runtime can't build or run gets a `NoCost`; the others are still measured.
        """


@runtime_checkable
class ProfilesNodes(Protocol):
    """A runtime that can profile the nodes of a file."""

    def node_times(
        self, path: Path, arrays: Arrays, names: Mapping[str, str], rounds: int = 20
    ) -> Mapping[str, list[float]]:
        """Times the nodes of a file, on one thread.

        Args:
            path: a file that an exporter wrote.
            arrays: its inputs.
            names: from names of nodes and outputs in the file to the name that their time is counted under.
            rounds: how many times the file runs.

        Returns:
            By that name, microseconds of each node that is counted under it, longest first; the empty name holds
            nodes that have none, such as changes of layout.
        """
