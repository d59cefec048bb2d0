"""Which operators run as integers: the cheapest way to cut a network into integer and float regions.

Every operator costs what its float or its integer kernel costs (`lobo_fx.costs`), and every tensor between an
integer and a float operator costs its conversion. The assignment with the least total is a minimum cut.

Source: the cut: Greig et al., "Exact Maximum A Posteriori Estimation for Binary Images", 1989.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx

from lobo_fx.costs import Cost, Kernel
from lobo_fx.operators import CONVOLUTIONS, arguments, aten, is_call

LEAST_GAIN = 0.1
"""An integer kernel must win by this much: it costs accuracy, and times are noisy."""
LINEAR = frozenset({aten.linear.default, aten.addmm.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_POINTWISE = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
ACTIVATIONS = {aten.sigmoid.default: "sigmoid", aten.leaky_relu.default: "leaky_relu"}
"""Softmax is not among them: its integer kernel is slower wherever measured, and rounds in a way of its own."""
POOLS = frozenset({aten.avg_pool2d.default})


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


def kernel_of(node: fx.Node) -> Kernel | None:
    """The kernel that an operator asks for; None for operators that have no integer form."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    given = arguments(node)
    if node.target in CONVOLUTIONS and not isinstance(given["padding"], str):
        names = ("stride", "padding", "dilation")
        rank = given["weight"].meta["val"].dim() - 2
        settings = tuple((name, tuple(given[name]) * (rank if len(given[name]) == 1 else 1)) for name in names)
        groups = ("groups", given["groups"])
        return Kernel("conv", (one_row(given["input"]), one_row(given["weight"])), (*settings, groups))
    if node.target is aten.linear.default:
        return Kernel("linear", (one_row(given["input"]), one_row(given["weight"])[::-1]))
    if node.target is aten.addmm.default:
        return Kernel("linear", (one_row(given["mat1"]), one_row(given["mat2"])))
    if node.target in _PRODUCTS:
        return Kernel("matmul", tuple(one_row(source) for source in node.all_input_nodes))
    if node.target in _POINTWISE and len(node.all_input_nodes) == 2:
        return Kernel(_POINTWISE[node.target], tuple(one_row(source) for source in node.all_input_nodes))
    if node.target is aten.cat.default:
        shapes = tuple(one_row(source) for source in given["tensors"])
        return Kernel("concat", shapes, (("axis", given["dim"] % len(shapes[0])),))
    if node.target in ACTIVATIONS:
        return Kernel(ACTIVATIONS[node.target], (one_row(given["self"]),))
    if node.target in POOLS:
        sizes = {"kernel_size": given["kernel_size"], "stride": given["stride"] or given["kernel_size"]}
        sizes["padding"] = given["padding"]
        return Kernel("average_pool", (one_row(given["self"]),), tuple((k, _pair(v)) for k, v in sizes.items()))
    if node.target is aten.scaled_dot_product_attention.default:
        return Kernel("attention", tuple(one_row(given[name]) for name in ("query", "key", "value")))
    if is_call(node, aten.adaptive_avg_pool2d.default) and list(given["output_size"]) == [1, 1]:
        return Kernel("global_average_pool", (one_row(given["self"]),))
    return None


def _pair(sizes: list[int]) -> tuple[int, ...]:
    return tuple(sizes) * 2 if len(sizes) == 1 else tuple(sizes)


def one_row(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor with one row in the batch; other free sizes as in the example."""
    shape = node.meta["val"].shape
    return tuple(
        int(n) if isinstance(n, int) else 1 if d == 0 else max(1, int(n.node.hint)) for d, n in enumerate(shape)
    )


def conversion(node: fx.Node) -> Kernel:
    """The conversion of a node's tensor; images change their layout too."""
    shape = one_row(node)
    return Kernel("convert", (shape if len(shape) == 4 else (math.prod(shape),),))


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


def kernels_for(graph: fx.Graph, choices: Iterable[fx.Node], passing: Callable[[fx.Node], bool]) -> list[Kernel]:
    """Every kernel and conversion that `cut` will ask the cost of."""
    chosen = list(choices)
    near = {*chosen, *(node for node in graph.nodes if passing(node))}
    found: dict[str, Kernel] = {}
    for node in graph.nodes:
        if node in chosen or is_call(node, aten.scaled_dot_product_attention.default):
            kernel = kernel_of(node)
            if kernel is not None:
                found[kernel.key] = kernel
        if isinstance(node.meta.get("val"), torch.Tensor) and (node in near or near.intersection(node.users)):
            found[conversion(node).key] = conversion(node)
    return list(found.values())
