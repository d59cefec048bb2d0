"""What a file takes at any widths: kernels measured on a grid of sizes, everything else as the original's profile says.

A kernel's time at given sizes is interpolated between the nearest that were measured, is longer where a vector register
is only filled in part, and is scaled by what the same kernel takes within the original's file. What has no kernel in
the table grows and shrinks with its elements.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.removal import size_with
from lobo_fx.graph.layers import layer_of, weight_uses
from lobo_fx.graph.operators import arguments, aten, is_call
from lobo_fx.graph.provenance import module_name
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.goal.ranks import RankAxis, nodes_of
from lobo_fx.passes.goal.terms import Sum, Term
from lobo_fx.passes.quantization.integers.kernels import (
    KernelTable,
    Sizes,
    attention_kernel,
    conversion,
    one_row,
)
from lobo_fx.passes.quantization.integers.minimum_cut import is_converted
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["LatencyModel"]

_ATTENTION = aten.scaled_dot_product_attention.default
_LEVELS = ((), (0.125, 0.25, 0.375, 0.5, 0.75, 1.0), (0.125, 0.25, 0.5, 0.75, 1.0), (0.25, 0.5, 1.0))
"""By how many sizes a kernel depends on, the shares of each that are measured; of more, the last."""
_MOST_AXES = 4
"""Of more, a grid would have hundreds of kernels; a concatenation of many tensors grows with its elements anyway."""
_UNIT, _REGISTER = 8, 16
"""Sizes measured are multiples of 8, and of long axes of what the widest vector register holds in float."""
_LONG = 4 * _REGISTER
"""An axis as long as this is also measured once with a size that leaves part of a register empty."""
_CALL = 1.5
"""Microseconds of a node that has next to nothing to do."""
_SCALES = (0.5, 2.0)
"""By what a kernel within the file may differ from the same kernel alone."""


@dataclasses.dataclass
class _Resized(Sizes):
    """Sizes of tensors where axes have other sizes; notes which axes were asked for."""

    inference: Inference
    sizes: Mapping[Axis, int] = dataclasses.field(default_factory=dict)
    asked: dict[Axis, None] = dataclasses.field(default_factory=dict)

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        traced, axes = one_row(node), self.inference.values.get(node)
        if traced is None or not isinstance(axes, tuple):
            return traced
        return tuple(self._size(axis, size) for axis, size in zip(axes, traced, strict=True))

    def argument(self, node: fx.Node, name: str) -> Any:
        axis = self.inference.findings.sizes.get(node, {}).get(name)
        return self._size(axis, arguments(node)[name]) if isinstance(axis, Axis) else arguments(node)[name]

    def _size(self, axis: Axis, traced: int) -> int:
        root = axis.find()
        if root.locked or not isinstance(root.size, int):
            return traced
        self.asked[root] = None
        return self.sizes[root] if root in self.sizes else int(size_with(root, self.sizes))

    def independent(self) -> Iterator[Axis]:
        """What was asked for, in sizes that go together in any combination.

        An axis that is a product or a concatenation, and shares a part with another (channels with their groups), is as
        long as its parts make it.
        """
        readers = collections.Counter(leaf for axis in self.asked for leaf in axis.leaves())
        for axis in self.asked:
            parts = list(axis.leaves())
            if all(readers[part] == 1 for part in parts):
                yield axis
            else:
                yield from (part for part in parts if not part.locked)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """A kernel at several sizes.

    Attributes:
        axes: which it depends on, of sizes that go together in any combination.
        levels: sizes of each that are measured, in rising order.
        kernels: by sizes.
        uneven: by axis, the sizes with about a quarter of it, which leaves part of a register empty, and the kernel.
    """

    axes: tuple[Axis, ...]
    levels: tuple[tuple[int, ...], ...]
    kernels: Mapping[tuple[int, ...], Kernel]
    uneven: Mapping[Axis, tuple[tuple[int, ...], Kernel]]

    @classmethod
    def of(cls, inference: Inference, describe: Any) -> _Grid | None:
        """From what describes a kernel, given sizes; None where it has no name, or too many axes."""
        resized = _Resized(inference)
        if not isinstance(describe(resized), Kernel):
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
        for at, axis in enumerate(axes):
            if axis.size >= _LONG:
                quarter = _level(axis.size, 0.25) + _REGISTER // 2
                sizes = tuple(quarter if other == at else found[-1] for other, found in enumerate(levels))
                uneven[axis] = sizes, resize(sizes)
        return cls(axes, levels, kernels, uneven)

    @property
    def whole(self) -> tuple[int, ...]:
        """The sizes that there are."""
        return tuple(found[-1] for found in self.levels)

    def leaves(self) -> Iterator[Axis]:
        for axis in self.axes:
            yield from axis.leaves()

    def is_known(self, table: CostTable) -> bool:
        """Whether every size has a cost: a runtime may refuse a kernel at some."""
        return all(isinstance(table.find(kernel), Cost) for kernel in self.kernels.values())

    def at(
        self, table: CostTable, widths: Mapping[Axis, int], instead: Mapping[Axis, int] | None = None
    ) -> Cost | NoCost:
        """The cost at the widths of leaves, some axes of other sizes instead."""
        sizes = [instead[axis] if instead and axis in instead else size_with(axis, widths) for axis in self.axes]
        found = self._between(table, sizes)
        if isinstance(found, NoCost):
            return found
        for at, axis in enumerate(self.axes):
            if axis in self.uneven and sizes[at] % _REGISTER and sizes[at] < axis.size:
                floating, integer = self._excess(table, axis)
                empty = (-sizes[at] % _REGISTER) / (_REGISTER / 2)  # half of a register was, where it was measured
                share = empty * self.uneven[axis][0][at] / sizes[at]  # it is about as much time at every size
                found = Cost(found.floating * (1 + share * floating), found.integer * (1 + share * integer))
        return found

    def _excess(self, table: CostTable, axis: Axis) -> tuple[float, float]:
        """How much longer a kernel takes for a register that isn't filled, in float and integers, as shares."""
        sizes, kernel = self.uneven[axis]
        measured, even = table.find(kernel), self._between(table, sizes)
        if isinstance(measured, NoCost) or isinstance(even, NoCost) or not (even.floating and even.integer):
            return 0.0, 0.0
        return max(0.0, measured.floating / even.floating - 1), max(0.0, measured.integer / even.integer - 1)

    def _between(self, table: CostTable, sizes: Sequence[int]) -> Cost | NoCost:
        """The cost on the line through the nearest sizes that were measured."""
        corners: list[list[tuple[int, float]]] = []
        for size, levels in zip(sizes, self.levels, strict=True):
            above = min(bisect.bisect_left(levels, size), len(levels) - 1)
            if len(levels) == 1 or levels[above] == size:
                corners.append([(levels[above], 1.0)])
                continue
            low, high = levels[max(0, above - 1)], levels[max(1, above)]  # the two lowest where it is below both
            share = (size - low) / (high - low)
            corners.append([(low, 1 - share), (high, share)])
        floating = integer = 0.0
        for chosen in itertools.product(*corners):
            found = table.find(self.kernels[tuple(size for size, _ in chosen)])
            if isinstance(found, NoCost):
                return found
            weight = math.prod(share for _, share in chosen)
            floating, integer = floating + weight * found.floating, integer + weight * found.integer
        return Cost(max(0.0, floating), max(0.0, integer))


def _level(size: int, share: float) -> int:
    found, unit = round(size * share), _REGISTER if size >= _LONG else _UNIT
    return max(unit, unit * round(found / unit)) if size >= 2 * _UNIT and share < 1 else max(1, found)


class LatencyModel:
    """Microseconds of a program's file, float and with some operators as integers, at any widths.

    Args:
        inference: axes of the program.
        kernels: of the runtime.
        times: the profile of the program's file, as `ProfilesNodes.node_times` gives it.
    """

    def __init__(self, inference: Inference, kernels: KernelTable, times: Mapping[str, Sequence[float]]) -> None:
        self.inference, self.kernels, self.times = inference, kernels, times
        self.graph = inference.program.graph
        self.calls = [node for node in self.graph.nodes if node.op == "call_function"]
        self.grids = {node: grid for node in self.calls if (grid := self._grid(node)) is not None}
        self.conversions = {
            node: grid
            for node in self.graph.nodes
            if is_converted(node) and (grid := _Grid.of(inference, lambda sizes, n=node: conversion(n, sizes)))
        }
        self.pools = {
            node: grid
            for node in self.calls
            if (grid := _Grid.of(inference, lambda sizes, n=node: kernels.crossing(n, sizes)))
        }
        self.table: CostTable | None = None

    def _grid(self, node: fx.Node) -> _Grid | None:
        if is_call(node, _ATTENTION):
            return _Grid.of(self.inference, lambda sizes: attention_kernel(node, sizes))
        line = self.kernels.line(node)
        if line is None or line.refuse(node) is not None:
            return None
        return _Grid.of(self.inference, lambda sizes: line.describe(node, sizes))

    @property
    def priced(self) -> list[Kernel]:
        """All kernels whose costs are asked."""
        grids = [*self.grids.values(), *self.conversions.values(), *self.pools.values()]
        uneven = [kernel for grid in grids for _, kernel in grid.uneven.values()]
        return list(dict.fromkeys([*(kernel for grid in grids for kernel in grid.kernels.values()), *uneven]))

    def adopt(self) -> None:
        """Makes times of this machine those of the table's: kernels take what it says, the rest in proportion."""
        known = {
            node: grid for node, grid in self.grids.items() if node.name in self.times and grid.is_known(self._known)
        }
        if not known:
            return
        alone = {node: self._time(node, grid, {}, False) for node, grid in known.items()}
        ratio = statistics.median(alone[node] / max(self.times[node.name][0], 1e-3) for node in known)
        times = {name: [ratio * time for time in found] for name, found in self.times.items()}
        self.times = times | {node.name: [alone[node], *times[node.name][1:]] for node in known}

    def large(self, share: float) -> set[str]:
        """Names of the nodes whose kernels take this share of the whole time, or more."""
        least = share * self.sum(())({})
        known = {node: grid for node, grid in self.grids.items() if grid.is_known(self._known)}
        times = {node: self._scale(node, grid)[0] * self._time(node, grid, {}, False) for node, grid in known.items()}
        return {node.name for node, time in times.items() if time >= least}

    def varies(self, node: fx.Node, axes: Iterable[Axis]) -> bool:
        """Whether a node's kernel was measured at several sizes of these axes."""
        return node in self.grids and set(axes) <= set(self.grids[node].axes)

    def sum(self, leaves: Iterable[Axis], integer: Collection[str] = (), ranks: Iterable[RankAxis] = ()) -> Sum:
        """The latency as terms over widths, with these nodes as integers, and of some layers the rank chosen too.

        `table` must hold what is `priced`.
        """
        leaves = tuple(leaves)
        chosen = set(leaves)
        elements = {node: self._elements(node, {}) for node in self.calls}
        spread = sum(self.times.get("", ())) / max(1.0, sum(elements.values()))
        terms: list[Term] = []
        ranked = nodes_of(ranks)

        def add(node: fx.Node, axes: Iterable[Axis], value: Any) -> None:
            name = module_name(node) or node.name
            terms.append(Term(tuple(dict.fromkeys(leaf for leaf in axes if leaf in chosen)), value, name))

        for node in self.calls:
            times = list(self.times.get(node.name, ()))
            grid, near = self.grids.get(node), self._near(node)
            as_integer = node.name in integer
            if grid is not None and not self._is_fused(node, integer) and grid.is_known(self._known):
                scale, times = self._scale(node, grid)
                rank = ranked.get(node)
                add(
                    node,
                    (*grid.leaves(), *([] if rank is None else [rank.leaf])),
                    lambda widths, n=node, g=grid, s=scale, i=as_integer, r=rank: s * self._layer(n, g, widths, i, r),
                )
            if times or elements[node] * spread:
                whole, calls = sum(times), _CALL * len(times)
                weighed = max(0.0, whole - calls) + elements[node] * spread

                def rest(widths: Any, n: fx.Node = node, calls: float = calls, weighed: float = weighed) -> float:
                    return calls + weighed * self._elements(n, widths) / max(1.0, elements[n])

                add(node, (leaf for source in near for leaf in self._leaves(source)), rest)
        conversions, slowed = self._converted(integer)
        for node, as_float in conversions:
            grid = self.conversions[node]
            add(node, grid.leaves(), lambda widths, g=grid, f=as_float: self._conversion(g, widths, f))
        for node in slowed:
            grid = self.pools[node]
            add(node, grid.leaves(), lambda widths, g=grid: self._slowdown(g, widths))
        return Sum(leaves, terms)

    @property
    def _known(self) -> CostTable:
        assert self.table is not None, "costs are measured before they are asked"
        return self.table

    def _is_fused(self, node: fx.Node, integer: Collection[str]) -> bool:
        """Whether a sum, product or pool runs within the kernel of a float layer or norm beside it.

        It does in the float file, whose profile then has no time for it.
        """
        known = not self.times or node.name in self.times or node.name in integer
        if known or layer_of(node) or is_call(node, _ATTENTION):
            return False
        before = [near for near in node.all_input_nodes if len(near.users) == 1 and near.name not in integer]
        return bool(before) or any(is_call(user, aten.layer_norm.default) for user in node.users)

    def _scale(self, node: fx.Node, grid: _Grid) -> tuple[float, list[float]]:
        """By what a kernel within the file differs from the same alone; and the times of what runs beside it."""
        times = list(self.times.get(node.name, ()))
        alone = self._time(node, grid, {}, False)
        within = times.pop(0) if times else alone
        if is_call(node, _ATTENTION):
            within, times = within + sum(times), []
        return min(max(within / max(alone, 1e-3), _SCALES[0]), _SCALES[1]), times

    def _layer(
        self, node: fx.Node, grid: _Grid, widths: Mapping[Axis, int], as_integer: bool, rank: RankAxis | None
    ) -> float:
        """What a kernel takes; of a lower rank, what it would take with as many outputs, then with as many inputs."""
        low = None if rank is None else rank.lowered(widths)
        if rank is None or low is None:
            return self._time(node, grid, widths, as_integer)
        first, second = ({axis: low} for axis in (rank.outputs, rank.inputs))
        return sum(self._time(node, grid, widths, as_integer, instead) for instead in (first, second))

    def _time(
        self,
        node: fx.Node,
        grid: _Grid,
        widths: Mapping[Axis, int],
        as_integer: bool,
        instead: Mapping[Axis, int] | None = None,
    ) -> float:
        cost = grid.at(self._known, widths, instead)
        assert isinstance(cost, Cost)
        if is_call(node, _ATTENTION):
            return min(cost.floating, cost.integer)  # fused or not, whichever is faster
        return cost.integer if as_integer else cost.floating

    def _conversion(self, grid: _Grid, widths: Mapping[Axis, int], to_float: bool) -> float:
        cost = grid.at(self._known, widths)
        if isinstance(cost, NoCost):
            return 0.0
        return cost.integer if to_float else cost.floating

    def _slowdown(self, pool: _Grid, widths: Mapping[Axis, int]) -> float:
        """How much longer a pool takes on integers after a float layer."""
        cost = pool.at(self._known, widths)
        return 0.0 if isinstance(cost, NoCost) else max(0.0, cost.integer - cost.floating)

    def _near(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an operator reads and gives."""
        return [source for source in (node, *node.all_input_nodes) if one_row_of(source) is not None]

    def _elements(self, node: fx.Node, widths: Mapping[Axis, int]) -> float:
        """How many elements an operator reads and gives, of one row; of a layer without a kernel, of its weight."""
        uses = [use.read for use in weight_uses(node)]
        return float(sum(self._count(source, widths) for source in uses or self._near(node)))

    def _count(self, node: fx.Node, widths: Mapping[Axis, int]) -> float:
        shape, axes = one_row_of(node), self.inference.values.get(node)
        if shape is None:
            return 0.0
        if not isinstance(axes, tuple):
            return float(math.prod(shape))
        return float(
            math.prod(
                size_with(axis, widths) if isinstance(axis.find().size, int) else size
                for axis, size in zip(axes, shape, strict=True)
            )
        )

    def _leaves(self, node: fx.Node) -> Iterator[Axis]:
        axes = self.inference.values.get(node)
        for axis in axes if isinstance(axes, tuple) else ():
            yield from axis.leaves()

    def _converted(self, integer: Collection[str]) -> tuple[list[tuple[fx.Node, bool]], set[fx.Node]]:
        """Tensors that change between float and integers, and whether to float; and pools that this slows down."""
        held: dict[fx.Node, bool] = {}  # whether a value is integers
        wires = {n for n in self.graph.nodes if self.kernels.passes(n) or self.kernels.fuses(n)}
        for node in self.graph.nodes:
            if node.name in integer:
                held[node] = self.kernels.gives_integers(node)
            else:
                held[node] = node in wires and held.get(node.all_input_nodes[0], False)
        found: dict[tuple[fx.Node, bool], None] = {}
        slowed: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node not in self.conversions:
                continue
            as_integers = [user for user in node.users if user.name in integer]
            as_float = [user for user in node.users if user.name not in integer and user not in wires]
            if held[node] and as_float:
                found[node, True] = None
            if not held[node] and as_integers:
                # What a node reads is converted in its place, where the runtime moves conversions across it.
                while self.kernels.crosses(node) and all(n.name in integer or n in wires for n in node.users):
                    if node.all_input_nodes[0] not in self.conversions:
                        break
                    slowed |= {node} & self.pools.keys()
                    node = node.all_input_nodes[0]
                found[node, False] = None
        return list(found), slowed


def one_row_of(node: fx.Node) -> tuple[int, ...] | None:
    """Sizes of a node's tensor, one row of the batch; None where it gives no tensor."""
    return one_row(node) if hasattr(node.meta.get("val"), "shape") else None
