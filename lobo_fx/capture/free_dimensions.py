"""Names and bounds of free dimensions: read off an exported program, written into it, and given to `torch.export`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from lobo_fx.graph.shapes import FreeDimension, free_symbols

__all__ = ["as_dim", "read_free_dimensions", "write_free_dimensions"]

_KEY = "lobo_fx.free_dimensions"


def read_free_dimensions(exported: ExportedProgram, graph: fx.Graph) -> tuple[FreeDimension, ...]:
    """What is known of the free dimensions of a program's inputs, in the order of `free_symbols`.

    Args:
        exported: the program; of one that came from a file torch knows the bounds, we wrote the names.
        graph: its graph, as traced.
    """
    symbols = free_symbols(graph)
    written = exported.graph_module.meta.get("custom", {}).get(_KEY, [])
    names = (
        [str(name) for name in written] if len(written) == len(symbols) else map(_given_name, symbols, symbols.values())
    )
    return tuple(
        _bounded(name if name.isidentifier() else "", exported.range_constraints.get(symbol))
        for name, symbol in zip(names, symbols, strict=True)
    )


def write_free_dimensions(exported: ExportedProgram, dimensions: tuple[FreeDimension, ...]) -> None:
    """Has the names saved with the program, of which torch saves the bounds alone."""
    exported.graph_module.meta.setdefault("custom", {})[_KEY] = [dimension.name for dimension in dimensions]


def as_dim(size: sympy.Expr, dims: dict[sympy.Symbol, Any]) -> Any:
    """A size as `torch.export` takes it: a dimension, or a multiple of one; what it can't say, it is to find out."""
    if len(size.free_symbols) != 1 or not size.is_polynomial() or sympy.degree(size) != 1:
        return Dim.AUTO
    (symbol,) = size.free_symbols
    factor, offset = int(size.coeff(symbol, 1)), int(size.coeff(symbol, 0))
    dim = dims[symbol] if factor == 1 else factor * dims[symbol]
    return dim + offset if offset else dim


def _given_name(symbol: sympy.Symbol, size: torch.SymInt) -> str:
    """The name of the `Dim` that the user gave; a `Dim` that only multiples of it are used of is a source itself."""
    environment = size.node.shape_env
    sources = [source.name for source in environment.var_to_sources.get(symbol, [])]
    names = [environment.source_name_to_debug_name.get(source, source) for source in sources]
    return next((name for name in names if name.isidentifier()), "")


def _bounded(name: str, bounds: Any) -> FreeDimension:
    """The bounds that hold in the program; a lower one of 0, or of 2 for a size without a name, is torch's own."""
    if bounds is None:
        return FreeDimension(name)
    lowest, highest = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    return FreeDimension(name, lowest if lowest and (name or lowest > 2) else None, highest)
