"""What a program costs after a removal, from its axes alone: nothing is cut and nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.inference import Inference
from lobo_fx.axes.removal import Removal, kept_size

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
    return sum(_positions(axes, removal) for axes in inference.findings.products)


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
