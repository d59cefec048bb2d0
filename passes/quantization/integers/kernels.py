"""Which kernel of the runtime an operator asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import fx

from lobo_fx.graph.operators import CONVOLUTIONS, arguments, aten, is_call
from lobo_fx.plugins.protocols import Kernel

LINEAR = frozenset({aten.linear.default, aten.addmm.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_POINTWISE = {aten.add.Tensor: "add", aten.mul.Tensor: "mul"}
ACTIVATIONS = {aten.sigmoid.default: "sigmoid", aten.leaky_relu.default: "leaky_relu"}
"""Softmax is not among them: its integer kernel is slower wherever measured, and rounds in a way of its own."""

POOLS = frozenset({aten.avg_pool2d.default})


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
