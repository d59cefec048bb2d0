"""Runs compared: figures, rankings, recommendations that follow from the numbers, and what was not measured."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lobo_fx import Artifact, InvalidInput, Report
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.report.advice import advise
from lobo_fx.report.comparison import COMPARISON_FILES, Comparison, compare
from lobo_fx.report.dashboards import DASHBOARDS
from lobo_fx.report.figures import METRICS, Figures, front
from lobo_fx.report.plain_charts import charts_of, pass_charts
from lobo_fx.report.records import Row


def figures(name: str, **changes: Any) -> Figures:
    values: dict[str, Any] = {
        "model": "m",
        "bytes": 25,
        "original_bytes": 100,
        "milliseconds": 5.0,
        "original_milliseconds": 10.0,
        "score": 0.9,
        "original_score": 0.95,
        "decibels": 30.0,
    }
    return Figures(name, **(values | changes))


def report(size: int, p50: float, score: float | None, snr: float = 20.0, model: str = "m") -> Report:
    files = {
        label: Artifact(Path(f"{label}.onnx"), (), count, 0.0)
        for label, count in (("original", 1000), ("compiled", size))
    }
    times = {label: Latency(p, p, p, p, 1 / p) for label, p in (("original", 10.0), ("compiled", p50))}
    last = Row("p", 50, 50, 0.0, 1, 200, snr, score, 1.5)
    original = Row("original", 100, 100, 0.0, 2, 400, math.inf, None if score is None else 0.95, 0.0)
    return Report(model, [original, last], artifacts=files, benchmark=Benchmark("rt", 1, 1, 30, times))


THREE = {"int8": report(250, 4.0, 0.92), "half": report(400, 2.0, 0.80), "both": report(100, 1.0, 0.5)}


def test_figures_are_what_the_report_says() -> None:
    run = THREE["half"].figures("half")
    assert (run.share, run.smaller, run.faster) == (0.4, 2.5, 5.0)
    assert run.change == pytest.approx(-0.15)
    assert run.kept == pytest.approx(0.8 / 0.95)
    assert run.removed == 0.5
    assert run.gain == pytest.approx(math.sqrt(12.5))
    assert run.efficiency == pytest.approx(math.sqrt(12.5) * 0.8 / 0.95)
    assert run.seconds == 1.5


def test_what_was_not_measured_is_none_and_ranked_nowhere() -> None:
    bare = Report("m", [Row("original", 100, 100, 0.0, None, 400, math.inf, None, 0.0)]).figures("bare")
    assert {bare.share, bare.faster, bare.change, bare.kept, bare.gain, bare.efficiency} == {None}
    found = Comparison.of({**THREE, "bare": Report("m", [])})
    assert [run.name for run in METRICS["speed"].ranked(found.runs)] == ["both", "half", "int8"]
    table = next(line for line in found.to_markdown().splitlines() if line.startswith("| bare"))
    assert table.count("not measured") == 13
    assert not re.search(r"\d", table)
    line = list(csv.DictReader(io.StringIO(found.to_csv())))[-1]
    assert {value for name, value in line.items() if name not in ("name", "model", "unit", "machine")} == {""}
    assert any("speed of bare was not measured" in str(advice) for advice in found.advice)


def test_a_negative_score_has_no_share_that_is_kept() -> None:
    assert figures("a", score=-2.0, original_score=-1.0).kept is None
    assert figures("a", score=-2.0, original_score=-1.0).change == -1.0
    assert figures("a", score=0.5, original_score=0.0).kept is None
    assert figures("a", score=0.0).kept == 0.0, "a model that has lost all of its score was measured"
    assert figures("a", score=None).kept is None


def test_one_folder_is_no_list_of_its_letters() -> None:
    with pytest.raises(InvalidInput, match=r"folders is 'run'; expected a list, as \['run'\]"):
        compare("run")


def test_charts_take_the_original_from_the_run_that_knows_it() -> None:
    bare = figures("bare", bytes=None, original_bytes=None, score=None, original_score=None)
    drawn = charts_of([bare, figures("a")])
    for title, value in (("Size of the file, MB", "0.0001"), ("Score", "0.95")):
        line = drawn.split(f"{title}\n")[1].splitlines()[2]
        assert line.startswith("original |█"), title
        assert line.endswith(value)


def test_errors_are_ranked_by_gain_since_nothing_of_them_is_kept() -> None:
    wrong = [figures("a", score=-0.2, original_score=-0.1), figures("b", score=-0.1, original_score=-0.1, bytes=20)]
    (family,) = Comparison(wrong).families
    assert family.metrics[-1].name == "gain"
    assert "the most size and speed together take b" in "\n".join(advice.text for advice in family.advice)
    assert "Ranking by gain" in charts_of(wrong)
    assert Comparison([figures("a"), wrong[0]]).families[0].metrics[-1].name == "efficiency"


def test_rankings_and_the_front() -> None:
    found = Comparison.of(THREE)
    (family,) = found.families
    best = {metric.name: metric.ranked(found.runs)[0].name for metric in family.metrics}
    assert best == {"size": "both", "speed": "both", "score": "int8", "efficiency": "both"}
    assert [run.name for run in family.front] == ["int8", "half", "both"]
    worse = figures("worse", bytes=30, milliseconds=6.0, score=0.89)
    assert front([figures("a"), worse], ["size", "speed", "score"]) == [figures("a")]
    assert len(front([figures("a"), figures("b")], ["size", "speed"])) == 2, "equal ones beat each other not"
    assert front([figures("a", score=None)], ["score"]) == []


def test_runs_of_two_models_may_have_one_name() -> None:
    small = figures("int8", model="first", bytes=10, milliseconds=9.0, score=0.5)
    fast = figures("int8", model="second", bytes=90, milliseconds=1.0, score=0.9)
    assert front([small, fast], ["size", "speed"]) == [small, fast]
    slow = figures("int8", model="third", bytes=95, milliseconds=2.0, score=0.8)
    said = [advice.text for advice in advise([small, fast, slow])]
    assert not any(text.startswith("Take int8") for text in said)
    assert sum(text.startswith("For ") for text in said) == 2
    assert sum(text.startswith("Nothing speaks for int8: int8") for text in said) == 1


def test_recommendations_follow_the_numbers() -> None:
    said = [str(advice) for advice in Comparison.of(THREE).advice]
    every = "For the smallest file, the lowest latency and the most size and speed together"
    assert any(text.startswith(f"{every} take both: 10.00 times as small and 10.00 times") for text in said)
    turned = {**THREE, "half": report(400, 0.5, 0.80)}
    said = [str(advice) for advice in Comparison.of(turned).advice]
    assert any(
        text.startswith("For the lowest latency and the most size and speed together take half: 2.50 times as small")
        for text in said
    )


def test_a_recommendation_for_each_case_and_none_without_it() -> None:
    def said(*runs: Figures) -> str:
        return "\n".join(advice.text for advice in advise(runs))

    assert "Nothing speaks for b: a is no worse" in said(figures("a"), figures("b", bytes=26))
    assert "Nothing speaks" not in said(figures("a"), figures("b", bytes=24, milliseconds=6.0))
    assert "Take a: it is the smallest, the fastest" in said(figures("a", score=0.93), figures("b", bytes=26))
    assert "Take a" not in said(figures("a", score=0.93), figures("b", bytes=26, score=None))
    failed = figures("c", fault="no parity", bytes=None, milliseconds=None, score=None, decibels=None)
    assert "Take a: it is" in said(figures("a", score=0.93), figures("b", bytes=26), failed)
    assert "slower than the original: 0.50 times" in said(figures("a", milliseconds=20.0))
    assert "slower" not in said(figures("a"))
    assert "98" not in said(figures("a", score=0.9))
    kept = said(figures("a", score=0.945))
    assert "no more than 1% of the score may be lost, a is the fastest" in kept
    assert "99.47% of the original's score" in kept
    little = said(figures("a", score=0.94, bytes=40), figures("b", milliseconds=4.9, score=0.5))
    assert "From a to b little is won: 1.02 times the speed for 0.44 less score" in little
    assert "little is won" not in said(figures("a", score=0.94), figures("b", milliseconds=2.0, score=0.5))
    assert said() == ""


def test_every_number_of_a_recommendation_is_a_figure_that_it_rests_on_or_follows_from() -> None:
    for advice in Comparison.of(THREE).advice:
        assert advice.rests_on
        for part in advice.rests_on:
            assert re.search(r"\d|not measured", part)
    lowest = next(advice for advice in Comparison.of(THREE).advice if "lowest latency" in advice.text)
    assert lowest.rests_on[:2] == ("size of both: 10.0%", "speed of both: 10.00 x")


def test_runs_of_different_kinds_are_said_to_be() -> None:
    assert Comparison.of(THREE).warnings == []
    other = report(1, 1.0, 0.5, model="other")
    other.machine = "another"
    said = Comparison.of({**THREE, "other": other}).warnings
    assert [text.partition(" (")[0] for text in said] == [
        "the runs have different models",
        "the runs have different machines",
    ]


def test_without_scores_decibels_and_the_gain_decide() -> None:
    found = Comparison.of({"a": report(250, 4.0, None, 30.0), "b": report(250, 5.0, None, math.inf)})
    (family,) = found.families
    assert [metric.name for metric in family.metrics] == ["size", "speed", "decibels", "gain"]
    assert METRICS["decibels"].ranked(found.runs)[0].name == "b"
    assert "SNR dB" in str(found)
    assert "score" not in str(found), "nobody asked for one"


def test_charts_hold_every_run_and_fit_80_columns() -> None:
    runs = Comparison.of({**THREE, "unknown": Report("m", [])}).runs
    text = charts_of(runs)
    assert max(map(len, text.splitlines())) <= 95, "the meaning of the ranking is one sentence"
    for heading in (
        "Size of the file",
        "Times as fast",
        "Share of the parameters that is gone",
        "Ranking by efficiency",
    ):
        assert heading in text
    assert "1. both: 5.26" in text
    assert "unknown" in text
    assert "not measured" in text
    assert "p " in pass_charts(THREE["int8"])
    assert pass_charts(Report("m", [])) == ""


def test_runs_are_read_from_folders_and_written(tmp_path: Path) -> None:
    for name, one in THREE.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(one.to_json())
    found = compare([tmp_path / name for name in THREE])
    assert [run.name for run in found.runs] == list(THREE)
    assert found.runs == Comparison.of(THREE).runs
    written = {file.name for file in found.save(tmp_path / "all")}
    assert written == {*COMPARISON_FILES, *DASHBOARDS}
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="can't make the folder"):
        found.save(tmp_path / "file")
    with pytest.raises(InvalidInput, match="given twice"):
        compare([tmp_path / "int8", tmp_path / "half" / ".." / "int8"])
    with pytest.raises(InvalidInput, match="one or more"):
        compare([])
    (tmp_path / "other" / "int8").mkdir(parents=True)
    (tmp_path / "other" / "int8" / "report.json").write_text(THREE["half"].to_json())
    alike = compare([tmp_path / "int8", tmp_path / "other" / "int8"])
    assert [run.name for run in alike.runs] == [str(tmp_path / "int8"), str(tmp_path / "other" / "int8")]


MARKUP = ("a|b", "<script>alert(1)</script>", "[red]x[/b]", "=1+1", "a\x1b[2J", "$x$")


@pytest.mark.parametrize("name", MARKUP)
def test_names_of_runs_are_names(name: str) -> None:
    found = Comparison.of({name: THREE["int8"], "other": THREE["half"]})
    assert "<script>" not in found.to_markdown()
    assert "\x1b" not in str(found) + found.to_markdown() + found.charts()
    assert found.to_csv().splitlines()[1].startswith(f"'{name}" if name.startswith("=") else name)


def test_names_of_runs_are_names_in_pictures_too(tmp_path: Path) -> None:
    found = Comparison.of({**dict.fromkeys(MARKUP, THREE["int8"]), "other": THREE["half"]})
    assert len(found.save(tmp_path / "all")) == 6
