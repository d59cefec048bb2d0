"""Kernels on a grid of sizes, and their costs at sizes between.

A kernel's time is interpolated between the nearest sizes that were measured, and is longer where a vector register is
only filled in part.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.removal import size_with
from lobo_fx.graph.operators import arguments
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.quantization.integers.kernels import Sizes, one_row
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["Grid", "PricedGrid"]

_LEVELS = ((), (0.125, 0.25, 0.375, 0.5, 0.75, 1.0), (0.125, 0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0))
"""Shares of each size that are measured, by how many sizes a kernel depends on; the last is for three and more."""
_MOST_AXES = 4
"""With more, a grid has hundreds of kernels; a concatenation of many tensors grows with its elements anyway."""
_UNIT, _REGISTER = 8, 16
"""Measured sizes are multiples of 8; those of long axes, of the floats in the widest vector register."""
_LONG = 4 * _REGISTER
"""An axis as long as this is also measured once with a size that leaves part of a register empty."""
_FILLS_REGISTERS = ("conv", "linear", "matmul", "attention")
"""Operators that multiply many columns; elementwise ones leave a register partly empty only at their very end."""
_NOISE, _MOST = 0.25, 2.0
"""The time that the empty part of a register takes, over the time that it would take if it were full: less than the one
counts as noise of measuring, more than the other as that."""

Describe = Callable[[Sizes], object]
"""Gives the kernel at some sizes; anything else if there is none."""


@dataclasses.dataclass
class _Resized(Sizes):
    """Sizes of tensors at other sizes of axes; records which axes were asked for, and if as tensors' dimensions."""

    inference: Inference
    sizes: Mapping[Axis, int] = dataclasses.field(default_factory=dict)
    asked: dict[Axis, bool] = dataclasses.field(default_factory=dict)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        traced, axes = one_row(node), self.inference.values.get(node)
        if traced is None or not isinstance(axes, tuple):
            return traced
        return tuple(self._size(axis, size, True) for axis, size in zip(axes, traced, strict=True))

    def argument(self, node: fx.Node, name: str) -> Any:
        axis, traced = self.inference.findings.sizes.get(node, {}).get(name), arguments(node)[name]
        return self._size(axis, traced, False) if isinstance(axis, Axis) else traced

    def _size(self, axis: Axis, traced: int, is_dimension: bool) -> int:
        root = axis.find()
        if root.locked or not isinstance(root.size, int):
            return traced
        self.asked[root] = is_dimension or self.asked.get(root, False)
        return self.sizes[root] if root in self.sizes else int(size_with(root, self.sizes))

    def independent(self) -> Iterator[Axis]:
        """The axes that were asked for, as axes whose sizes can be combined freely.

        An axis that is a product or a concatenation, and shares a part with another (channels with their groups), is
        replaced by its parts.
        """
        readers = collections.Counter(leaf for axis in self.asked for leaf in axis.leaves())
        for axis in self.asked:
            parts = list(axis.leaves())
            if all(readers[part] == 1 for part in parts):
                yield axis
            else:
                yield from (part for part in parts if not part.locked)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A kernel at several sizes.

    Attributes:
        axes: the axes that it depends on, whose sizes can be combined freely.
        levels: sizes of each axis that are measured, in rising order.
        kernels: kernels by sizes.
        uneven: by axis, sizes with one of that axis that leaves half a register empty, and the kernel.
    """

    axes: tuple[Axis, ...]
    levels: tuple[tuple[int, ...], ...]
    kernels: Mapping[tuple[int, ...], Kernel]
    uneven: Mapping[Axis, tuple[tuple[int, ...], Kernel]]

    @classmethod
    def of(cls, inference: Inference, describe: Describe) -> Grid | None:
        """Makes a grid of the kernel that a function describes; None if it has no name, or too many axes."""
        resized = _Resized(inference)
        if not isinstance(found := describe(resized), Kernel):
            return None
        axes = tuple(dict.fromkeys(resized.independent()))
        if len(axes) > _MOST_AXES:
            return None
        shares = _LEVELS[min(len(axes), len(_LEVELS) - 1)]
        levels = tuple(tuple(sorted({_level(axis.size, share) for share in shares})) for axis in axes)

        def resize(sizes: Sequence[int]) -> Any:
            return describe(_Resized(inference, dict(zip(axes, sizes, strict=True))))

        kernels = {sizes: resize(sizes) for sizes in itertools.product(*levels)}
        uneven = {}
        for at, axis in enumerate(axes if found.operator in _FILLS_REGISTERS else ()):
            if axis.size >= _LONG and resized.asked.get(axis):  # a number of groups fills no register
                half_empty = levels[at][0] + _REGISTER // 2
                sizes = tuple(half_empty if other == at else level[-1] for other, level in enumerate(levels))
                uneven[axis] = sizes, resize(sizes)
        return cls(axes, levels, kernels, uneven)

    def leaves(self) -> Iterator[Axis]:
        """The axes that can be cut on their own, of which its axes are made."""
        for axis in self.axes:
            yield from axis.leaves()

    def all_kernels(self) -> Iterator[Kernel]:
        """All kernels that are to be measured."""
        yield from self.kernels.values()
        yield from (kernel for _, kernel in self.uneven.values())

    def price(self, table: CostTable) -> PricedGrid | None:
        """Adds the costs of a table; None if a size has none, since a runtime may refuse a kernel at some sizes."""
        costs = {sizes: cost for sizes, k in self.kernels.items() if isinstance(cost := table.find(k), Cost)}
        if len(costs) < len(self.kernels):
            return None
        plain = PricedGrid(self, costs, {})
        return PricedGrid(self, costs, {axis: plain.paid(axis, table) for axis in self.uneven})


@dataclasses.dataclass(frozen=True)
class PricedGrid:
    """A kernel's costs.

    A size that leaves part of its last register empty costs as much as a larger size, up to the next full register:
    between these effective sizes costs are interpolated.

    Attributes:
        grid: the kernel at several sizes.
        costs: costs by sizes.
        empty: by axis, the time of a register's empty part over what it would take if it were full, of the float kernel
            and of the integer one.
    """

    grid: Grid
    costs: Mapping[tuple[int, ...], Cost]
    empty: Mapping[Axis, tuple[float, float]]

    def at(self, widths: Mapping[Axis, int], instead: Mapping[Axis, int] | None = None) -> Cost:
        """The cost at the widths of leaves, some axes of other sizes instead."""
        return self.between(
            [instead[axis] if instead and axis in instead else size_with(axis, widths) for axis in self.grid.axes]
        )

    def paid(self, axis: Axis, table: CostTable) -> tuple[float, float]:
        """What `empty` says of an axis, by the uneven size that was measured."""
        sizes, kernel = self.grid.uneven[axis]
        full = [
            size + _REGISTER // 2 if other is axis else size for other, size in zip(self.grid.axes, sizes, strict=True)
        ]
        measured, none, whole = table.find(kernel), self.between(sizes), self.between(full)
        if isinstance(measured, NoCost):
            return 0.0, 0.0
        return (
            _share(measured.floating, none.floating, whole.floating),
            _share(measured.integer, none.integer, whole.integer),
        )

    def between(self, sizes: Sequence[int]) -> Cost:
        """The cost on the line through the nearest sizes that were measured."""
        return Cost(self._line(sizes, 0), self._line(sizes, 1))

    def _line(self, sizes: Sequence[int], integer: int) -> float:
        """The cost of the float kernel, or of the integer one."""
        corners: list[list[tuple[int, float]]] = []
        for axis, size, levels in zip(self.grid.axes, sizes, self.grid.levels, strict=True):
            if len(levels) == 1:
                corners.append([(levels[0], 1.0)])
                continue
            empty = self.empty.get(axis, (0.0, 0.0))[integer]
            places = [_effective(level, empty) for level in levels]
            place = _effective(size, empty)
            above = min(max(1, bisect.bisect_left(places, place)), len(levels) - 1)  # the lowest two if it is below all
            share = (place - places[above - 1]) / (places[above] - places[above - 1])
            corners.append([(levels[above - 1], 1 - share), (levels[above], share)])
        total = 0.0
        for corner in itertools.product(*corners):
            cost = self.costs[tuple(size for size, _ in corner)]
            total += math.prod(share for _, share in corner) * (cost.integer if integer else cost.floating)
        return max(0.0, total)


def _effective(size: int, empty: float) -> float:
    """The size that a kernel's time is in proportion to, with the empty part of the last register."""
    return size + (-size % _REGISTER) * empty


def _share(measured: float, none: float, whole: float) -> float:
    """How far a time lies on the way from the empty part of a register costing nothing to its costing as the rest."""
    share = (measured - none) / (whole - none) if whole > none else 0.0
    return min(share, _MOST) if share > _NOISE else 0.0


def _level(size: int, share: float) -> int:
    found, unit = round(size * share), _REGISTER if size >= _LONG else _UNIT
    return max(unit, unit * round(found / unit)) if size >= 2 * _UNIT and share < 1 else max(1, found)
