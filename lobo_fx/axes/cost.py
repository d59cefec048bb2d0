"""What a program costs after a removal, from its axes alone: nothing is cut and nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from lobo_fx.axes.inference import Inference
from lobo_fx.axes.removal import Removal, kept_size
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import dimension_names, free_symbols

__all__ = ["COSTS", "file_size_after", "macs_after", "one_row_sizes", "parameters_after"]


def parameters_after(inference: Inference, removal: Removal) -> int:
    """Number of parameters that stay; tied ones once."""
    count = 0
    for parameter in inference.program.module.parameters():
        axes = inference.stored.get(id(parameter))
        count += parameter.numel() if axes is None else _positions(axes, removal)
    return count


def macs_after(inference: Inference, removal: Removal) -> int:
    """Multiply-accumulates of one row of the batch that stay: convolutions, matrix products, attention.

    Lengths that are free count as in the example inputs.
    """
    sizes = one_row_sizes(inference.program)
    return sum(_positions(axes, removal, sizes) for axes in inference.findings.products)


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


def _positions(axes: Any, removal: Removal, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
    """Product of sizes; `sizes` says what free ones count as."""
    count = 1
    for axis in axes:
        size = kept_size(axis, removal)
        count *= size if isinstance(size, int) else int(size.subs(sizes or {}))
    return count


def one_row_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """What the free sizes are in the example inputs, but for the batch, of which one row counts."""
    names = dimension_names(program.graph, program.module.program_facts.free_dimensions)
    batch = program.signature.batch
    return {
        symbol: 1 if str(names[symbol]) == batch else int(size.node.shape_env.backed_var_to_val[symbol])
        for symbol, size in free_symbols(program.graph).items()
    }
