"""Every report runs in its short form, goes on where it stopped, and leaves its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"report_001": ("LeNet-5", 15), "report_003": ("Decoder", 5), "report_004": ("Demapper", 5)}
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
    rows = record["networks"][network]
    assert len(rows) == count
    assert record["machine"]
    assert all(row["bytes"] > 0 and row["ms"] > 0 for row in rows.values())
    table = output.with_suffix(".md").read_text()
    assert table.count("\n| ") >= count
    stopped = dict(list(rows.items())[:-1])
    output.write_text(json.dumps(record | {"networks": {network: stopped}}))
    said = run(name, output, tmp_path)
    assert sum(line.startswith(f"{network}, ") for line in said.splitlines()) == 1
    assert json.loads(output.read_text())["networks"][network].keys() == rows.keys()
