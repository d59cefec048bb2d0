"""What every command has: silence, JSON, completion, help, errors; and what unknown names are answered with."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner, Result

import lobo_fx.cli
from lobo_fx.cli.app import app
from lobo_fx.cli.completion import complete_model, complete_pass, complete_plugin, complete_recipe
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import builtin_recipes, read_pass, resolve

MODEL = """\
import torch
from torch import nn


def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def inputs():
    return torch.ones(2, 4)
"""

SPACE = "passes:\n  - prune_weights: {amount: {choose: [0.25, 0.5]}}\n"

COMMANDS = {
    "benchmark": ["out/model.onnx", "--rounds", "2"],
    "compile": ["net.py:make", "--example-inputs", "net.py:inputs", "--pass", "fold_bn", "--rounds", "1", "-o", "new"],
    "costs": ["net.py:make", "--example-inputs", "net.py:inputs"],
    "inspect": ["out/model.onnx"],
    "passes": [],
    "recipes": [],
    "report": ["out"],
    "search": ["--help"],
}
"""Each with arguments that it takes (a search is tested elsewhere, in seconds)."""


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run of it."""
    place = tmp_path_factory.mktemp("commands")
    (place / "net.py").write_text(MODEL)
    (place / "space.yaml").write_text(SPACE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("lobo_fx.measures.latency.peak_memory", lambda *given: (1, 2))
        patch.setattr("lobo_fx.report.report.dashboards", lambda runs: {})
        done = call(
            *("compile", "net.py:make", "--example-inputs", "net.py:inputs", "--recipe", "balanced", "--rounds", "1")
        )
    assert done.exit_code == 0, done.output
    return place


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("lobo_fx.report.report.dashboards", lambda runs: {})  # pictures have tests of their own
    monkeypatch.setattr("lobo_fx.measures.latency.peak_memory", lambda *given: (1, 2))


@functools.cache
def shown(name: str) -> Result:
    """What a command prints at 80 columns, run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS")
        return call(name, *COMMANDS[name])


def commands() -> dict[str, Any]:
    found: Any = typer.main.get_command(app)
    return dict(found.commands)


def test_the_list_of_commands_is_whole() -> None:
    assert sorted(commands()) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_shared_options_and_help_that_is_not_cut(name: str) -> None:
    options = {option for parameter in commands()[name].params for option in parameter.opts}
    assert {"--quiet", "-q", "--verbose", "-v", "--json"} <= options
    line = next(line for line in call("--help").output.splitlines() if line.split()[:1] == [name])
    assert not line.endswith("...")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "search"])
def test_every_command_is_silent_or_prints_json_on_request(name: str) -> None:
    assert shown(name).exit_code == 0, shown(name).output
    assert shown(name).stdout.strip()
    quiet = call(name, *COMMANDS[name], "--quiet")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    data = call(name, *COMMANDS[name], "--json", "-q")
    assert data.stderr == ""
    assert json.loads(data.stdout, parse_constant=pytest.fail)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "search"])
def test_at_80_columns_nothing_is_wider_but_notes_and_paths(name: str) -> None:
    lines = shown(name).stdout.splitlines()
    assert lines
    wide = [line for line in lines if len(line) > 80]
    prefixes = ("note: ", "written to ", "lobo_fx.", "`lobo-fx")
    assert all(line.startswith(prefixes) for line in wide), wide


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, lobo_fx.cli\nfrom typer.testing import CliRunner\n"
        "assert CliRunner().invoke(lobo_fx.cli.app, ['compile', '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(lobo_fx.cli.app, ['--version']).exit_code == 0\n"
        "print([name for name in ('torch', 'numpy', 'onnx', 'onnxruntime', 'yaml', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_version_is_shown() -> None:
    assert call("--version").output == f"lobo-fx {lobo_fx.__version__}\n"


def test_errors_are_plain_text_in_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    for arguments in (["passes", "nothing"], ["compile", "net.py:make", "--rounds", "0"], ["compilr"]):
        done = call(*arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert not set(done.stderr) & set("\x1b╭│╰")


# --- passes and recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PASSES.names()))
def test_a_pass_is_shown_with_all_its_settings(name: str) -> None:
    entry = json.loads(call("passes", name, "--json").stdout)
    kind = PASSES.get(name)
    assert [setting["name"] for setting in entry["settings"]] == list(inspect.signature(kind).parameters)
    assert type(read_pass(entry["example"])) is kind
    text = " ".join(call("passes", name).stdout.split())
    for setting in entry["settings"]:
        assert setting["meaning"], setting["name"]
        assert " ".join(setting["meaning"].split()[:4]) in text


PLUGGED = """\
import dataclasses

import lobo_fx


@dataclasses.dataclass(frozen=True)
class Undescribed(lobo_fx.Pass):
    def run(self, program, context):
        return program


@dataclasses.dataclass(frozen=True)
class WrongDefault(Undescribed):
    '''Fails as it is made.'''

    amount: int = "three"
"""


def test_passes_that_fail_are_listed_with_the_reason_and_break_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lobo_fx_plugged.py").write_text(PLUGGED)
    monkeypatch.syspath_prepend(tmp_path)
    before = [entry["name"] for entry in json.loads(call("passes", "--json").stdout)["passes"]]
    values = {
        "undescribed": "lobo_fx_plugged:Undescribed",
        "wrong_default": "lobo_fx_plugged:WrongDefault",
        "not_there": "lobo_fx_plugged:NotThere",
        "no_pass": "lobo_fx_plugged:dataclasses",
        "fold_bn": "lobo_fx_plugged:Undescribed",
    }
    points = {name: [EntryPoint(name, value, PASSES.group)] for name, value in values.items()}
    points["fold_bn"] += PASSES._points["fold_bn"]
    monkeypatch.setitem(vars(PASSES), "_points", {**PASSES._points, **points})
    shown = json.loads(call("passes", "--json").stdout)
    assert sorted(entry["name"] for entry in shown["passes"]) == sorted([*before, "undescribed"])
    assert next(entry["summary"] for entry in shown["passes"] if entry["name"] == "undescribed") == "no description"
    wrong, not_there, no_pass, clash = sorted(
        shown["failures"], key=lambda text: list(values).index(text.split("'")[1])
    )
    reason = "can't be made at its defaults: amount is 'three'; it must be a whole number"
    assert wrong == f"the pass 'wrong_default' (lobo_fx_plugged:WrongDefault) {reason}"
    assert "'not_there' (lobo_fx_plugged:NotThere) can't be imported" in not_there
    assert "names no pass" in no_pass
    assert "taken by lobo-fx" in clash
    for option in ([], ["--verbose"]):
        text = " ".join(call("passes", *option).stdout.split())
        assert wrong in text
        assert "undescribed" in text
    refused = call("passes", "wrong_default")
    assert refused.exit_code == 2
    assert wrong in " ".join(refused.output.split())
    assert json.loads(call("passes", "fold-batch-norm", "--json").stdout)["name"] == "fold_batch_norm"


def test_recipes_are_listed_and_shown() -> None:
    assert [entry["name"] for entry in json.loads(call("recipes", "--json").stdout)["recipes"]] == builtin_recipes()
    shown = call("recipes", "sparse").stdout
    assert "prune_weights: {amount: 0.5}" in shown
    Path("mine.yaml").write_text(shown)
    assert resolve("mine.yaml") == resolve("sparse")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["passes", "quantise_static"], "did you mean quantize_static?"),
        (["recipes", "balancd"], "no recipe is called 'balancd'; did you mean balanced?"),
        (["compile", "m.pt2", "--recipe", "balancd"], "did you mean balanced?"),
        (["compile", "m.pt2", "--recipe", "fold_bn"], "'fold_bn' is a pass; write --pass fold_bn"),
        (["compile", "m.pt2", "--pass", "fold_bn", "--exporter", "onxn"], "no exporter is called 'onxn'; did you mean"),
        (["compile", "m.pt2", "--pass", "fold_bn", "--runtime", "onnxruntim"], "did you mean onnxruntime?"),
        (["compile", "m.pt2", "--pass", "fold_bn", "--dynamic", "btach"], "did you mean batch?"),
        (["compile", "m.pt2", "--pass", "fold_bn", "--example-inputs", "a.txt"], "'a.txt' is no data"),
        (["inspect", "torchvison:resnet18"], "did you mean torchvision?"),
        (["inspect", "net.py:make"], "Give --example-inputs"),
        (["inspect", "net.py:make", "--example-inputs", "net.py:input"], "did you mean inputs?"),
    ],
)
def test_unknown_names_are_answered_from_the_right_list(arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize("arguments", [["net.py:make", "--batch", "2"], ["out/model.onnx", "--seed", "1"]])
def test_inspect_refuses_options_that_it_would_not_use(arguments: list[str]) -> None:
    done = call("inspect", *arguments)
    assert done.exit_code == 2, done.output
    assert f"leave out {arguments[1]}" in " ".join(done.stderr.split())


# --- inputs and sizes --------------------------------------------------------------------------------------


def test_example_inputs_and_sizes_reach_the_program() -> None:
    np.savez("inputs.npz", input=np.ones((3, 4), np.float32))
    given = ["inspect", "net.py:make", "--example-inputs", "inputs.npz", "--json"]
    sizes = {
        "auto": "float32[batch, 4]",
        "none": "float32[3, 4]",
        "input:0=rows[2..64]": "float32[rows, 4]",
    }
    for dynamic, said in sizes.items():
        done = call(*given, "--dynamic", dynamic)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["inputs"] == [f"input: {said}"]
    assert json.loads(call(*given, "--dynamic", "input:0=rows[2..64]").stdout)["free"] == ["rows: from 2 to 64"]
    wrong = call(*given, "--dynamic", "inptu:0=rows")
    assert wrong.exit_code == 2
    assert "no input 'inptu'; did you mean input?" in wrong.stderr


# --- completion --------------------------------------------------------------------------------------------


def test_tab_completes_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("net.py", "old.pt2", "net.onnx", "notes.txt", "mine.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "nets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert complete_model("t") == ["torchvision:", "timm:", "transformers:"]
    assert complete_model("n") == ["net.onnx", "net.py:", "nets/"]
    assert complete_model("none/") == []
    assert {"prune_channels", "prune_weights"} <= set(complete_pass("prune_"))
    assert complete_pass("xyz") == []
    assert complete_recipe("") == [*builtin_recipes(), "mine.yaml", "nets/"]
    assert complete_plugin("RUNTIMES")("onnx") == ["onnxruntime"]
    shown = CliRunner().invoke(
        app, [], env={"_LOBO_FX_COMPLETE": "complete_bash", "COMP_WORDS": "lobo-fx passes fold_b", "COMP_CWORD": "2"},
        prog_name="lobo-fx",
    )  # fmt: skip
    assert shown.output.split() == ["fold_batch_norm", "fold_bn"]
