"""The five reports: every form is written, says what the record says, and what was not measured is not made up."""

from __future__ import annotations

import csv
import io
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import reported

from lobo_fx.report.comparison import COMPARISON_FILES
from lobo_fx.report.dashboards import DASHBOARDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples"
Read = dict[str, tuple[Path, dict[str, Any]]]
READING = ("report_001", "report_003", "report_004")


def row(scale: float, **more: Any) -> dict[str, Any]:
    """A row of a benchmark's results, of a network cut to a share."""
    counts = {"parameters": int(1000 * scale), "non-zero": int(900 * scale), "bytes": int(123_456 * scale)}
    times = {"ms": 2.5 * scale, "ratio": 1.01 * scale, "memory": int(7e6 * scale), "seconds": 3.5}
    return {**counts, **times, "gzip bytes": int(100_000 * scale), "machine": "a machine", **more}


def rates(least: float) -> dict[str, Any]:
    exact = {"5.0": 0.2, "15.0": 0.02}
    return {"rates": {snr: rate + least for snr, rate in exact.items()}, "exact": exact}


NETWORKS: dict[str, Any] = {
    "report_001": {
        network: {
            "Original": row(1, accuracy=0.98),
            "Pruning (structured) 30%": row(0.7, accuracy=0.97),
            "Pruning (structured) 50%": row(0.5, accuracy=0.95),
            "Quantization (static) int8": row(0.25, accuracy=0.981),
        }
        for network in ("Net A", "Net B")
    },
    "report_003": {
        "Decoder": {
            "original": row(1, bits=2.0, **{"tokens a second": 50.0}),
            "consensus 50% distilled": row(0.5, bits=2.1, **{"tokens a second": 80.0}),
        }
    },
    "report_004": {
        "Demapper": {
            "original": row(1, **rates(0.01)),
            "magnitude_0.5": row(0.999, **rates(0.1)),
            "structured_0.3 fine-tuned": row(0.7, **rates(0.011)),
            "structured_0.5 fine-tuned": row(0.5, **rates(0.02)),
            "log2_4": row(0.2, **rates(0.012)),
            "student_0.25 kept, distilled": row(0.1, **rates(0.05)),
        }
    },
}


def results(name: str, folder: Path) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(NETWORKS[name]))
    return path


def written(name: str, output: Path, *arguments: str) -> dict[str, Any]:
    """The record that an example writes; all forms are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, "-o", str(output), *arguments])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    names = {file.name for file in output.iterdir()}
    assert names >= set(COMPARISON_FILES)
    for picture in DASHBOARDS:
        assert any(name.endswith(picture) for name in names)
    for file in output.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    page = (output / "comparison.html").read_text()
    record: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    assert all(run["name"] in page for run in record["runs"])
    return record


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """By name, the folder and the record of each report that reads results."""
    found = {}
    for name in READING:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            if name != READING[0]:  # whose dashboards are drawn, in several families
                drawn = dict.fromkeys(DASHBOARDS, b"\x89PNG")
                patch.setattr("lobo_fx.report.comparison.dashboards", lambda runs, drawn=drawn: drawn)
            found[name] = folder / "out", written(name, folder / "out", "--results", str(results(name, folder)))
    return found


def table(output: Path, first: str) -> list[dict[str, str]]:
    """The rows of markdown tables whose first heading is `first`."""
    found: list[dict[str, str]] = []
    heading: list[str] = []
    for line in (output / "comparison.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells and heading and heading[0] == first and not cells[0].startswith("---"):
            found.append(dict(zip(heading, cells, strict=True)))
        heading = heading if cells and heading else cells
    return found


def close(text: str, value: float | None) -> bool:
    """Whether a text with a unit is a number, to the digits that it has."""
    if value is None or text == "not measured":
        return value is None and text == "not measured"
    if math.isinf(value):
        return text == "∞"
    number, _, unit = text.removesuffix("%").partition(" ")
    scale = {"MB": 1e6, "kB": 1e3}.get(unit, 0.01 if text.endswith("%") else 1.0)
    digits = len(number.partition(".")[2])
    return abs(float(number.replace(",", "")) * scale - value) <= 0.5001 * 10.0**-digits * scale


def check_markdown(record: dict[str, Any], output: Path) -> None:
    shown = [cells for cells in table(output, "run") if "p50 ms" in cells]
    assert [cells["run"] for cells in shown] == [run["name"] for run in record["runs"]]
    for cells, run in zip(shown, record["runs"], strict=True):
        assert close(cells["file"], run["bytes"])
        assert close(cells["p50 ms"], run["milliseconds"])
        assert close(cells["times as fast"], run["original_milliseconds"] / run["milliseconds"])
        assert close(cells["times as small"], run["original_bytes"] / run["bytes"])
        assert close(cells["gzip"], run["gzip_bytes"])
        assert close(cells["non-zero"], run["nonzero"])
        assert not close(cells["file"], 2 * run["bytes"])
    lines = list(csv.DictReader(io.StringIO((output / "comparison.csv").read_text())))
    assert [float(line["milliseconds"]) for line in lines] == [run["milliseconds"] for run in record["runs"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report_000", "report_002"])
def test_a_report_that_is_measured_here(name: str, tmp_path: Path) -> None:
    record = written(name, tmp_path, "--quick")
    check_markdown(record, tmp_path)
    original, *runs = record["runs"]
    assert original["name"] == "original"
    assert original["bytes"] == original["original_bytes"]
    assert runs
    assert all(run["fault"] == "" and run["conditions"]["machine"] for run in runs)


@pytest.mark.parametrize("name", READING)
def test_a_report_that_reads_results(name: str, read: Read) -> None:
    output, record = read[name]
    check_markdown(record, output)
    rows = {(network, key): row for network, rows in NETWORKS[name].items() for key, row in rows.items()}
    assert len(record["runs"]) == len(rows)
    for run in record["runs"]:
        row = rows[run["model"], run["name"]]
        assert (run["bytes"], run["milliseconds"], run["nonzero"]) == (row["bytes"], row["ms"], row["non-zero"])
        assert run["original_milliseconds"] == row["ms"] / row["ratio"]
        assert run["added_memory"] == row["memory"]
        assert run["conditions"]["machine"] == "a machine"
        assert run["decibels"] is None


def test_networks_are_ranked_each_alone(read: Read) -> None:
    output, _ = read["report_001"]
    text = (output / "comparison.md").read_text()
    assert text.index("## Net A") < text.index("## Net B")
    assert {f"{network} {stem}" for network in ("Net A", "Net B") for stem in DASHBOARDS} <= {
        file.name for file in output.glob("*.png")
    }
    firsts = [cells["score"] for cells in table(output, "place") if cells["place"] == "1"]
    assert firsts == ["Quantization (static) int8 (0.981)"] * 2


def test_tokens_a_second_and_bits(read: Read) -> None:
    output, record = read["report_003"]
    pruned = record["runs"][1]
    assert (pruned["rate"], pruned["original_rate"], pruned["unit"]) == (80.0, 50.0, "tokens")
    assert pruned["score"] == pytest.approx(2**-2.1)
    shown = next(cells for cells in table(output, "run") if cells["run"] == pruned["name"])
    assert shown["tokens a second"] == "80.0"
    changes = {cells[""]: cells["change"] for cells in table(output, "")}
    assert changes["tokens a second"] == "+60.0%"
    assert changes["parameters"] == "-50.0%"


def test_bit_errors_over_the_noise(read: Read) -> None:
    output, record = read["report_004"]
    students = next(curve for curve in record["curves"] if curve["title"].startswith("Students"))
    lines = {line["name"]: line["points"] for line in students["lines"]}
    assert lines["student_0.25 kept, distilled"] == [[5.0, 0.25], [15.0, pytest.approx(0.07)]]
    assert lines["exact demapper"] == [[5.0, 0.2], [15.0, 0.02]]
    bound = {cells["run"]: cells["within 1.2 times"] for cells in table(output, "run") if "within 1.2 times" in cells}
    assert {name for name, answer in bound.items() if answer == "yes"} == {
        "original",
        "structured_0.3 fine-tuned",
        "log2_4",
    }
    best = {cells["group (runs)"]: cells["size"] for cells in table(output, "group (runs)")}
    assert best["Structured pruning, fine-tuned (2)"] == "structured_0.5 fine-tuned (50.0%)"
    assert (output / "Students- bit errors.png").exists()
    assert (output / "Speed by the share of the parameters that is gone.png").exists()


@pytest.mark.parametrize("name", READING)
def test_results_that_are_missing_are_not_made_up(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reported, "RESULTS", tmp_path)
    for arguments in ([], ["--quick"]):
        monkeypatch.setattr(sys, "argv", [name, "-o", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        assert str(stopped.value) == " ".join(["not measured: run python", f"benchmarks/{name}.py", *arguments])
    assert list(tmp_path.rglob("comparison.*")) == []
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_committed_results_of_the_receiver_are_read(tmp_path: Path) -> None:
    record = written("report_004", tmp_path)
    rows = json.loads((ROOT / "docs/reports/report_004.json").read_text())["Demapper"]
    assert [run["name"] for run in record["runs"]] == list(rows)
    check_markdown(record, tmp_path)
