"""Points in a plane: the front, ticks that are round, places inside of the frame, names that do not overlap."""

from __future__ import annotations

import math
import random

from lobo_fx.report.cells import Cell
from lobo_fx.report.scatter import Point, Scatter


def chart(*points: tuple[float, float], unit: float = 1) -> Scatter:
    made = [Point(f"point {i}", Cell("", x), Cell("", y), "run", unit) for i, (x, y) in enumerate(points)]
    found = Scatter.of("c", "t", "x", "y", made)
    assert found is not None
    return found


def test_the_front_is_what_nothing_beats() -> None:
    """Oracle: every pair compared."""
    draw = random.Random(0)
    points = [(draw.randrange(1, 20), draw.randrange(20)) for _ in range(60)]
    found = chart(*points)
    best = {(p.x.value, p.y.value) for p in found.front}
    assert best == {(x, y) for x, y in points if not any((a, b) != (x, y) and a <= x and b >= y for a, b in points)}
    assert [p.x.value for p in found.front] == sorted(p.x.value or 0 for p in found.front)


def test_places_are_inside_and_in_order() -> None:
    found = chart((1e6, 0.5), (3e6, 0.9), (2e6, math.inf), unit=1e6)
    places = [found.place(point) for point in found.points]
    for x, y in places:
        assert found.left <= x <= found.right
        assert found.top <= y <= found.bottom
    assert places[0][0] < places[2][0] < places[1][0]
    assert places[2][1] < places[1][1] < places[0][1], "more is higher, infinity highest"
    assert [text for _, text in found.y_ticks][-1] == "∞"
    assert all(float(text) * 2 % 1 == 0 for _, text in found.x_ticks), "round numbers"


def test_names_overlap_neither_points_nor_each_other() -> None:
    found = chart(*((1 + i * 0.01, 1 + i * 0.01) for i in range(40)), (5.0, 1.0))
    boxes = [(left, base - 9, left + 6 * len(point.label), base) for point, _, _, _, at in found.placed if at
             for left, base in [at]]  # fmt: skip
    assert 0 < len(boxes) < 41, "where there is no room, there is no name"
    for index, (a, b, c, d) in enumerate(boxes):
        assert all(c <= e or g <= a or d <= f or h <= b for e, f, g, h in boxes[:index])
        for _, x, y, _, _ in found.placed:
            assert not (a < x < c and b < y < d)


def test_there_is_nothing_to_draw_of_one_point_or_of_what_was_not_measured() -> None:
    cells = [Cell("", 1.0), Cell("not measured"), Cell("", math.inf)]
    points = [Point("a", cells[0], cells[0], "run"), Point("b", cells[1], cells[0], "run"),
              Point("c", cells[2], cells[0], "run"), Point("d", cells[0], cells[1], "run")]  # fmt: skip
    assert Scatter.of("c", "t", "x", "y", points) is None
    equal = chart((1.0, 1.0), (1.0, 1.0))
    assert len({equal.place(point) for point in equal.points}) == 1
    assert equal.x_ticks
    assert equal.y_ticks
