"""A drawing of the network, folded by module: a bar for each layer, as wide as its channels, and what was removed."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lobo_fx.measures.module_figures import MIXED, is_inside
from lobo_fx.report.cells import Cell, Source

__all__ = ["PRECISIONS", "Bar", "Part", "drawing"]

PRECISIONS = {
    "float": "computed in float",
    "stored": "stored in 8 bits, computed in float",
    "integer": "computed in int8",
    "few": "stored in fewer than 8 bits",
    "mixed": "several of these",
    "gone": "nothing left",
}
"""Classes of parts, which determine their colours, and their meanings."""

_NARROW = re.compile(r"u?int[1-7]|log2_[1-7]")
_FEW = 12
"""Most modules that are all open at first; of more, only the model itself is."""
_WIDEST = 16
"""Bars are to scale up to this multiple of the median width; a vocabulary would shrink all others to nothing."""
_LEAST = 0.05
"""Least share of zero parameters that counts as pruned: rounding to integers also makes zeros."""


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value / 1e3:,.1f} kB"


_FIGURES: dict[str, tuple[str, Any]] = {
    "width": ("channels", "{:,}"),
    "parameters": ("parameters", "{:,}"),
    "bytes": ("", _bytes),
    "microseconds": ("", "{:,.0f} µs"),
}
"""By entry of a module's figures, the text after the number, and its format."""


@dataclasses.dataclass(frozen=True)
class Bar:
    """A layer as it is drawn; lengths in percent of the longest bar.

    Attributes:
        before: outputs in the original, at most 100; 0 where a pass made the layer.
        after: outputs that are left.
        zero: the part of `after` that stands for zero weights.
        precision: a key of `PRECISIONS`.
        is_longer: whether the layer is wider than the bar shows.
    """

    before: float
    after: float
    zero: float
    precision: str
    is_longer: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of the drawing.

    Attributes:
        name: its dotted name without that of the part around it; for the model, the model's name.
        path: the whole dotted name.
        kind: kind of its layer; empty if it only holds other modules.
        precision: a key of `PRECISIONS`.
        bar: bar of its own layer; None without one.
        bars: bars of all layers inside, in order.
        figures: figures before and after, with their units.
        stays: share of the parameters that are neither removed nor zero; None if that is nearly all.
        decibels: signal-to-noise ratio with this layer alone quantized; None if not measured.
        parts: the modules inside.
        is_open: whether these are shown at first.
    """

    name: str
    path: str
    kind: str
    precision: str
    bar: Bar | None
    bars: list[Bar]
    figures: list[tuple[Cell, Cell, str]]
    stays: Cell | None
    decibels: Cell | None
    parts: list[Part]
    is_open: bool


def drawing(source: Source) -> Part | None:
    """The model with its modules; None if the report has no modules."""
    rows = source.data.get("modules", [])
    return _Drawer(source, rows).part(0, "") if rows else None


class _Drawer:
    """Makes parts from the rows of a report."""

    def __init__(self, source: Source, rows: Sequence[Mapping[str, Any]]) -> None:
        self.source, self.rows = source, rows
        widths = [side["width"] for row in rows for side in _sides(row) if side["width"]] or [1]
        self.widest = max(width for width in widths if width <= _WIDEST * statistics.median(widths))
        self.known = [name for name in _FIGURES if any(side[name] is not None for row in rows for side in _sides(row))]
        self.inside: list[list[int]] = [[] for _ in rows]  # by module, those directly inside
        for index, row in enumerate(rows[1:], 1):
            around = [at for at, other in enumerate(rows) if at != index and is_inside(row["name"], other["name"])]
            self.inside[max(around, key=lambda at: len(rows[at]["name"]))].append(index)

    def part(self, at: int, above: str) -> Part:
        """A module; one that only holds a single other module is merged with it."""
        row, inside = self.rows[at], self.inside[at]
        name, kind = row["name"], next((side["kind"] for side in reversed(_sides(row)) if side["kind"]), "")
        if name and not kind and len(inside) == 1:
            return self.part(inside[0], above)
        parts = [self.part(index, name) for index in inside]
        bar = self._bar(row)
        return Part(
            (name.removeprefix(f"{above}.") if above else name) or self.source.data["model"],
            name,
            kind,
            _precision(row["after"]),
            bar,
            [*([] if bar is None else [bar]), *(one for part in parts for one in part.bars)],
            list(self._figures(at)),
            self._stays(at),
            None if row["decibels"] is None else self.source.cell("modules", at, "decibels", form="{:.1f} dB"),
            parts,
            not name or len(self.rows) <= _FEW,
        )

    def _bar(self, row: Mapping[str, Any]) -> Bar | None:
        before, after = ((row[side] or {}).get("width") for side in ("before", "after"))
        if before is None and after is None:
            return None
        kept, (start, left) = row["after"] or {}, (min(100, 100 * (one or 0) / self.widest) for one in (before, after))
        zero = 1 - kept["nonzero"] / kept["parameters"] if kept.get("parameters") else 0.0
        longer = max(before or 0, after or 0) > self.widest
        return Bar(start, left, left * zero * (zero >= _LEAST), _precision(row["after"]), longer)

    def _figures(self, at: int) -> Iterator[tuple[Cell, Cell, str]]:
        for name in self.known:
            unit, form = _FIGURES[name]
            before, after = (self.source.cell("modules", at, side, name, form=form) for side in ("before", "after"))
            yield before, after, unit

    def _stays(self, at: int) -> Cell | None:
        paths = [("modules", at, side, "nonzero") for side in ("after", "before")]
        stays = self.source.cell(*paths[0], form="{:.0%}", by=paths[1])
        return stays if stays.value is not None and stays.value <= 1 - _LEAST else None


def _sides(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [side for side in (row["before"], row["after"]) if side is not None]


def _precision(figures: Mapping[str, Any] | None) -> str:
    """The precision of a module, as a key of `PRECISIONS`."""
    if figures is None:
        return "gone"
    stored, computed = figures["stored"], figures["computed"]
    if MIXED in (stored, computed):
        return "mixed"
    if _NARROW.fullmatch(stored):
        return "few"
    if computed == "int8":
        return "integer"
    return "float" if stored.startswith(("float", "bfloat")) or not stored else "stored"
