"""An operator without an ONNX form is said before passes run; a broken plug-in is said, and breaks no other."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lobo_fx
from lobo_fx.cli.app import app
from lobo_fx.exporters.onnx import translations
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnx.recurrent import RECURRENT_TRANSLATIONS
from lobo_fx.plugins.registry import PASSES

MODEL = """
import torch
from torch import nn


@torch.library.custom_op("lobo_fx_untranslated::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@shift.register_fake
def _(x):
    return torch.empty_like(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return shift(self.layer(x))  # the user's line


def make():
    return Model(), torch.ones(2, 4)
"""


class Never(lobo_fx.Pass):
    """A pass that must not run."""

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        raise AssertionError("it ran")


def test_an_operator_without_an_onnx_form_is_refused_before_passes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PASSES.added, "never", Never)
    command = ["compile", "net.py:make", "--pass", "never", "-o", "out"]
    done = CliRunner().invoke(app, command)
    said = " ".join(done.output.split())
    assert done.exit_code == 2, said
    for part in ("lobo_fx_untranslated.shift.default", "the user's line", "lobo_fx.onnx_translations"):
        assert part in said
    assert not Path("out").exists()


def test_what_torch_takes_apart_is_not_refused() -> None:
    model = nn.Sequential(nn.LSTM(4, 4), _First(), nn.Hardswish(), nn.LayerNorm(4), nn.Mish(), nn.Softshrink(), _Rare())
    OnnxExporter().check_program(lobo_fx.trace(model.eval(), torch.randn(3, 2, 4)))


class _First(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0]


class _Rare(nn.Module):
    """Operators that `torch.onnx` has no functions for, but decompositions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcdiv(x, x, x.square() + 1).logaddexp(x).xlogy(x.abs() + 1).rot90(1, [0, 1])


def test_two_translations_of_one_operator_are_refused_where_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    gru, relu = torch.ops.aten.gru.input, torch.ops.aten.relu.default
    recurrent = lobo_fx.trace(nn.GRU(4, 4).eval(), torch.randn(3, 2, 4))
    plain = lobo_fx.trace(nn.ReLU(), torch.randn(3, 4))
    monkeypatch.setattr(translations, "_plugged", lambda: ({"a:A": {gru: len, relu: len}, "b:B": {relu: abs}}, []))
    with pytest.raises(lobo_fx.ExportError, match=r"gru\.input is translated by lobo-fx and by a:A; a:A must leave it"):
        translations.translation_table(None, recurrent)
    with pytest.raises(lobo_fx.ExportError, match=r"relu\.default is translated by a:A and by b:B; uninstall one"):
        translations.translation_table(None, plain)
    assert translations.translation_table({relu: max}, plain)[relu] is max
    other = lobo_fx.trace(nn.Tanh(), torch.randn(3, 4))
    assert translations.translation_table(None, other)[gru] is RECURRENT_TRANSLATIONS[gru]


def test_a_table_that_can_not_be_imported_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translations, "_plugged", lambda: ({}, ["the table 'x' (pkg:TABLE) can't be imported: no"]))
    program = lobo_fx.trace(nn.Tanh(), torch.randn(3, 4))
    with pytest.warns(UserWarning, match="can't be imported: no"):
        assert torch.ops.aten.gru.input in translations.translation_table(None, program)


def test_a_pass_that_can_not_be_imported_is_said_and_breaks_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {**PASSES._points, "broken": [EntryPoint("broken", "no_such_package:Broken", PASSES.group)]}
    monkeypatch.setitem(PASSES.__dict__, "_points", points)
    done = CliRunner().invoke(app, ["passes"])
    assert done.exit_code == 0, done.output
    assert "the pass 'broken' (no_such_package:Broken) can't be imported" in done.output
    assert "fold_batch_norm" in done.output
