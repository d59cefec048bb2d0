"""Every report runs in its short form, goes on where it stopped, and leaves its tables."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lobo_fx import passes

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"report_001": ("LeNet-5", 21), "report_003": ("Decoder", 5), "report_004": ("Demapper", 5)}
ROWS["trained_weights"] = ("R-Net", 22)
PACKAGES = {"trained_weights": ("rdkit", "skimage", "facenet_pytorch", "rxnmapper")}
"""What a report needs beside the extra `test`."""


def run(name: str, output: Path, cache: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--threads", "1"]
    command += ["--output", str(output), "--cache", str(cache)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_report_runs_and_goes_on_where_it_stopped(name: str, tmp_path: Path) -> None:
    for package in PACKAGES.get(name, ()):
        pytest.importorskip(package)
    output = tmp_path / "report.json"
    run(name, output, tmp_path)
    record = json.loads(output.read_text())
    network, count = ROWS[name]
    rows = record[network]
    assert len(rows) == count
    assert all(row["bytes"] > 0 and row["ms"] > 0 and row["machine"] for row in rows.values())
    table = output.with_suffix(".md").read_text()
    assert table.count("\n| ") >= count
    stopped = dict(list(rows.items())[:-1])
    output.write_text(json.dumps(record | {network: stopped}))
    said = run(name, output, tmp_path)
    assert sum(line.startswith(f"{network}, ") for line in said.splitlines()) == 1
    assert json.loads(output.read_text())[network].keys() == rows.keys()


@pytest.fixture
def report_004(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("report_004")


def test_a_row_of_other_settings_is_measured_again(report_004: Any, tmp_path: Path) -> None:
    variant, ran, original = report_004.Variant, [], nn.Linear(2, 2)

    def run(variant: Any) -> dict[str, float]:
        ran.append(variant.key)
        return {"seconds": 1.0}

    def measured(epochs: int, settings: str = "") -> list[str]:
        ran.clear()
        rows = [
            variant("original", ""),
            variant("tuned", "50%", [passes.PruneChannels(0.5), passes.FineTune(epochs=epochs)]),
            variant("peer", "50%", [], settings=settings),
        ]
        report_004.Results(tmp_path / "report.json").measure("net", rows, run, original)
        return list(ran)

    assert measured(2) == ["original", "tuned 50%", "peer 50%"]
    assert measured(2) == []
    assert measured(3) == ["tuned 50%"]
    assert measured(3, "one epoch with a penalty") == ["peer 50%"]
    record = json.loads((tmp_path / "report.json").read_text())
    for row in record["net"].values():  # as rows were kept before settings were
        del row["settings"]
    record["net"]["peer 50%"].pop("weights")
    (tmp_path / "report.json").write_text(json.dumps(record))
    assert measured(3) == []
    original = nn.Linear(2, 2)
    with pytest.raises(SystemExit, match="net was trained anew since its rows were measured"):
        measured(3)


def test_rows_of_two_machines_stand_in_two_tables(report_004: Any, tmp_path: Path) -> None:
    results = report_004.Results(tmp_path / "report.json")
    results.rows["net"] = {name: {"seconds": 1800.0, "machine": machine} for name, machine in (("a", "X"), ("b", "Y"))}
    text = results.write_markdown("Title", {"row": lambda key, row: key})
    assert text.startswith("# Title\n\nTraining and compiling took 1.0 hours.\n")
    assert text.index("## net, on X") < text.index("| a |") < text.index("## net, on Y") < text.index("| b |")


def test_networks_are_named_all_or_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parser = argparse.ArgumentParser()
    importlib.import_module("command_line").add_networks(parser, ("ResNet-50", "LeNet-5"))
    assert parser.parse_args([]).networks == []
    assert parser.parse_args(["LeNet-5"]).networks == ["LeNet-5"]
    for name, words in (("resnet", "did you mean ResNet-50?"), ("vgg", "known: LeNet-5, ResNet-50")):
        with pytest.raises(SystemExit):
            parser.parse_args([name])
        assert f"no network is called '{name}'; {words}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["goal", "latency_model", "report_001"])
def test_a_benchmark_starts_without_names(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    output = tmp_path / "rows.json"
    output.write_text(json.dumps({"networks": {"of an earlier version": 1}}))
    monkeypatch.setattr("sys.argv", [name, "--output", str(output)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # those of this process stay
    with pytest.raises(SystemExit, match=f"{output}.*another --output"):  # read once the arguments are
        importlib.import_module(name).main()


def test_the_rows_of_the_receiver_are_those_that_its_report_asks_for(report_004: Any) -> None:
    rows = json.loads((ROOT / "docs/reports/report_004.json").read_text())["Demapper"]
    wanted = report_004.variants({"epochs": report_004.EPOCHS})
    assert {row.key: row.recipe["passes"] for row in wanted} == {key: row["passes"] for key, row in rows.items()}
