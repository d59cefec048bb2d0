"""The table of `examples/lobotomizer_table.py`, on a model small enough for a test."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import ClassVar

import lobotomizer_table as example
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Pass, Program, Promise
from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.passes import PruneWeights

INPUTS = Inputs((torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),))


TINY = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 4)
"""
BRANCHES = """
import torch

class Branches(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def make():
    return Branches(), torch.ones(2, 4)
"""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@dataclasses.dataclass(frozen=True)
class Refuse(Pass):
    """Can't be run."""

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def run(self, program: Program, context: Context) -> Program:
        raise InvalidInput("this model is\nnot for me")


def line_of(cells: list[str]) -> dict[str, str]:
    return dict(zip(example.COLUMNS, cells, strict=True))


def test_a_row_that_fails_says_why_and_the_table_goes_on(tmp_path: Path) -> None:
    pipelines: example.Pipelines = {"bad": [Refuse()], "half": [PruneWeights(0.5)]}
    (tmp_path / "tiny.py").write_text(TINY)
    lines = example.measure_model("Tiny", f"{tmp_path}/tiny.py:make", pipelines, rounds=1)
    bad, half = map(line_of, lines)
    assert (bad["Model"], bad["Forward OK"]) == ("Tiny", "FAILED")
    assert "this model is not for me" in bad["Pipeline"]
    assert bad["Ratio"] == ""
    assert (half["Pipeline"], half["Forward OK"]) == ("half", "OK")
    assert (half["Params Before"], half["Params After"]) == ("58", "58")
    assert half["Non-zero"] == str(58 - 16 - 8)
    assert half["Ratio"] == "1.00x"

    shown = example.write_table(lines, tmp_path / "new")
    written = (tmp_path / "new" / "table.md").read_text(encoding="utf-8")
    for text in (shown, written):
        assert "FAILED" in text
        assert "not for me" in text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["table.md"]


def test_the_command_writes_the_models_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(4, 8), torch.ones(2, 4)\n")
    monkeypatch.setattr(example, "MODELS", {"Tiny": f"{tmp_path}/tiny.py:make", "Other": "none.py:make"})
    monkeypatch.setattr(example, "PIPELINES", {"half": [PruneWeights(0.5)]})
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "out"), "--rounds", "1", "--models", "Tiny"])
    example.main()
    assert "Tiny" in capsys.readouterr().out
    assert "| Tiny | half |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_a_model_that_can_not_be_traced_fails_in_every_row(tmp_path: Path) -> None:
    (tmp_path / "branches.py").write_text(BRANCHES)
    lines = example.measure_model("Branches", f"{tmp_path}/branches.py:make", {"one": [], "two": []}, rounds=1)
    assert [line_of(cells)["Forward OK"] for cells in lines] == ["FAILED", "FAILED"]


@pytest.mark.parametrize(("value", "ok"), [(1.0, True), (float("nan"), False), (float("inf"), False)])
def test_outputs_that_are_not_finite_are_not_ok(value: float, ok: bool) -> None:
    result = lobo_fx.compile(network(), example_inputs=INPUTS, progress=False)
    with torch.no_grad():
        result.module.get_parameter("2.bias").fill_(value)
    assert example.forward_ok(result) is ok


def test_outputs_of_another_shape_are_not_ok() -> None:
    result = lobo_fx.compile(network(), example_inputs=INPUTS, progress=False)
    result.program = lobo_fx.compile(nn.Linear(4, 3), example_inputs=INPUTS, progress=False).program
    assert not example.forward_ok(result)


def test_the_published_rows_are_there() -> None:
    assert len(example.MODELS) == 3
    assert len(example.PIPELINES) == 7
