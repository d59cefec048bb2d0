"""`lobo-fx report`: a run shown again, several compared, and folders that are none refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lobo_fx import Artifact, Report
from lobo_fx.cli.app import app
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.report.comparison import COMPARISON_FILES
from lobo_fx.report.dashboards import DASHBOARDS
from lobo_fx.report.records import Row
from lobo_fx.report.report import REPORT_FILES


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments])


def run(folder: Path, p50: float) -> str:
    files = {
        label: Artifact(Path(f"{label}.onnx"), (), size, 0.0) for label, size in (("original", 9), ("compiled", 3))
    }
    times = {label: Latency(p, p, p, p, 1 / p) for label, p in (("original", 8.0), ("compiled", p50))}
    rows = [Row("original", 9, 9, 0.0, 9, 36, math.inf, None, 0.0), Row("p", 9, 3, 0.6, 9, 36, 20.0, None, 1.0)]
    folder.mkdir()
    report = Report("net", rows, artifacts=files, benchmark=Benchmark("rt", 1, 1, 3, times))
    (folder / "report.json").write_text(report.to_json())
    return str(folder)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [run(tmp_path / "slow", 4.0), run(tmp_path / "fast", 2.0)]
    done = call(*runs)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "the most size and speed together take fast: 3.00 times as small and 4.00 times as fast" in said
    assert "█" not in done.output
    charts = call(*runs, "--charts", "-o", str(tmp_path / "all"))
    assert "Times as fast" in charts.output
    assert "█" in charts.output
    written = {file.name for file in (tmp_path / "all").iterdir()}
    assert written == {*COMPARISON_FILES, *DASHBOARDS}
    assert all(name in charts.output for name in written)


def test_one_run_is_shown_again_and_written_anew(tmp_path: Path) -> None:
    folder = run(tmp_path / "slow", 4.0)
    done = call(folder, "--charts", "-o", str(tmp_path / "again"))
    assert done.exit_code == 0, done.output
    assert "original.onnx" in done.output, "files that have gone are known"
    assert "For the" not in done.output
    assert {file.name for file in (tmp_path / "again").iterdir()} == {*REPORT_FILES, *DASHBOARDS}
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("slow", "again"))
    assert {name: value for name, value in again.items() if name != "files"} == first


@pytest.mark.parametrize("width", [80, 60])
def test_at_80_columns_everything_fits_and_numbers_are_whole(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = call(run(tmp_path / "one", 1234567.125))
    lines = [line for line in done.output.splitlines() if not line.startswith("note: ")]
    assert max(map(len, lines)) <= width
    assert "1234567.12" in done.output


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", 4.0)
    for arguments, said in (
        ([str(tmp_path)], "holds no report.json"),
        ([folder, folder], "a run is given twice"),
        ([folder, "-o", str(tmp_path / "run" / "report.json")], "can't make the folder"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())
    saved = json.loads((tmp_path / "run" / "report.json").read_text())
    (tmp_path / "run" / "report.json").write_text(json.dumps(saved | {"schema": 99}))
    done = call(folder)
    assert done.exit_code == 2
    assert "this version reads schema 1" in " ".join(done.output.split())
