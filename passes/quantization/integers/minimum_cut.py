"""Which operators run as integers: the cheapest way to divide a network into integer and float regions.

Every operator costs what its float or its integer kernel costs (`lobo_fx.measures.kernel_costs`). Every tensor between
an integer and a float operator costs its conversion, and the slowdown of operators that the conversion moves across.
The assignment with the least total is a minimum cut.

Source: the cut: Greig et al., "Exact Maximum A Posteriori Estimation for Binary Images", 1989.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import fx

from lobo_fx.passes.quantization.integers.kernels import KernelTable, conversion
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

__all__ = ["LEAST_GAIN", "Regions", "cheapest_regions", "conversions_around", "is_converted"]

LEAST_GAIN = 0.1
"""An integer kernel must win by this much: it costs accuracy, and times are noisy."""


@dataclasses.dataclass(frozen=True)
class Regions:
    """A decision, and what it is expected to cost.

    Attributes:
        integer: names of the nodes that run as integers.
        microseconds: expected sum over all nodes that have a choice, with conversions, `LEAST_GAIN` and penalties.
        floating: the sum with everything left float.
    """

    integer: frozenset[str]
    microseconds: float
    floating: float


def cheapest_regions(
    graph: fx.Graph,
    choices: Mapping[fx.Node, Cost],
    table: KernelTable,
    cost: Callable[[Kernel], Cost | NoCost],
    penalties: Mapping[str, float],
) -> Regions:
    """Assigns integer or float to every node in `choices` at the least cost.

    A network of pipes stands for the graph: from the source "integer" through the nodes to the sink "float". Cutting
    the pipe from the source to a node makes it float and costs its float kernel, cutting that to the sink makes it
    integer; a tensor's two pipes, one for each direction of conversion, are cut where its two ends differ.

    Args:
        graph: shapes propagated.
        choices: nodes with an integer kernel, and what they cost both ways.
        table: tells which of them give float, and which others hand integers on (views, pools, fused activations).
        cost: gives the cost of conversions, and of pools that these are moved across; a tensor whose conversion has no
            known cost is never converted.
        penalties: further microseconds that an integer operator must gain, by node name.
    """
    import networkx

    net = networkx.DiGraph()
    wires = [node for node in graph.nodes if node not in choices and (table.passes(node) or table.fuses(node))]
    floating = sum(found.floating for found in choices.values())
    for node, found in choices.items():
        net.add_edge("integer", node, capacity=found.floating)  # cut where the node is float
        net.add_edge(node, "float", capacity=found.integer * (1 + LEAST_GAIN) + penalties.get(node.name, 0))
    net.add_nodes_from(["integer", "float", *wires])
    known = {*choices, *wires}
    for node in graph.nodes:
        readers = [user for user in node.users if user in known or node in known]
        if not readers or not is_converted(node):
            continue
        source = node if node in known and table.gives_integers(node) else "float"
        found = _conversion_cost(node, cost)
        # One pipe each way, shared by all readers: a tensor is converted once, however many read it.
        to_float, to_integer = (node, "to float"), (node, "to integer")
        net.add_edge(source, to_float, capacity=found.integer)
        net.add_edge(to_integer, source, capacity=found.floating)
        for reader in readers:
            end = reader if reader in known else "float"
            net.add_edge(to_float, end)  # without a capacity: never cut
            net.add_edge(end, to_integer)
    for wire in wires:
        # The runtime does this only if all readers are integers, which edges can't say: the cost may be too high here.
        if not table.crosses(wire) or not known.issuperset(wire.users):
            continue
        for reader in wire.users:
            net.add_edge(reader, wire)  # an integer reader makes the wire integer too, and its input is converted
        source = _giver(wire, table)
        before = source if source in choices and table.gives_integers(source) else "float"
        net.add_edge(wire, before, capacity=_slowdown(wire, table, cost))
    total, (inside, _) = networkx.minimum_cut(net, "integer", "float")
    return Regions(frozenset(node.name for node in choices if node in inside), float(total), floating)


def conversions_around(
    node: fx.Node, integer: Collection[str], table: KernelTable, cost: Callable[[Kernel], Cost | NoCost]
) -> float:
    """Microseconds of conversions if an operator that stays float ran as integers, with all others as they are.

    Args:
        node: the operator.
        integer: names of the nodes that run as integers.
        table: tells which operators give float, and which hand integers on.
        cost: gives the cost of a conversion.
    """

    def hands_on(other: fx.Node) -> bool:
        return other.name not in integer and (table.passes(other) or table.fuses(other))

    def gives_float(source: fx.Node) -> bool:
        while hands_on(source):
            source = source.all_input_nodes[0]
        return source.name not in integer or not table.gives_integers(source)

    def read_as_float(source: fx.Node) -> bool:
        return any(read_as_float(user) if hands_on(user) else user.name not in integer for user in source.users)

    def converted(source: fx.Node) -> float:
        if table.crosses(source):
            return _slowdown(source, table, cost) + converted(source.all_input_nodes[0])
        return _conversion_cost(source, cost).floating

    read = [source for source in node.all_input_nodes if is_converted(source) and gives_float(source)]
    found = sum(map(converted, read))
    given = table.gives_integers(node) and is_converted(node) and read_as_float(node)
    return found + (_conversion_cost(node, cost).integer if given else 0.0)


def _giver(node: fx.Node, table: KernelTable) -> fx.Node:
    """The operator that computes the values which a node gives or hands on."""
    while table.passes(node) or table.fuses(node):
        node = node.all_input_nodes[0]
    return node


def _slowdown(node: fx.Node, table: KernelTable, cost: Callable[[Kernel], Cost | NoCost]) -> float:
    """Microseconds that a pool takes longer on integers after a float operator."""
    kernel = table.crossing(node)
    found = NoCost("") if kernel is None else cost(kernel)
    return max(0.0, found.integer - found.floating) if isinstance(found, Cost) else 0.0


def is_converted(node: fx.Node) -> bool:
    """Whether a node's value is a tensor that may have to be converted; weights are stored as they are read."""
    return node.op != "get_attr" and isinstance(node.meta.get("val"), torch.Tensor)


def _conversion_cost(node: fx.Node, cost: Callable[[Kernel], Cost | NoCost]) -> Cost:
    kernel = conversion(node)
    found = NoCost("") if kernel is None else cost(kernel)
    return found if isinstance(found, Cost) else Cost(math.inf, math.inf)
