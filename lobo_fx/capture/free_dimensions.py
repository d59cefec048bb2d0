"""Names and bounds of free dimensions: reads them from and writes them to exported programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from lobo_fx.graph.shapes import FreeDimension, free_symbols

__all__ = ["read_free_dimensions", "write_free_dimensions"]

_KEY, _STEPS = "lobo_fx.free_dimensions", "lobo_fx.free_steps"
_LONGEST_STEP, _ROUNDED = 512, (FloorDiv, Mod, PythonMod)


def read_free_dimensions(exported: ExportedProgram, graph: fx.Graph) -> tuple[FreeDimension, ...]:
    """What is known of the free dimensions of a program's inputs, in the order of `free_symbols`.

    Args:
        exported: the program; from a file, torch restores the bounds, and our metadata the names.
        graph: its graph, as traced.
    """
    symbols = free_symbols(graph)
    written = exported.graph_module.meta.get("custom", {}).get(_KEY, [])
    names = (
        [str(name) for name in written] if len(written) == len(symbols) else map(_given_name, symbols, symbols.values())
    )
    steps = exported.graph_module.meta.get("custom", {}).get(_STEPS, [])
    if len(steps) != len(symbols):
        steps = [_step(symbol, size.node.shape_env) for symbol, size in symbols.items()]
    return tuple(
        _stepped(
            _bounded(name if name.isidentifier() else "", exported.range_constraints.get(symbol)),
            int(step),
            int(offset),
        )
        for name, symbol, (step, offset) in zip(names, symbols, steps, strict=True)
    )


def write_free_dimensions(exported: ExportedProgram, dimensions: tuple[FreeDimension, ...]) -> None:
    """Stores names and steps in the program's metadata, as torch saves only the bounds."""
    custom = exported.graph_module.meta.setdefault("custom", {})
    custom[_KEY] = [dimension.name for dimension in dimensions]
    custom[_STEPS] = [[0, one.lowest] if one.is_fixed else [one.step, one.offset] for one in dimensions]


def _given_name(symbol: sympy.Symbol, size: torch.SymInt) -> str:
    """Name of the user's `Dim`; if inputs only hold multiples of it, the `Dim` is itself a source of the symbol."""
    environment = size.node.shape_env
    sources = [source.name for source in environment.var_to_sources.get(symbol, [])]
    names = [environment.source_name_to_debug_name.get(source, source) for source in sources]
    return next((name for name in names if name.isidentifier()), "")


def _step(symbol: sympy.Symbol, environment: Any) -> tuple[int, int]:
    """The step between sizes that take the same branches of the model's code as the example, and their offset.

    Torch recorded its decisions on sizes as guards (`height % 32 == 0`); the step is the distance to the nearest other
    size that fulfils all of them. If there is none within `_LONGEST_STEP`, the step is the size of the example; or 0,
    and the offset the size, where the guards on this size alone hold for no other, multiples of it included.
    """
    hints = environment.backed_var_to_val
    decided = {guard.expr.xreplace(environment.replacements) for guard in environment.guards}
    decided = {expr for expr in decided if symbol in expr.free_symbols and expr.atoms(*_ROUNDED)}
    if symbol not in hints or not decided:
        return 1, 0
    size = int(hints[symbol])
    forms = [expr.xreplace({other: value for other, value in hints.items() if other != symbol}) for expr in decided]
    forms = [form for form in forms if form.free_symbols == {symbol}]

    def holds(other: int, forms: Collection[Any] = forms) -> bool:
        try:
            return all(form.xreplace({symbol: sympy.Integer(other)}) == sympy.true for form in forms)
        except ZeroDivisionError:  # no size that the guard was made for
            return False

    near = [sign * step for step in range(1, _LONGEST_STEP) for sign in (1, -1) if size + sign * step > 0]
    step = next((abs(step) for step in near if holds(size + step)), size)
    alone = [expr for expr in decided if expr.free_symbols == {symbol}]
    if step == size and not any(holds(size + step, alone) for step in (*near, size, 2 * size)):
        return 0, size
    return step, size % step


def _stepped(dimension: FreeDimension, step: int, offset: int) -> FreeDimension:
    if step > 0:
        return dataclasses.replace(dimension, step=step, offset=offset % step)
    return dataclasses.replace(dimension, lowest=offset, highest=offset)


def _bounded(name: str, bounds: Any) -> FreeDimension:
    """The bounds in the program; a lower bound of 0, or of 2 for a size without a name, is torch's default."""
    if bounds is None:
        return FreeDimension(name)
    lowest, highest = (int(bound) if bound.is_Integer else None for bound in (bounds.lower, bounds.upper))
    return FreeDimension(name, lowest if lowest and (name or lowest > 2) else None, highest)
