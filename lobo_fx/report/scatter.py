"""Scatter charts: coordinates of points in a drawing, ticks, and the front of points that none beats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lobo_fx.report.cells import Cell

__all__ = ["Point", "Scatter", "padded", "ticks"]

_WIDTH, _HEIGHT = 400, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 28, 44
_TICKS = 5
_LONGEST_LABEL = 20
_LETTER = 6.5
"""Width of a letter, as drawn."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Something with a cost and a quality.

    Attributes:
        name: its name.
        x: cost, less is better.
        y: quality, more is better.
        kind: determines its colour: original, compiled, candidate, run.
        unit: divisor of costs on the axis.
    """

    name: str
    x: Cell
    y: Cell
    kind: str
    unit: float = 1

    @property
    def at(self) -> float:
        """Its cost in the unit of the axis."""
        return (self.x.value or 0.0) / self.unit

    @property
    def label(self) -> str:
        """Its name, cut to fit beside it."""
        return self.name if len(self.name) <= _LONGEST_LABEL else f"{self.name[: _LONGEST_LABEL - 1]}…"


@dataclasses.dataclass(frozen=True)
class Scatter:
    """A chart of points; points of infinite quality are at the upper edge.

    Attributes:
        name: its anchor on the page.
        title: what it shows.
        x_title: the cost and its unit.
        y_title: the quality and its unit.
        points: those that have a cost and a quality.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    points: tuple[Point, ...]

    width, height = _WIDTH, _HEIGHT
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM

    @classmethod
    def of(cls, name: str, title: str, x_title: str, y_title: str, points: Sequence[Point]) -> Scatter | None:
        """The chart of the measured points; None if there are less than two."""
        known = tuple(p for p in points if p.x.is_finite and p.y.value is not None and p.y.value > -math.inf)
        return cls(name, title, x_title, y_title, known) if len(known) > 1 else None

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Positions along the lower edge, with their labels."""
        return [(self._x(tick), text) for tick, text in ticks(*self._x_range)]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Positions along the left edge, with their labels."""
        finite = [(self._y(tick), text) for tick, text in ticks(*self._y_range)]
        return finite + ([(self._y(math.inf), "∞")] if self._has_infinite else [])

    @property
    def placed(self) -> list[tuple[Point, float, float, bool, tuple[float, float] | None]]:
        """Every point with its position, whether it is on the front, and where its name fits, if anywhere."""
        front, places = self.front, [self.place(point) for point in self.points]
        taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
        names: dict[int, tuple[float, float]] = {}
        for index in sorted(range(len(places)), key=lambda at: self.points[at] not in front):
            (x, y), length = places[index], _LETTER * len(self.points[index].label)
            sides, middles = (x + 9, x - 9 - length), (x - length / 2, x - 4, x + 4 - length)
            for left, base in [(left, y + 4) for left in sides] + [(m, b) for b in (y - 9, y + 17) for m in middles]:
                box = (left, base - 9, left + length, base + 2)
                inside = self.left < left and box[2] < self.width and self.top <= box[1] and base < self.bottom
                if inside and not any(_overlap(box, other) for other in taken):
                    names[index] = round(left, 1), round(base, 1)
                    taken.append(box)
                    break
        return [(point, *places[index], point in front, names.get(index)) for index, point in enumerate(self.points)]

    @property
    def front(self) -> list[Point]:
        """Points that no other one beats in cost and quality alike, the cheapest first."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.at, -(p.y.value or 0))):
            if not found or (point.y.value or 0) > (found[-1].y.value or 0):
                found.append(point)
        return found

    @property
    def line(self) -> str:
        """The front as coordinates of a polyline, in steps."""
        places = [self.place(point) for point in self.front]
        corners = [f"{x:.1f},{y:.1f} {places[i + 1][0]:.1f},{y:.1f}" for i, (x, y) in enumerate(places[:-1])]
        return " ".join([*corners, f"{places[-1][0]:.1f},{places[-1][1]:.1f}"])

    def place(self, point: Point) -> tuple[float, float]:
        """The position of a point."""
        assert point.y.value is not None
        return round(self._x(point.at), 1), round(self._y(point.y.value), 1)

    @property
    def _has_infinite(self) -> bool:
        return any(not point.y.is_finite for point in self.points)

    @property
    def _x_range(self) -> tuple[float, float]:
        return padded([point.at for point in self.points], from_zero=True)

    @property
    def _y_range(self) -> tuple[float, float]:
        return padded([p.y.value for p in self.points if p.y.is_finite and p.y.value is not None])

    def _x(self, value: float) -> float:
        low, high = self._x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def _y(self, value: float) -> float:
        low, high = self._y_range
        top = self.top + (18 if self._has_infinite else 0)
        return self.top if value == math.inf else self.bottom - (value - low) / (high - low) * (self.bottom - top)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, top, right, bottom) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def padded(values: Sequence[float], from_zero: bool = False) -> tuple[float, float]:
    """The range of an axis with room around the points; starts at zero if the points are not far from it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if from_zero and 0 <= low < 0.7 * high else low - room), high + room


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers between two, with their labels."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    digits = max(0, 1 - math.floor(math.log10(step))) if step % 1 else 0
    first = math.ceil(low / step)
    return [(n * step, f"{n * step:,.{digits}f}") for n in range(first, math.floor(high / step) + 1)]
