"""Scores of what ships: a file called as the module, and which of two scores is the better one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.file_module import FileModule
from lobo_fx.passes import MixedPrecision, PruneWeights, QuantizeStatic

ROWS = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


class Named(nn.Module):
    """Two inputs by name, one of them left at its default; outputs in a dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        hidden = self.first(x).relu() * mask
        return {"logits": self.second(hidden), "states": (hidden, hidden.mean(1))}


def error_of(module: nn.Module, answers: torch.Tensor) -> float:
    return float((module(ROWS) - answers).detach().square().mean())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


ANSWERS = network()(ROWS).detach()


def squared_error(module: nn.Module) -> float:
    return error_of(module, ANSWERS)


def test_a_file_is_called_as_its_module(tmp_path: Path) -> None:
    model, mask = Named().eval(), torch.rand(64, 1)
    result = lobo_fx.compile(model, example_inputs={"x": ROWS[:2], "mask": mask[:2]}, progress=False)
    path = result.export(tmp_path / "model.onnx").path
    file = FileModule(OnnxRuntime().load(path, 1), result.program).eval()
    expected = model(ROWS, mask)
    for found in (file(ROWS, mask), file(mask=mask, x=ROWS), file(ROWS, mask=mask)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not list(file.parameters())
    with pytest.raises(InvalidInput, match=r"missing \['mask'\]"):
        file(ROWS)


def test_the_score_of_the_file_itself_is_in_the_report(tmp_path: Path) -> None:
    given: dict[str, Any] = {"example_inputs": ROWS[:2], "calibration_data": [ROWS], "progress": False}
    result = lobo_fx.compile(
        network(), [QuantizeStatic(kernels="all")], evaluate=squared_error, higher_is_better=False, **given
    )
    original, compiled = result.export_original(tmp_path / "original.onnx"), result.export(tmp_path / "model.onnx")
    assert original.score == pytest.approx(0, abs=1e-9)
    session = OnnxRuntime().load(compiled.path, 1)
    outputs = torch.from_numpy(session.run({session.inputs[0].name: ROWS.numpy()})[0])
    assert compiled.score == pytest.approx(-float((outputs - ANSWERS).square().mean()), rel=1e-6)
    assert compiled.score is not None
    assert compiled.score < -1e-7
    assert result.report.rows[-1].score == pytest.approx(compiled.score, rel=0.01)
    read = type(result.report).from_json(result.report.as_json())
    assert read.artifacts["compiled"].score == compiled.score
    assert "lower is better" in str(result)
    assert lobo_fx.compile(network(), **given).export(tmp_path / "other.onnx").score is None


def test_what_can_not_be_called_as_a_file_is_said_and_the_file_stays(tmp_path: Path) -> None:
    def weight_of(module: nn.Module) -> float:
        return float(next(module.parameters()).detach().sum())

    result = lobo_fx.compile(network(), example_inputs=ROWS[:2], evaluate=weight_of, progress=False)
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.path.is_file()
    assert artifact.score is None
    assert any("model.onnx was not scored" in str(note) for note in result.report.notes)


def test_what_sounds_like_a_loss_must_say_which_way_is_better() -> None:
    given: dict[str, Any] = {"example_inputs": ROWS[:2], "progress": False}
    with pytest.raises(InvalidInput, match=r"'squared_error', which sounds like a loss.*higher_is_better=False"):
        lobo_fx.compile(network(), evaluate=squared_error, **given)
    for stated in (True, False):
        result = lobo_fx.compile(
            network(), [PruneWeights(0.9)], evaluate=squared_error, higher_is_better=stated, **given
        )
        score = result.report.rows[-1].score
        assert score is not None
        assert (score > 0) is stated
    partial = functools.partial(error_of, answers=ANSWERS)  # has no name
    assert lobo_fx.compile(network(), evaluate=partial, **given).report.rows[0].score == pytest.approx(0, abs=1e-9)
    with pytest.raises(InvalidInput, match="higher_is_better is 'no'; it must be True or False"):
        lobo_fx.compile(network(), evaluate=partial, higher_is_better="no", **given)  # type: ignore[arg-type]


def test_a_budget_of_an_error_that_may_rise() -> None:
    given: dict[str, Any] = {"example_inputs": ROWS[:2], "calibration_data": [ROWS], "progress": False}
    given |= {"evaluate": squared_error, "higher_is_better": False}
    budget = MixedPrecision(drop=1e-12, quantizer=QuantizeStatic(kernels="all"))
    tight = lobo_fx.compile(network(), [budget], **given)
    loose = lobo_fx.compile(network(), [MixedPrecision(drop=1.0, quantizer=QuantizeStatic(kernels="all"))], **given)
    assert squared_error(tight.module) <= 1e-12 < squared_error(loose.module)


@pytest.mark.parametrize("score", [0.5, np.array(0.5), np.array([0.5]), np.float32(0.5), torch.tensor([[0.5]])])
def test_a_number_is_a_number_whatever_holds_it(score: Any) -> None:
    result = lobo_fx.compile(
        nn.Linear(3, 2), [], example_inputs=torch.ones(2, 3), evaluate=lambda module: score, progress=False
    )
    assert result.report.rows[0].score == 0.5
