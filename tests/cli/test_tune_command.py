"""`lobo-fx compile --tune`, and `lobo-fx benchmark` of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lobo_fx.cli.app import app
from lobo_fx.measures.in_turn import Comparison, Stand

MODEL = """\
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4)
"""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def without_arena(monkeypatch: pytest.MonkeyPatch) -> list[Stand]:
    """Files without an arena are the faster ones; where files are compared."""
    stands: list[Stand] = []

    def compare(self: Stand, before: Path, after: Path, rounds: int, limit: float = 0.0) -> Comparison:
        stands.append(self)
        old, new = ("arena" in path.with_name(f"{path.name}.session.json").read_text() for path in (before, after))
        return Comparison((0.5 if new and not old else 1.0,))

    monkeypatch.setattr(Stand, "compare", compare)
    return stands


def test_a_file_is_tuned_measured_with_its_options_and_tuned_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_arena: list[Stand]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lobo_fx.measures.latency.peak_memory", lambda *given: (1, 2))
    monkeypatch.setattr("lobo_fx.report.report.dashboards", lambda runs: {})
    (tmp_path / "net.py").write_text(MODEL)
    given = ["compile", "net.py:make", "--pass", "fold_weights", "--rounds", "2", "-o", "out"]
    done = run(*given, "--tune", "--batch", "3")
    assert done.exit_code == 0, done.output
    assert "model.onnx tuned: it takes 0.50 times as long as untuned; kept: no arena (0.50)" in done.output
    assert all(stand.on_one_thread and len(next(iter(stand.arrays.values()))) == 3 for stand in without_arena)
    options = tmp_path / "out" / "model.onnx.session.json"
    assert json.loads(options.read_text())["options"] == {"enable_cpu_mem_arena": False}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["artifacts"]["compiled"]["details"]["tuning"]["kept"] == ["no arena"]
    assert "tuning" not in report["artifacts"]["original"]["details"]

    files = ["benchmark", "out/original.onnx", "out/model.onnx", "--rounds", "2"]
    done = run(*files)
    note = "note: model.onnx ran with the options beside it, on 1 thread(s): enable_cpu_mem_arena=False\n"
    assert done.output.endswith(note)
    assert "original.onnx ran with" not in done.output
    done = run(*files, "--json")
    found = json.loads(done.stdout)
    assert found["latencies"].keys() == {"original.onnx", "model.onnx"}
    assert f"note: {found['notes'][0]}\n" == note
    assert done.stderr == ""

    saved = options.read_text()
    options.write_text(saved.replace('"format": 1', '"format": 7'))
    done = run(*files)
    assert done.exit_code == 2
    assert "model.onnx.session.json has format 7; this version reads format 1. Without that file," in done.stderr
    options.write_text(saved.replace('"model": "', '"model": "x'))
    assert "ran with" not in run(*files).output, "the options of another file"

    assert run(*given, "--tune", "--threads", "2").exit_code == 0
    assert not without_arena[-1].on_one_thread
    threads = {"intra_op_num_threads": 2, "enable_cpu_mem_arena": False}
    assert json.loads(options.read_text())["options"] == threads
