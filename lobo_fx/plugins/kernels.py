"""What a kernel is called, what it costs, and what a runtime that measures kernels must offer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from lobo_fx.plugins.protocols import Arrays

__all__ = ["Cost", "Kernel", "MeasuresKernels", "NoCost", "ProfilesNodes", "Setting"]

Setting = int | tuple[int, ...]
"""A number that a kernel's cost depends on beside its shapes, or one for each dimension."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operator on tensors of given shapes, as a runtime computes it.

    Attributes:
        operator: `conv`, `linear`, `matmul`, `add`, `mul`, `concat`, `average_pool`, `global_average_pool`,
            `max_pool`, `sigmoid`, `leaky_relu`, `attention`, `product` (with a weight in codes of few bits), or
            `convert` (float to integer and back).
        shapes: of the inputs, one row of the batch; the weight's after them. Of `product`: rows × inputs, outputs ×
            inputs.
        settings: what else the cost depends on (strides, groups; of `product` the bits of a code, the block that shares
            a scale, and ONNX Runtime's accuracy level: 1 for float activations, 4 for int8).
    """

    operator: str
    shapes: tuple[tuple[int, ...], ...]
    settings: tuple[tuple[str, Setting], ...] = ()

    @property
    def key(self) -> str:
        """A line that names it in a table."""
        shapes = " ".join("x".join(map(str, shape)) for shape in self.shapes)
        return " ".join([self.operator, shapes, *(f"{name}={_flat(value)}" for name, value in self.settings)])


def _flat(value: Setting) -> str:
    return str(value) if isinstance(value, int) else "x".join(map(str, value))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Microseconds of one call, one thread.

    Attributes:
        floating: as a float32 kernel; of `convert`, from float to integers; of `attention`, as several.
        integer: as an 8-bit integer kernel; of `convert`, from integers to float; of `attention`, as one fused
            float kernel; of `product`, with the codes.
    """

    floating: float
    integer: float


@dataclasses.dataclass(frozen=True)
class NoCost:
    """A kernel that could not be measured, and why."""

    reason: str


@runtime_checkable
class MeasuresKernels(Protocol):
    """A runtime that can tell what its kernels cost."""

    def measure_kernels(self, kernels: Sequence[Kernel]) -> Mapping[Kernel, Cost | NoCost]:
        """Times operators as float and as integer kernels, one thread.

        A kernel that the runtime can't build or run has no cost, and does not keep the others from theirs.
        """


@runtime_checkable
class ProfilesNodes(Protocol):
    """A runtime that can tell where the time of a file goes."""

    def node_times(
        self, path: Path, arrays: Arrays, names: Mapping[str, str], rounds: int = 20
    ) -> Mapping[str, list[float]]:
        """Times the nodes of a file, one thread.

        Args:
            path: a file that an exporter wrote.
            arrays: its inputs.
            names: by name of a value of the file, the node of the program that gives it: nodes' own, and outputs'.
            rounds: how often the file runs.

        Returns:
            By node, microseconds of each node of the file that belongs to it, the longest first; under an empty name
            those that belong to none, such as changes of layout.
        """
