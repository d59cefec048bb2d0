"""`lobo-fx search`: what it writes, what it refuses, and three processes of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from optuna import Study
from typer.testing import CliRunner, Result

from lobo_fx.cli.app import app
from lobo_fx.recipe import resolve
from lobo_fx.studies.storage import open_study
from lobo_fx.studies.trials import Ledger

MODEL = """\
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4)


def score(module):
    with torch.no_grad():
        return -float(module(torch.ones(3, 4)).abs().sum())
"""
SPACE = """\
passes:
  - prune_weights: {amount: {from: 0.1, to: 0.9}}
  - optional: fold_bn
"""
QUICK = ("--space", "space.yaml", "--rounds", "1")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    return "net.py:make"


def search(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["search", *arguments])


def opened(storage: Path | str, objectives: int = 2) -> Study:
    return open_study("search", storage, ["maximize"] if objectives == 1 else ["maximize", "minimize"])


def test_search_writes_the_front_and_recipes_and_goes_on_by_itself(model: str) -> None:
    given = (model, *QUICK, "--evaluate", "net.py:score", "--objective", "score", "-o", "made")
    done = search(*given, "--trials", "1")
    assert done.exit_code == 0, done.output
    assert "1 trials: 1 measured" in done.output
    saved = json.loads(Path("made/front.json").read_text())
    assert saved["model"] == model
    (point,) = saved["points"]
    assert resolve(Path("made") / point["file"])[0].settings == {"amount": point["choices"]["prune_weights.amount"]}
    assert {path.name for path in Path("made").iterdir()} == {
        "front.json",
        "front.md",
        "study.journal",
        point["file"],
    }
    assert search(*given, "--trials", "1").exit_code == 0
    assert len(opened(Path("made/study.journal"), 1).trials) == 1
    refused = search(*given, "--trials", "2", "--seed", "1")
    assert refused.exit_code == 2
    assert "is of another seed: '0' there, '1' here" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--space", "none.yaml"), "no space file none.yaml"),
        (("--space", "net.py"), "net.py:5: not YAML"),
        ((*QUICK, "--objective", "speed"), "no objective is called 'speed'"),
        ((*QUICK, "--objective", "score"), "'score' needs evaluate="),
        ((*QUICK, "--calibration-data", "none.npz"), "no file none.npz"),
        ((*QUICK, "--storage", "postgresql://me:secret@localhost:1/db"), "postgresql://me:***@localhost:1/db"),
        ((*QUICK, "-o", "net.py/out"), "net.py is a file"),
    ],
)
def test_wrong_arguments_are_refused(model: str, arguments: tuple[str, ...], message: str) -> None:
    done = search(model, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "secret" not in done.output
    assert not list(Path().rglob("front.json"))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["study.journal", "sqlite:///study.db"])
def test_of_three_processes_one_is_killed_in_the_middle_of_a_trial(model: str, storage: str) -> None:
    total = 9
    command = [sys.executable, "-m", "lobo_fx.cli", "search", model, *QUICK, "--storage", storage]
    command += ["--trials", str(total), "--lease", "6", "--calibration-data", "data.npy"]
    np.save("data.npy", np.ones((8, 4), dtype=np.float32))
    processes = [
        subprocess.Popen([*command, "-o", f"out{number}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for number in range(3)
    ]
    victim, until = processes[1], time.monotonic() + 120

    def runs_one_that_it_drew() -> bool:
        if not any(Path().glob("study.*")):
            return False
        trials = opened(storage).get_trials()
        return any(
            trial.user_attrs.get("owner", "").endswith(f":{victim.pid}")
            and trial.state.name == "RUNNING"
            and "prune_weights.amount" in trial.params
            for trial in trials
        )

    while not runs_one_that_it_drew():
        assert time.monotonic() < until
        assert victim.poll() is None
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 0], errors
    trials = opened(storage).get_trials()
    ledger = Ledger(trials)
    assert (len(ledger.done), ledger.ended, len(ledger.roots)) == (total, total, total)
    (killed,) = [t for t in trials if t.user_attrs.get("owner", "").endswith(f":{victim.pid}") and t.values is None]
    again = trials[ledger.first[killed.number]]
    assert again.params["prune_weights.amount"] == killed.params["prune_weights.amount"]
    fronts = [json.loads(Path(f"out{number}/front.json").read_text()) for number in (0, 2)]
    assert fronts[0] == fronts[1]
    assert fronts[0]["trials"] == total
    assert not Path("out1/front.json").exists()
