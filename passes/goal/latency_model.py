"""Latency of a file at any widths: of kernels by measurements on a grid, of all else by the original's profile.

A kernel's time is scaled by what the same kernel takes within the original's file. The time of an operator without a
kernel in the table is proportional to its elements.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.removal import size_with
from lobo_fx.graph.layers import layer_of, weight_uses
from lobo_fx.graph.operators import aten, is_call
from lobo_fx.graph.provenance import module_name
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.goal.grids import Grid, PricedGrid
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
from lobo_fx.plugins.kernels import Cost, Kernel

__all__ = ["LatencyModel"]

_ATTENTION = aten.scaled_dot_product_attention.default
_CALL = 1.5
"""Microseconds of a node that has next to nothing to do."""
_SCALES = (0.5, 2.0)
"""Least and largest factor by which a kernel within the file may differ from the same kernel alone."""


class LatencyModel:
    """Microseconds of a program's file, float and with some operators as integers, at any widths.

    Args:
        inference: axes of the program.
        kernels: integer kernels of the runtime.
        times: the profile of the program's file, as `ProfilesNodes.node_times` gives it.
    """

    def __init__(self, inference: Inference, kernels: KernelTable, times: Mapping[str, Sequence[float]]) -> None:
        self.inference, self.kernels, self.times = inference, kernels, times
        self.graph = inference.program.graph
        self.calls = [node for node in self.graph.nodes if node.op == "call_function"]
        self.grids = _grids(self.calls, inference, self._describe)
        self.conversion_grids = _grids(filter(is_converted, self.graph.nodes), inference, conversion)
        self.pool_grids = _grids(self.calls, inference, kernels.crossing)
        self.layers: dict[fx.Node, PricedGrid] = {}
        self.conversions: dict[fx.Node, PricedGrid] = {}
        self.pools: dict[fx.Node, PricedGrid] = {}

    def _describe(self, node: fx.Node, sizes: Sizes) -> object:
        if is_call(node, _ATTENTION):
            return attention_kernel(node, sizes)
        line = self.kernels.line(node)
        return None if line is None or line.refuse(node) is not None else line.describe(node, sizes)

    @property
    def priced(self) -> list[Kernel]:
        """All kernels whose costs are asked."""
        grids = [*self.grids.values(), *self.conversion_grids.values(), *self.pool_grids.values()]
        return list(dict.fromkeys(kernel for grid in grids for kernel in grid.all_kernels()))

    def price(self, table: CostTable) -> None:
        """Takes costs from a table, which must hold what is `priced`."""
        self.layers, self.conversions, self.pools = (
            {node: priced for node, grid in grids.items() if (priced := grid.price(table)) is not None}
            for grids in (self.grids, self.conversion_grids, self.pool_grids)
        )

    def adopt(self) -> None:
        """Turns times of this machine into those of the table's: kernels take its times, the rest is in proportion."""
        alone = {node: self._time(node, {}, False) for node in self.layers if node.name in self.times}
        if not alone:
            return
        ratio = statistics.median(time / max(self.times[node.name][0], 1e-3) for node, time in alone.items())
        times = {name: [ratio * time for time in found] for name, found in self.times.items()}
        self.times = times | {node.name: [time, *times[node.name][1:]] for node, time in alone.items()}

    def large(self, share: float) -> set[str]:
        """Names of the nodes whose kernels take this share of the whole time, or more."""
        least = share * self.sum(())({})
        times = {node: self._scale(node)[0] * self._time(node, {}, False) for node in self.layers}
        return {node.name for node, time in times.items() if time >= least}

    def varies(self, node: fx.Node, axes: Iterable[Axis]) -> bool:
        """Whether a node's kernel was measured at several sizes of these axes."""
        return node in self.layers and set(axes) <= set(self.grids[node].axes)

    def sum(self, leaves: Iterable[Axis], integer: Collection[str] = (), ranks: Iterable[RankAxis] = ()) -> Sum:
        """The latency as terms over widths, with these nodes as integers, and over the ranks of some layers.

        Costs must have been given by `price`; operators without costs take their time in the profile.
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
            near, as_integer = self._near(node), node.name in integer
            if node in self.layers and not self._is_fused(node, integer):
                scale, times = self._scale(node)
                rank = ranked.get(node)
                add(
                    node,
                    (*self.grids[node].leaves(), *([] if rank is None else [rank.leaf])),
                    lambda widths, n=node, s=scale, i=as_integer, r=rank: s * self._layer(n, widths, i, r),
                )
            if times or elements[node] * spread:
                whole, calls = sum(times), _CALL * len(times)
                weighed = max(0.0, whole - calls) + elements[node] * spread

                def rest(widths: Any, n: fx.Node = node, calls: float = calls, weighed: float = weighed) -> float:
                    return calls + weighed * self._elements(n, widths) / max(1.0, elements[n])

                add(node, (leaf for source in near for leaf in self._leaves(source)), rest)
        conversions, slowed = self._converted(integer)
        for node, to_float in conversions:
            if node in self.conversions:
                add(
                    node,
                    self.conversion_grids[node].leaves(),
                    lambda widths, g=self.conversions[node], f=to_float: _conversion(g.at(widths), f),
                )
        for node in (node for node in self.calls if node in slowed and node in self.pools):
            add(node, self.pool_grids[node].leaves(), lambda widths, g=self.pools[node]: _slowdown(g.at(widths)))
        return Sum(leaves, terms)

    def _is_fused(self, node: fx.Node, integer: Collection[str]) -> bool:
        """Whether a sum, product or pool runs within the kernel of a float layer or norm beside it.

        In the float file it does, if that file's profile has no time for it.
        """
        known = not self.times or node.name in self.times or node.name in integer
        if known or layer_of(node) or is_call(node, _ATTENTION):
            return False
        before = [near for near in node.all_input_nodes if len(near.users) == 1 and near.name not in integer]
        return bool(before) or any(is_call(user, aten.layer_norm.default) for user in node.users)

    def _scale(self, node: fx.Node) -> tuple[float, list[float]]:
        """A kernel's time within the file over that of the kernel alone; and the times of the node's other kernels."""
        times = list(self.times.get(node.name, ()))
        alone = self._time(node, {}, False)
        within = times.pop(0) if times else alone
        if is_call(node, _ATTENTION):
            within, times = within + sum(times), []
        return min(max(within / max(alone, 1e-3), _SCALES[0]), _SCALES[1]), times

    def _layer(self, node: fx.Node, widths: Mapping[Axis, int], as_integer: bool, rank: RankAxis | None) -> float:
        """The time of a layer; at a lower rank, of two kernels: one with as many outputs, one with as many inputs."""
        low = None if rank is None else rank.lowered(widths)
        if rank is None or low is None:
            return self._time(node, widths, as_integer)
        return sum(self._time(node, widths, as_integer, {axis: low}) for axis in (rank.outputs, rank.inputs))

    def _time(
        self, node: fx.Node, widths: Mapping[Axis, int], as_integer: bool, instead: Mapping[Axis, int] | None = None
    ) -> float:
        cost = self.layers[node].at(widths, instead)
        if is_call(node, _ATTENTION):
            return min(cost.floating, cost.integer)  # fused or not, whichever is faster
        return cost.integer if as_integer else cost.floating

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
            if node not in self.conversion_grids:
                continue
            as_integers = [user for user in node.users if user.name in integer]
            as_float = [user for user in node.users if user.name not in integer and user not in wires]
            if held[node] and as_float:
                found[node, True] = None
            if not held[node] and as_integers:
                # Where the runtime moves conversions across a node, the node's input is converted instead.
                while self.kernels.crosses(node) and all(n.name in integer or n in wires for n in node.users):
                    if node.all_input_nodes[0] not in self.conversion_grids:
                        break
                    slowed.add(node)
                    node = node.all_input_nodes[0]
                found[node, False] = None
        return list(found), slowed


def _grids(
    nodes: Iterable[fx.Node], inference: Inference, describe: Callable[[fx.Node, Sizes], object]
) -> dict[fx.Node, Grid]:
    """The kernel at several sizes of each node that has one, by node."""
    found = {node: Grid.of(inference, functools.partial(describe, node)) for node in nodes}
    return {node: grid for node, grid in found.items() if grid is not None}


def _conversion(cost: Cost, to_float: bool) -> float:
    return cost.integer if to_float else cost.floating


def _slowdown(pool: Cost) -> float:
    """How much longer a pool takes on integers after a float layer."""
    return max(0.0, pool.integer - pool.floating)


def one_row_of(node: fx.Node) -> tuple[int, ...] | None:
    """Sizes of a node's tensor, one row of the batch; None where it gives no tensor."""
    return one_row(node) if hasattr(node.meta.get("val"), "shape") else None
