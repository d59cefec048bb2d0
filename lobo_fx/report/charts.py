"""Pictures of sheets and curves, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import TYPE_CHECKING, Any

from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import printable

if TYPE_CHECKING:
    from lobo_fx.report.curves import Curve
    from lobo_fx.report.records import Sheet

__all__ = ["can_draw", "draw", "draw_curve", "plain_label"]

_LONGEST_NAME = 24


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

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, line in enumerate(curve.lines):
        style: dict[str, Any] = {"color": "#8a919e", "linestyle": "--"} if line.is_reference else {"color": f"C{index}"}
        axes.plot(*zip(*line.points, strict=True), marker="o", markersize=4, label=plain_label(line.name, 40), **style)
    axes.set_yscale("log" if curve.is_log else "linear")
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
    """A name that is no formula to matplotlib, holds no control characters, and fits."""
    name = printable(name).replace("\n", " ")
    return (name if len(name) <= longest else f"{name[: longest - 1]}…").replace("$", r"\$")


def _length(cell: Any) -> float:
    """Of the bar of a cell; none where it is infinite or no number."""
    return float(cell) if isinstance(cell, (int, float)) and math.isfinite(cell) else 0.0
