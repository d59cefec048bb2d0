"""The benchmarks' OpenVINO runtime computes what ONNX Runtime does; skipped without the extra `nncf`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime

pytest.importorskip("openvino")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    return importlib.import_module("openvino_runtime").OpenVino()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.convolution(x) + shift
        return x.relu(), x.mean((2, 3))


def test_outputs_and_inputs_are_those_of_onnx_runtime(runtime: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "x": generator.standard_normal((2, 3, 8, 8)).astype(np.float32),
        "shift": generator.standard_normal((2, 8, 1, 1)).astype(np.float32),
    }
    example = tuple(torch.from_numpy(array) for array in arrays.values())
    result = lobo_fx.compile(Net(), [], example_inputs=example, progress=False)
    path = result.export(tmp_path / "net.onnx").path
    ours, theirs = runtime.load(path, 1), OnnxRuntime().load(path, 1)
    assert ours.inputs == theirs.inputs
    expected = theirs.run(arrays)
    found = ours.run({**arrays, "unknown": np.zeros(1)})
    ours.run({name: -array for name, array in arrays.items()})  # results are copies
    assert len(found) == len(expected) == 2
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[0], ours.run({**arrays, "shift": -arrays["shift"]})[0], atol=1e-2)
