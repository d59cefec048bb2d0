"""Constants near zero and one stay in a file; those that are exactly that go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime


class Computes(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def exported(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, path: Path) -> onnx.ModelProto:
    """The file, after its outputs were compared with PyTorch's, bit for bit."""
    model = Computes(function)
    lobo_fx.compile(model, [], example_inputs=x, progress=False).export(path)
    (found,) = OnnxRuntime().load(path, 1).run({"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-6, atol=0)
    return onnx.load(path)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.log(x + 1e-10),
        lambda x: 1 / (x - 1e-9),
        lambda x: (x * 1.000001 - x) * 1e6,
        lambda x: (x / 1.000001 - x) * 1e6,
        lambda x: torch.rsqrt(1e-12 + x),
    ],
)
def test_a_small_number_added_stays(function: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    exported(function, torch.tensor([[0.0, 0.0, 3.0], [1.0, 0.0, 2.0]]), tmp_path / "model.onnx")


@pytest.mark.parametrize("function", [lambda x: x + 0.0, lambda x: x * 1.0, lambda x: x - 0.0, lambda x: x / 1.0])
def test_what_changes_nothing_goes(function: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    model = exported(lambda x: function(x.sin()).cos(), torch.rand(2, 3), tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Sin", "Cos"]
