"""What a program costs after a removal, from its axes alone: nothing is cut and nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.removal import Removal, kept_size
from lobo_fx.graph.operators import CONVOLUTIONS, RECURRENT, TRANSPOSED_CONVOLUTIONS, arguments, aten

__all__ = ["COSTS", "file_size_after", "macs_after", "parameters_after"]


def parameters_after(inference: Inference, removal: Removal) -> int:
    """Number of parameters that stay; tied ones once."""
    count = 0
    for parameter in inference.program.module.parameters():
        axes = inference.stored.get(id(parameter))
        count += parameter.numel() if axes is None else _positions(axes, removal)
    return count


def macs_after(inference: Inference, removal: Removal) -> int:
    """Multiply-accumulates of one row of the batch that stay: convolutions, matrix products, attention."""
    return sum(_macs(inference, node, removal) for node in inference.program.graph.nodes)


def file_size_after(inference: Inference, removal: Removal) -> int:
    """Bytes of the parameters and buffers that the graph reads: what a file of it holds, but for some kilobytes."""
    stored = {id(tensor): tensor for tensor in map(inference.program.parameter, _reads(inference))}
    count = 0
    for tensor in stored.values():
        axes = inference.stored.get(id(tensor))
        count += (tensor.numel() if axes is None else _positions(axes, removal)) * tensor.element_size()
    return count


COSTS: dict[str, Callable[[Inference, Removal], int]] = {
    "macs": macs_after,
    "parameters": parameters_after,
    "file_size": file_size_after,
}


def _reads(inference: Inference) -> list[fx.Node]:
    """The nodes that read a tensor."""
    return [n for n in inference.program.graph.find_nodes(op="get_attr") if isinstance(n.meta.get("val"), torch.Tensor)]


def _positions(axes: Any, removal: Removal) -> int:
    """Product of sizes; a free size, which is the batch, counts as one row."""
    count = 1
    for axis in axes:
        size = kept_size(axis, removal)
        count *= size if isinstance(size, int) else _one_row(size)
    return count


def _one_row(size: Any) -> int:
    return int(size.subs(dict.fromkeys(size.free_symbols, 1)))


def _macs(inference: Inference, node: fx.Node, removal: Removal) -> int:
    if node.op == "call_function" and node.target in RECURRENT:
        given = arguments(node)
        weights = [inference.of(read) for read in given["params"] if read.meta["val"].dim() == 2]
        steps = _positions(inference.of(given["input"])[:-1], removal)
        return steps * sum(_positions(axes, removal) for axes in weights)
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return 0
    if node.target is aten.scaled_dot_product_attention.default:
        given = arguments(node)
        query, key, value = (inference.of(given[name]) for name in ("query", "key", "value"))
        scores = _positions((*query[:-1], key[-2]), removal)
        return scores * int(kept_size(query[-1], removal) + kept_size(value[-1], removal))
    if node.target in TRANSPOSED_CONVOLUTIONS:  # each input position is multiplied with the kernel
        given = arguments(node)
        return _positions((*inference.of(given["input"]), *inference.of(given["weight"])[1:]), removal)
    summed = _summed(inference, node)
    return _positions((*inference.of(node), *summed), removal) if summed else 0


def _summed(inference: Inference, node: fx.Node) -> tuple[Axis, ...]:
    """The axes that an operator sums products over."""
    given = arguments(node)
    if node.target in CONVOLUTIONS:
        return inference.of(given["weight"])[1:]
    if node.target is aten.linear.default:
        return inference.of(given["input"])[-1:]
    if node.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return inference.of(given["self"])[-1:]
    if node.target is aten.addmm.default:
        return inference.of(given["mat1"])[-1:]
    if node.target is aten.baddbmm.default:
        return inference.of(given["batch1"])[-1:]
    if node.target is aten.einsum.default:
        return tuple(axis for summing, axis, _ in inference.findings.sums if summing is node)
    return ()
