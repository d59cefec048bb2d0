"""Pictures of sheets and curves, drawn with matplotlib if installed."""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
from typing import TYPE_CHECKING, Any

from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import printable

if TYPE_CHECKING:
    from lobo_fx.report.curves import Curve
    from lobo_fx.report.records import Sheet

__all__ = ["can_draw", "draw", "draw_curve", "plain_label"]

_LONGEST_NAME = 24
_COLOURS = ("#1f74c9", "#c8501e", "#12875a", "#a24fc7", "#b08a10", "#d0457f", "#1a97a8", "#7a6a53")
_DASHES = ("-", (0, (1, 1.5)))
_REFERENCES = ("--", "-.")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(sheet: Sheet) -> bytes:
    """A PNG with a bar for each row of a sheet: its second column, named by its first, coloured by its last."""
    from matplotlib.figure import Figure

    labels = [plain_label(str(row[0]), 60) for row in sheet.rows]
    groups = sorted({str(row[-1]) for row in sheet.rows})
    figure = Figure(figsize=(8, 1.5 + 0.22 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for index, group in enumerate(groups):
        chosen = [at for at, row in enumerate(sheet.rows) if str(row[-1]) == group]
        axes.barh(chosen, [_length(sheet.rows[at][1]) for at in chosen], color=f"C{index}", label=group)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(sheet.columns[1])
    axes.legend(title=sheet.columns[-1])
    stream = io.BytesIO()
    with quiet():  # of letters that the font lacks
        figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def draw_curve(curve: Curve) -> bytes:
    """A PNG with the lines of a curve; references are dashed and grey."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    numbers = {True: itertools.count(), False: itertools.count()}
    for line in curve.lines:
        turn, number = divmod(next(numbers[line.is_reference]), len(_REFERENCES if line.is_reference else _COLOURS))
        colour = "#8a919e" if line.is_reference else _COLOURS[number]
        dashes: Any = _REFERENCES[number] if line.is_reference else _DASHES[min(turn, 1)]
        label = plain_label(line.name, 40)
        axes.plot(
            *zip(*line.points, strict=True), marker="o", markersize=4, label=label, color=colour, linestyle=dashes
        )
    if curve.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(plain_label(curve.title, 100), loc="left", fontsize="medium", fontweight="bold")
    axes.set_xlabel(plain_label(curve.x_title, 60))
    axes.set_ylabel(plain_label(curve.y_title, 60))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    stream = io.BytesIO()
    with quiet():  # of letters that the font lacks
        figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def plain_label(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that matplotlib does not parse as a formula, without control characters, cut to fit."""
    name = printable(name).replace("\n", " ")
    return (name if len(name) <= longest else f"{name[: longest - 1]}…").replace("$", r"\$")


def _length(cell: Any) -> float:
    """Length of a cell's bar; 0 if it is infinite or no number."""
    return float(cell) if isinstance(cell, (int, float)) and math.isfinite(cell) else 0.0
