"""Which operators run as integers: the cheapest way to cut a network into integer and float regions.

Every operator costs what its float or its integer kernel costs (`lobo_fx.measures.kernel_costs`), and every tensor
between an integer and a float operator costs its conversion. The assignment with the least total is a minimum cut.

Source: the cut: Greig et al., "Exact Maximum A Posteriori Estimation for Binary Images", 1989.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx

from lobo_fx.passes.quantization.integers.kernels import LINEAR, conversion, kernel_of
from lobo_fx.plugins.protocols import Cost, Kernel

LEAST_GAIN = 0.1
"""An integer kernel must win by this much: it costs accuracy, and times are noisy."""


@dataclasses.dataclass(frozen=True)
class Regions:
    """A decision, and what it is expected to cost.

    Attributes:
        integer: names of the nodes that run as integers.
        microseconds: expected sum over all nodes that have a choice, conversions included.
        floating: the same with everything left float.
    """

    integer: frozenset[str]
    microseconds: float
    floating: float


def cut(
    graph: fx.Graph,
    choices: Iterable[fx.Node],
    passing: Callable[[fx.Node], bool],
    cost: Callable[[Kernel], Cost],
    penalties: Mapping[str, float] | None = None,
) -> Regions:
    """Assigns integer or float to every node in `choices` at the least cost.

    Args:
        graph: shapes propagated.
        choices: nodes with an integer kernel; linear layers give float either way.
        passing: whether a node hands integers on at no cost (views, pools, fused activations).
        cost: of a kernel.
        penalties: microseconds that an integer operator must gain beside, by node name.
    """
    import networkx

    penalties = penalties or {}

    net = networkx.DiGraph()
    kernels = {node: kernel_of(node) for node in choices}
    wires = [node for node in graph.nodes if node not in kernels and passing(node)]
    floating = 0.0
    for node, kernel in kernels.items():
        assert kernel is not None
        found = cost(kernel)
        floating += found.floating
        net.add_edge("integer", node, capacity=found.floating)
        net.add_edge(node, "float", capacity=found.integer * (1 + LEAST_GAIN) + penalties.get(node.name, 0))
    net.add_nodes_from(["integer", "float", *wires])
    known = {*kernels, *wires}
    for node in graph.nodes:
        value = node.meta.get("val")
        readers = [user for user in node.users if user in known or node in known]
        if not readers or not isinstance(value, torch.Tensor) or node.op == "get_attr":
            continue
        source = node if node in known and node.target not in LINEAR else "float"
        found = cost(conversion(node))
        to_float, to_integer = (node, "to float"), (node, "to integer")
        net.add_edge(source, to_float, capacity=found.integer)
        net.add_edge(to_integer, source, capacity=found.floating)
        for reader in readers:
            end = reader if reader in known else "float"
            net.add_edge(to_float, end)  # without a capacity: never cut
            net.add_edge(end, to_integer)
    total, (inside, _) = networkx.minimum_cut(net, "integer", "float")
    return Regions(frozenset(n.name for n in kernels if n in inside), float(total), floating)
