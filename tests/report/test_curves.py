"""Curves: their lines from runs, their tables, where they are drawn; groups, families and names of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lobo_fx.report.cells import size_text
from lobo_fx.report.charts import draw_curve
from lobo_fx.report.comparison import Comparison
from lobo_fx.report.curves import Curve, Line, Plot, removal_curve
from lobo_fx.report.dashboards import DASHBOARDS
from lobo_fx.report.figures import METRICS, Conditions, Figures, families
from lobo_fx.report.records import Sheet

HOSTILE = "<img src=http://example.com/x onerror=alert(1)>"
CURVE = Curve(
    "Errors",
    "dB",
    "error rate",
    (Line("a", ((0.0, 0.1), (10.0, 0.001))), Line("bound", ((0.0, 0.05), (5.0, 0.01)), is_reference=True)),
    is_log=True,
)


def figures(name: str, **changes: Any) -> Figures:
    values: dict[str, Any] = {
        "model": "m",
        "bytes": 25,
        "original_bytes": 100,
        "milliseconds": 5.0,
        "original_milliseconds": 10.0,
        "score": 0.9,
        "original_score": 0.95,
        "nonzero": 50,
        "original_parameters": 100,
    }
    return Figures(name, **(values | changes))


def pruned(group: str, *kept: int) -> list[Figures]:
    return [figures(f"{group} {n}", group=group, nonzero=n, milliseconds=n / 10) for n in kept]


def test_a_line_for_each_group_that_removes_more_or_less() -> None:
    runs = [*pruned("cut", 30, 90, 50), *pruned("few bits", 100, 99), *pruned("alone", 40)]
    found = removal_curve(runs, METRICS["speed"])
    assert found is not None
    (line,) = found.lines
    assert line.name == "cut"
    assert [x for x, _ in line.points] == pytest.approx([0.1, 0.5, 0.7])
    assert [y for _, y in line.points] == pytest.approx([100 / 90, 2.0, 100 / 30])
    assert removal_curve(pruned("alone", 40), METRICS["speed"]) is None
    assert removal_curve([figures("a", nonzero=None), figures("b")], METRICS["speed"]) is None
    infinite = [dataclasses.replace(run, decibels=math.inf) for run in runs]
    assert removal_curve(infinite, METRICS["decibels"]) is None, "what is infinite has no place"


def test_a_curve_as_a_table_has_holes_where_nothing_was_measured() -> None:
    assert CURVE.sheet == Sheet(
        "Errors: error rate by dB", ("", "0", "5", "10"), (("a", 0.1, None, 0.001), ("bound", 0.05, 0.01, None))
    )


def test_points_stand_where_their_values_are() -> None:
    plot = Plot(CURVE, "curve-0", 0)
    (_, polyline, a), (reference, _, bound) = plot.placed
    assert reference.is_reference
    assert polyline == " ".join(f"{x},{y}" for x, y in a)
    assert a[0][0] == bound[0][0] < bound[1][0] < a[1][0]
    assert bound[1][0] == pytest.approx((a[0][0] + a[1][0]) / 2, abs=0.1)
    decade = (a[1][1] - a[0][1]) / 2  # from .1 to .001
    assert bound[0][1] - a[0][1] == pytest.approx(decade * math.log10(2), abs=0.15)
    assert bound[1][1] - a[0][1] == pytest.approx(decade, abs=0.15)
    for x, y in [*a, *bound]:
        assert plot.left <= x <= plot.right
        assert plot.top <= y <= plot.bottom
    ticks = {text: place for place, text in plot.y_ticks}
    assert ticks["0.01"] == pytest.approx(bound[1][1], abs=0.1)
    linear = Plot(dataclasses.replace(CURVE, is_log=False), "curve-0", 0).placed[1][2]
    assert linear[1][1] - a[0][1] != pytest.approx(decade, abs=5), "a linear axis is another one"


def test_a_picture_for_each_curve() -> None:
    assert draw_curve(CURVE).startswith(b"\x89PNG")
    assert draw_curve(CURVE) != draw_curve(dataclasses.replace(CURVE, is_log=False))


def test_the_page_shows_each_point_with_its_place_in_the_record() -> None:
    found = Comparison(pruned("cut", 30, 50, 90), curves=[CURVE], sheets=[Sheet("more", ("run", "x"), (("a", 1.5),))])
    page, record = found.to_html(), json.loads(json.dumps(found.as_json()))
    points = re.findall(
        r'data-x="([^"]+)" data-x-path="([^"]+)" data-y="([^"]+)" data-y-path="(\[&#34;curves[^"]+)"', page
    )
    assert len(points) == 4 + 2 * 3, "the curve's own, and from what is removed to speed and score"
    for x, x_path, y, y_path in points:
        for shown, path in ((x, x_path), (y, y_path)):
            value: Any = record
            for key in json.loads(path.replace("&#34;", '"')):
                value = value[key]
            assert float(shown) == value


def test_models_that_have_several_runs_are_ranked_each_alone() -> None:
    two = [figures("a"), figures("b"), figures("a", model="n", score=0.1), figures("c", model="n")]
    assert families(two) == [[0, 1], [2, 3]]
    assert families(two[:3]) == [[0, 1, 2]], "a model with one run is compared with the others"
    found = Comparison(two)
    assert [family.name for family in found.families] == ["m", "n"]
    assert found.warnings == []
    assert [metric.ranked(family.runs)[0].name for family in found.families for metric in [family.quality]] == [
        "a",
        "c",
    ]
    assert "different models" in Comparison(two[:3]).warnings[0]
    assert Comparison([]).families == []


def test_the_best_of_each_group_and_runs_that_failed() -> None:
    runs = [*pruned("cut", 30, 90), figures("int8", group="bits", bytes=10), Figures("bad", "m", "bits", "can't|be")]
    text = Comparison(runs, score="what <b>counts</b>").to_markdown()
    lines = [line for line in text.splitlines() if line.startswith("| cut (2)") or line.startswith("| bits (2)")]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["cut 30 (25.0%)", "cut 30 (3.33 x)"],
        ["int8 (10.0%)", "int8 (2.00 x)"],
    ]
    assert "4 runs: 3 came through, 1 failed." in text
    assert "can't\\|be" in text
    assert "what &lt;b>counts" in text
    assert "fault" not in Comparison(runs[:3]).to_markdown()


def test_memory_and_rates_are_ranked_where_they_were_measured() -> None:
    run = figures("a", added_memory=3_000_000, original_added_memory=6_000_000, rate=30.0, original_rate=20.0)
    names = [metric.name for metric in Comparison([run]).families[0].metrics]
    assert names == ["size", "speed", "memory", "score", "efficiency"], "rows a second are what latency says"
    tokens = dataclasses.replace(run, unit="tokens")
    family = Comparison([tokens]).families[0]
    assert [metric.shown(tokens) for metric in family.metrics if metric.name in ("memory", "rate")] == [
        "50.0%",
        "1.50 x",
    ]
    assert "tokens a second" in str(Comparison([tokens]))
    assert "Tokens a second" in Comparison([tokens]).charts()
    assert "Tokens a second" not in Comparison([run]).charts()


def test_files_of_titles_that_are_alike_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lobo_fx.report.comparison.dashboards", lambda runs: dict.fromkeys(DASHBOARDS, b""))
    sheets = [Sheet("a/b", ("x", "y"), (("=1+1", 2.5),)), Sheet("a:b", ("x",), (("z",),))]
    runs = [figures("r", model=name, nonzero=n) for name in ("m/n", "m:n") for n in (1, 50)]
    runs = [dataclasses.replace(run, name=f"r{place}") for place, run in enumerate(runs)]
    files = {file.name for file in Comparison(runs, sheets=sheets, curves=[CURVE]).save(tmp_path)}
    assert {"a-b.csv", "a-b 2.csv", "Errors.csv", "Errors.png"} <= files
    assert {"m-n dashboard_overview.png", "m-n dashboard_overview 2.png"} <= files
    assert list(csv.reader(io.StringIO((tmp_path / "a-b.csv").read_text()))) == [["x", "y"], ["'=1+1", "2.5"]]


def test_hostile_names_stay_names() -> None:
    line = Line(HOSTILE, ((0.0, 1.0), (1.0, 2.0)))
    curve = Curve(HOSTILE, HOSTILE, HOSTILE, (line,))
    runs = [
        figures(f"{HOSTILE}{n}", model=HOSTILE * m, group=HOSTILE, fault=HOSTILE, conditions=Conditions(HOSTILE))
        for m in (1, 2)
        for n in (1, 2)
    ]
    found = Comparison(runs, HOSTILE, HOSTILE, [HOSTILE], [Sheet(HOSTILE, (HOSTILE,), ((HOSTILE,),))], [curve])
    assert "<img" not in found.to_html() + found.to_markdown()
    assert HOSTILE in str(found).replace("\n", "")


@pytest.mark.parametrize(
    ("count", "text"), [(99_999, "100.00 kB"), (4478, "4.48 kB"), (100_000, "0.10 MB"), (2_345_678_901, "2,345.68 MB")]
)
def test_sizes_are_shown_with_what_fits(count: int, text: str) -> None:
    assert size_text(count) == text
