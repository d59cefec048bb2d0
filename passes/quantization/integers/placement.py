"""Where a network runs as integers: decided once, then read by everything that carries it out.

`Choices.find` finds the operators that could run as integers, and their kernels. `Choices.place` decides which do, by
the costs of the kernels or, without costs, wherever there is a kernel. The decision is a `Placement`: names and numbers
that can be printed and compared; nothing changes it afterwards.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Collection, Iterable, Mapping

from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.operators import aten
from lobo_fx.graph.provenance import module_name
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes.quantization.integers.kernels import TRACED, KernelTable, attention_kernel, conversion
from lobo_fx.passes.quantization.integers.minimum_cut import cheapest_regions, conversions_around, is_converted
from lobo_fx.passes.quantization.integers.targets import Target
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["PERCENTILE", "Choices", "Observing", "Placement", "Request", "attention_kernels"]

PERCENTILE = 99.99
"""Share of the values that the observer `percentile` keeps at either end, if nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class Observing:
    """How the range of an activation is chosen from calibration data.

    Attributes:
        observer: its name, as in `lobo_fx.passes.quantization.integers.observers`.
        percentile: setting of the observer `percentile`.
    """

    observer: str
    percentile: float = PERCENTILE

    def __str__(self) -> str:
        return f"{self.observer} {self.percentile:g}" if self.observer == "percentile" else self.observer


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        table: the integer kernels of the runtime.
        target: the CPU's integers.
        observing: how all operators are observed, but those that are overridden.
        overrides: by pattern of module names, another way of observing, or None for operators that stay float; of
            several patterns that match, the last.
    """

    table: KernelTable
    target: Target
    observing: Observing
    overrides: Mapping[str, Observing | None] = dataclasses.field(default_factory=dict)

    def of(self, node: fx.Node) -> Observing | None:
        """How an operator's values are observed; None where it is to stay float."""
        name = module_name(node)
        matched = [choice for pattern, choice in self.overrides.items() if fnmatch.fnmatchcase(name, pattern)]
        return matched[-1] if matched else self.observing

    def unmatched(self, graph: fx.Graph) -> list[str]:
        """Patterns that match no operator."""
        names = {module_name(node) for node in graph.nodes if node.op == "call_function"}
        return [pattern for pattern in self.overrides if not fnmatch.filter(names, pattern)]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which operators run as integers, and why the others don't.

    Attributes:
        runtime: name of the runtime whose kernels these are.
        target: the CPU's integers.
        integer: names of the nodes that run as integers, each with how the ranges around it are observed.
        floating: by node name, the reason why an operator that could run as integers, or has weights, stays float.
        overridden: names of all nodes that overrides leave float, whose weights are not touched.
        penalties: further microseconds that an operator had to gain, by node name.
        microseconds: expected sum over all operators that had a choice, with conversions, the margin that integers must
            win by, and penalties; None without costs.
        in_float: the sum with everything left float.
    """

    runtime: str
    target: Target
    integer: Mapping[str, Observing]
    floating: Mapping[str, str]
    overridden: frozenset[str] = frozenset()
    penalties: Mapping[str, float] = dataclasses.field(default_factory=dict)
    microseconds: float | None = None
    in_float: float | None = None

    def __str__(self) -> str:
        head = f"{len(self.integer)} operators run as integers in {self.runtime}, {len(self.floating)} stay float"
        if self.microseconds is not None:
            head += f"; {self.microseconds:.0f} µs expected, {self.in_float:.0f} µs all in float"
        lines = [f"{name}: integers, {observing}" for name, observing in self.integer.items()]
        lines += [f"{name}: float, {reason}" for name, reason in self.floating.items()]
        return "\n".join([head, *lines])

    def note(self, graph: fx.Graph, context: Context) -> None:
        """Puts the reasons for what stays float into the report."""
        nodes = {node.name: node for node in graph.nodes}
        for name, reason in self.floating.items():
            context.note(f"stays float: {reason}", nodes[name])


@dataclasses.dataclass(frozen=True)
class Choices:
    """The operators of a graph that could run as integers; `place` decides which do.

    Attributes:
        graph: shapes propagated.
        request: what was asked for.
        kernels: by node name, the kernel that an operator asks for, or why its cost can't be described.
        floating: by node name, why another operator that has weights, or was overridden, stays float.
        overridden: names of all nodes that overrides leave float.
        conversions: kernels that convert tensors, and kernels of operators that conversions are moved across.
        costs: costs of all these kernels; None to run integers wherever there is a kernel.
    """

    graph: fx.Graph
    request: Request
    kernels: Mapping[str, Kernel | str]
    floating: Mapping[str, str]
    overridden: frozenset[str]
    conversions: frozenset[Kernel]
    costs: CostTable | None = None

    @classmethod
    def find(cls, graph: fx.Graph, request: Request) -> Choices:
        """Looks every operator up in the runtime's table of integer kernels."""
        table, calls = request.table, [node for node in graph.nodes if node.op == "call_function"]
        overridden = frozenset(node.name for node in calls if request.of(node) is None)
        kernels: dict[str, Kernel | str] = {}
        floating: dict[str, str] = {}
        near: set[fx.Node] = set()  # whose values may have to be converted
        for node in calls:
            refusal, line = table.refusal(node), table.line(node)
            if refusal is None and node.name in overridden:
                refusal = "overrides say so"
            if refusal is None and line is not None:
                kernels[node.name] = line.describe(node, TRACED)
            elif refusal:
                floating[node.name] = refusal
            if node.name in kernels or table.passes(node) or table.fuses(node):
                near |= {node, *node.all_input_nodes}
        found = (conversion(node) for node in near if is_converted(node))
        crossed = (table.crossing(node) for node in calls)
        conversions = frozenset(kernel for kernel in (*found, *crossed) if kernel is not None)
        return cls(graph, request, kernels, floating, overridden, conversions)

    def without(self, reasons: Mapping[str, str]) -> Choices:
        """The same choices with some operators left float, for the reasons given by name of the node."""
        kernels = {name: kernel for name, kernel in self.kernels.items() if name not in reasons}
        return dataclasses.replace(self, kernels=kernels, floating={**self.floating, **reasons})

    @property
    def priced(self) -> list[Kernel]:
        """All kernels whose costs decide."""
        named = [kernel for kernel in self.kernels.values() if isinstance(kernel, Kernel)]
        return [*named, *sorted(self.conversions, key=lambda kernel: kernel.key)]

    def place(self, penalties: Mapping[str, float] | None = None, among: Collection[str] | None = None) -> Placement:
        """Decides where integers run: where that is cheapest, or without costs wherever there is a kernel.

        Args:
            penalties: further microseconds that an integer operator must gain, by node name.
            among: names of the nodes that may run as integers; None for all.
        """
        able = [node for node in self.graph.nodes if node.name in self.kernels]
        may = [node for node in able if among is None or node.name in among]
        floating = {**self.floating, **{node.name: "it was left out" for node in able if node not in may}}
        if self.costs is None:
            return self._placement(*self._between_integers(may, floating))
        return self._cheapest(self.costs, may, floating, penalties or {})

    def exactly(self, names: Collection[str]) -> Placement:
        """Runs operators of these names as integers, whatever that costs; those without a kernel stay float."""
        able = [node for node in self.graph.nodes if node.name in self.kernels]
        floating = {node.name: "the plan leaves it float" for node in able if node.name not in names}
        return self._placement([node for node in able if node.name in names], {**self.floating, **floating})

    def _cheapest(
        self, table: CostTable, may: Iterable[fx.Node], floating: dict[str, str], penalties: Mapping[str, float]
    ) -> Placement:
        costs: dict[fx.Node, Cost] = {}
        for node in may:
            kernel = self.kernels[node.name]
            found = NoCost(kernel) if isinstance(kernel, str) else table.find(kernel)
            if isinstance(found, Cost):
                costs[node] = found
            else:
                floating[node.name] = f"what it costs is not known: {found.reason}"
        regions = cheapest_regions(self.graph, costs, self.request.table, table.find, penalties)
        for node, cost in costs.items():
            if node.name not in regions.integer:
                around = conversions_around(node, regions.integer, self.request.table, table.find)
                told = (
                    f"conversions of {around:.0f} µs" if math.isfinite(around) else "conversions that can't be priced"
                )
                floating[node.name] = f"{cost.floating:.0f} µs, as integers {cost.integer:.0f} µs beside {told}"
        placed = self._placement([node for node in costs if node.name in regions.integer], floating)
        return dataclasses.replace(
            placed, penalties=dict(penalties), microseconds=round(regions.microseconds, 6), in_float=regions.floating
        )

    def _between_integers(
        self, may: Collection[fx.Node], floating: dict[str, str]
    ) -> tuple[list[fx.Node], dict[str, str]]:
        """Runs layers as integers wherever they stand, and other operators if all their inputs are quantized."""
        table, allowed = self.request.table, set(may)
        integer: list[fx.Node] = []
        quantized: set[fx.Node] = set()  # whose values are integers
        for node in self.graph.nodes:
            if table.passes(node) and node.args[0] in quantized:
                quantized.add(node)
            line = table.line(node)
            if line is None or node not in allowed:
                continue
            if line.starts or quantized.issuperset(node.all_input_nodes):
                integer.append(node)
                quantized |= {table.end(node)} if table.gives_integers(node) else set()
            else:
                floating[node.name] = "what it reads is float"
        return integer, floating

    def _placement(self, integer: Iterable[fx.Node], floating: Mapping[str, str]) -> Placement:
        observed = {node.name: choice for node in integer if (choice := self.request.of(node)) is not None}
        return Placement(self.request.table.runtime, self.request.target, observed, floating, self.overridden)


def attention_kernels(graph: fx.Graph) -> dict[fx.Node, Kernel | str]:
    """The kernel of every attention, or why it has none."""
    found = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    return {node: attention_kernel(node) for node in found}
