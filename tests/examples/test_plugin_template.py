"""The template of a plug-in as its author ships it: built, installed, found, exported from the command line, tested."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from lobo_fx.plugins.registry import PASSES

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "examples" / "plugin"
MODEL = """
import torch
from torch import nn

from lobo_fx_example import scaled_tanh


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.last(scaled_tanh(self.first(x), self.weight))


def model():
    return Model(), torch.randn(2, 6)
"""


def run(folder: Path, *command: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of Python's, with what is installed in `site`."""
    paths = [str(path) for path in (site, ROOT) if path is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = [sys.executable, "-m", *command]
    return subprocess.run(done, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template's wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")
    quietly = ("-q", "--no-deps", "--no-index", "--disable-pip-version-check")
    built = run(folder, "pip", "wheel", *quietly, "--no-build-isolation", "-w", "dist", "./source")
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    installed = run(folder, "pip", "install", *quietly, "--target", "site", str(wheel))
    assert installed.returncode == 0, installed.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def used(site: Path) -> dict[str, tuple[int, str]]:
    """What `lobo-fx passes` and some of its own tests give, in one process; by name the exit status and the output."""
    code = """\
import contextlib, io, json, sys
import pytest
from typer.testing import CliRunner
from lobo_fx.cli.app import app
listed = CliRunner().invoke(app, ["passes", "--json"])
with contextlib.redirect_stdout(io.StringIO()) as told:
    status = pytest.main(["-q", "-p", "no:cacheprovider", "tests", "-k", "settings or axis_rule or alone"])
print(json.dumps({"list": (listed.exit_code, listed.stdout), "tests": (status, told.getvalue())}))
"""
    (site.parent / "source" / "use.py").write_text(code, encoding="utf-8")
    done = run(site.parent / "source", "use", site=site)
    assert done.returncode == 0, done.stderr
    return {name: (status, told) for name, (status, told) in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.slow
def test_its_pass_is_listed_where_it_is_installed(used: dict[str, tuple[int, str]]) -> None:
    status, listed = used["list"]
    assert status == 0, listed
    assert '"fuse_scaled_tanh"' in listed
    assert "fuse_scaled_tanh" not in PASSES, "without the site there is none"


@pytest.mark.slow
def test_its_operator_is_pruned_by_its_criterion_and_exported_from_the_command_line(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    prune = "prune_channels:ratio=0.5,importance=peak"
    command = ("lobo_fx.cli", "compile", "mine.py:model", "--pass", prune, "--rounds", "1", "-o", "out")
    done = run(tmp_path, *command, site=site)
    assert done.returncode == 0, done.stderr
    weights = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    assert sum(math.prod(weight.dims) for weight in weights) == 56 + 8 + 36, "of 8 channels, not of 16"


@pytest.mark.slow
def test_a_saved_program_finds_its_operator(site: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    command = ("lobo_fx.cli", "compile", "mine.py:model", "--pass", "quantize_weights", "--rounds", "1", "-o", "first")
    first = run(tmp_path, *command, site=site)
    assert first.returncode == 0, first.stderr
    (saved,) = (tmp_path / "first" / "program").glob("*.pt2")
    again = ("lobo_fx.cli", "compile", str(saved), "--pass", "prune_weights", "--rounds", "1", "-o", "second")
    for found, code in ((site, 0), (None, 2)):
        assert run(tmp_path, *again, site=found).returncode == code


@pytest.mark.slow
def test_some_of_its_own_tests_pass(used: dict[str, tuple[int, str]]) -> None:
    status, told = used["tests"]
    assert status == 0, told
    assert " passed" in told


@pytest.mark.slow
def test_all_of_its_own_tests_pass(site: Path) -> None:
    done = run(site.parent / "source", "pytest", "-q", "-p", "no:cacheprovider", "tests", site=site)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
