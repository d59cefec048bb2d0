"""Curves: one figure over another, with a line for each of several things; and their coordinates in a drawing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from lobo_fx.report.figures import Figures, Metric
from lobo_fx.report.records import Sheet
from lobo_fx.report.scatter import padded, ticks

__all__ = ["Curve", "Line", "Plot", "removal_curve"]

_WIDTH, _HEIGHT = 400, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 28, 44
_LEAST_SPAN = 0.05
"""Least share of the parameters that a line must span to be drawn."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a curve.

    Attributes:
        name: its name.
        points: pairs of what was chosen and what was measured, in order.
        is_reference: whether others are to be compared with it, such as an original or a bound.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    is_reference: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """Lines over one axis.

    Attributes:
        title: what it shows; also the name of its file.
        x_title: what was chosen, and its unit.
        y_title: what was measured, and its unit.
        lines: one or more.
        is_log: whether the measured axis is logarithmic; all points must then be positive.
        model: the model that it is of, if there are several; else empty.
    """

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    is_log: bool = False
    model: str = ""

    @property
    def sheet(self) -> Sheet:
        """The curve as a table: a row for each line, a column for each x value."""
        places = sorted({x for line in self.lines for x, _ in line.points})
        rows = tuple((line.name, *(dict(line.points).get(x) for x in places)) for line in self.lines)
        return Sheet(f"{self.title}: {self.y_title} by {self.x_title}", ("", *(f"{x:g}" for x in places)), rows)


def removal_curve(runs: Sequence[Figures], metric: Metric, model: str = "") -> Curve | None:
    """A metric over the share of removed parameters, a line for each group; None if no line spans enough.

    Args:
        runs: runs of one model.
        metric: the measured metric.
        model: see `Curve`.
    """
    lines = []
    for group in dict.fromkeys(run.group for run in runs):
        known = [(run.removed, metric.of(run)) for run in runs if run.group == group]
        points = sorted((x, y) for x, y in known if x is not None and y is not None and math.isfinite(y))
        if len({x for x, _ in points}) > 1 and points[-1][0] - points[0][0] >= _LEAST_SPAN:
            lines.append(Line(group or "all runs", tuple(points)))
    title = f"{metric.name.capitalize()} by the share of the parameters that is gone"
    return Curve(title, "parameters gone", metric.name, tuple(lines), model=model) if lines else None


@dataclasses.dataclass(frozen=True)
class Plot:
    """Coordinates of a curve in a drawing.

    Attributes:
        curve: the curve.
        name: its anchor on the page.
        place: index of the curve in the data.
    """

    curve: Curve
    name: str
    place: int

    width, height = _WIDTH, _HEIGHT
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Positions along the lower edge, with their labels."""
        return [(self._x(tick), text) for tick, text in ticks(*self._x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Positions along the left edge, with their labels."""
        low, high = self._y_range
        if not self.curve.is_log:
            return [(self._y(tick), text) for tick, text in ticks(low, high)]
        powers = range(math.floor(low), math.ceil(high) + 1)
        steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [(self._y(step), f"{step:g}") for step in steps if low <= math.log10(step) <= high]

    @property
    def placed(self) -> list[tuple[Line, str, list[tuple[float, float]]]]:
        """Every line with the coordinates of its polyline and of its points."""
        places = [[(round(self._x(x), 1), round(self._y(y), 1)) for x, y in line.points] for line in self.curve.lines]
        return [
            (line, " ".join(f"{x},{y}" for x, y in found), found)
            for line, found in zip(self.curve.lines, places, strict=True)
        ]

    @property
    def _points(self) -> list[tuple[float, float]]:
        return list(itertools.chain.from_iterable(line.points for line in self.curve.lines))

    @property
    def _x_range(self) -> tuple[float, float]:
        return padded([x for x, _ in self._points])

    @property
    def _y_range(self) -> tuple[float, float]:
        values = [y for _, y in self._points]
        return padded([math.log10(y) for y in values] if self.curve.is_log else values)

    def _x(self, value: float) -> float:
        low, high = self._x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        value = math.log10(value) if self.curve.is_log else value
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)
