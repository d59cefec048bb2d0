"""What a program costs after a removal, from its axes alone: nothing is cut and nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.removal import Removal, size_with
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import dimension_names, free_symbols

__all__ = [
    "COSTS",
    "count_positions",
    "file_size_after",
    "macs_after",
    "one_row_sizes",
    "parameters_after",
    "stored_tensors",
]


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
    """Bytes of the parameters and buffers that the graph reads: the size of its file, up to some kilobytes."""
    count = 0
    for tensor in stored_tensors(inference):
        axes = inference.stored.get(id(tensor))
        count += (tensor.numel() if axes is None else _positions(axes, removal)) * tensor.element_size()
    return count


COSTS: dict[str, Callable[[Inference, Removal], int]] = {
    "macs": macs_after,
    "parameters": parameters_after,
    "file_size": file_size_after,
}


def stored_tensors(inference: Inference) -> list[torch.Tensor]:
    """The tensors that the graph reads, tied ones once."""
    reads = inference.program.graph.find_nodes(op="get_attr")
    found = (inference.program.parameter(node) for node in reads if isinstance(node.meta.get("val"), torch.Tensor))
    return list({id(tensor): tensor for tensor in found}.values())


def _positions(axes: Any, removal: Removal, sizes: Mapping[sympy.Symbol, int] | None = None) -> int:
    """Product of the sizes that a removal leaves."""
    return count_positions(axes, {leaf: int(mask.sum()) for leaf, mask in removal.items()}, sizes)


def count_positions(
    axes: Iterable[Axis], widths: Mapping[Axis, int], sizes: Mapping[sympy.Symbol, int] | None = None
) -> int:
    """Product of the sizes of axes whose leaves have these widths; `sizes` says what free ones count as."""
    count = 1
    for axis in axes:
        size = size_with(axis, widths)
        count *= size if isinstance(size, int) else int(size.subs(sizes or {}))
    return count


def one_row_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The free sizes in the example inputs, with one row as the batch."""
    names = dimension_names(program.graph, program.module.program_facts.free_dimensions)
    batch = program.signature.batch
    return {
        symbol: 1 if str(names[symbol]) == batch else int(size.node.shape_env.backed_var_to_val[symbol])
        for symbol, size in free_symbols(program.graph).items()
    }
