"""Names of inputs, outputs and free dimensions that the user chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.passes import PruneChannels

ROWS = torch.randn(3, 12)
NAMES = {"x": "image", "output_0": "scores", "output_1": "boxes", "batch": "images"}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scores, self.boxes = nn.Linear(12, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x).relu()
        return self.scores(hidden), self.boxes(hidden)


def names_of(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    values = [*graph.input, *graph.output]
    return [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in values]


def compiled(**settings: Any) -> Any:
    return lobo_fx.compile(TwoHeads().eval(), example_inputs=ROWS, progress=False, **settings)


def test_files_have_the_names_and_the_module_is_called_as_before(tmp_path: Path) -> None:
    result = compiled(passes=[PruneChannels(0.5, round_to=1)], names=NAMES)
    found = names_of(result.export(tmp_path / "model.onnx").path)
    assert found == [("image", "images"), ("scores", "images"), ("boxes", "images")]
    assert found == names_of(result.export_original(tmp_path / "original.onnx").path)
    for outputs in (result.module(ROWS), result.module(x=ROWS)):
        assert [tuple(output.shape) for output in outputs] == [(3, 3), (3, 4)]
    result.benchmark(rounds=1, warmup=1, memory=False)
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert names_of(loaded.export(tmp_path / "again.onnx").path) == found
    assert loaded.program.signature == result.program.signature
    assert names_of(compiled().export(tmp_path / "plain.onnx").path)[0] == ("x", "batch")


def test_names_may_be_given_anew() -> None:
    first = compiled(names=NAMES)
    again = lobo_fx.compile(first.program, names={"image": "picture", "boxes": "corners"}, progress=False)
    assert [spec.name for spec in again.program.signature.inputs if spec] == ["picture"]
    assert [spec.name for spec in again.program.signature.outputs if spec] == ["scores", "corners"]
    assert [spec.name for spec in first.program.signature.inputs if spec] == ["image"]


def test_two_may_change_places() -> None:
    result = compiled(names={"output_0": "output_1", "output_1": "output_0"})
    assert [spec.name for spec in result.program.signature.outputs if spec] == ["output_1", "output_0"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"output_2": "boxes"}, "no input, output or free dimension 'output_2'; did you mean output_0"),
        ({"output_0": "x"}, "two would be called 'x'"),
        ({"output_0": "a b"}, "'output_0' can't be called 'a b'"),
        ({"batch": "a.b"}, "'batch' can't be called 'a.b'"),
        ({"x": ""}, "'x' can't be called ''"),
        (["x"], "expected new names by old ones"),
        ({"x": 3}, "expected new names by old ones"),
    ],
)
def test_names_that_can_not_be_are_refused(names: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        compiled(names=names)


def test_an_input_that_is_called_output_leaves_that_name(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, output: torch.Tensor) -> torch.Tensor:
            return output + 1

    result = lobo_fx.compile(Net(), [], example_inputs=torch.randn(2, 3), progress=False)
    assert [spec.name for spec in result.program.signature.outputs if spec] == ["output_out"]
    assert result.export(tmp_path / "model.onnx").parity == 0
