"""Files for other CPUs: their sums of integer products are exact in a check, and the user is told of this CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import QuantizeDynamic, QuantizeStatic

Arrays = dict[str, np.ndarray[Any, Any]]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 24, batch_first=True, bidirectional=True), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.lstm(x)[0])


def large(model: nn.Module) -> nn.Module:
    """Gives every weight the largest magnitude, so that sums of two products saturate at 16 bits."""
    for parameter in model.parameters():
        parameter.data.sign_().mul_(0.2)
    return model.eval()


CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 5))
FILES = {
    "seven bits": (CONVOLUTIONS, QuantizeStatic(kernels="all", target="x86-avx2"), (6, 3, 8, 8)),
    "static": (CONVOLUTIONS, QuantizeStatic(kernels="all", target="x86-vnni"), (6, 3, 8, 8)),
    "arm": (CONVOLUTIONS, QuantizeStatic(kernels="all", target="arm"), (6, 3, 8, 8)),
    "dynamic": (nn.Sequential(nn.Linear(64, 8), nn.Sigmoid()), QuantizeDynamic("x86-vnni"), (6, 64)),
    "recurrent": (Recurrent(), QuantizeDynamic("x86-vnni"), (2, 5, 16)),
}


def compiled(kind: str) -> tuple[lobo_fx.Result, torch.Tensor]:
    torch.manual_seed(0)
    model, pass_, shape = FILES[kind]
    x = torch.rand(shape)
    return lobo_fx.compile(large(model), [pass_], example_inputs=x, calibration_data=[x], progress=False), x


@pytest.mark.parametrize("kind", FILES)
def test_sums_are_exact_on_every_cpu(kind: str, tmp_path: Path) -> None:
    result, x = compiled(kind)
    path = tmp_path / "model.onnx"
    OnnxExporter(compare=False).export(result.program, path, {})
    session = OnnxRuntime().load_exact(path)
    (found,) = session.run({session.inputs[0].name: x.numpy()})
    assert signal_to_noise(result.module(x), torch.from_numpy(found)) > 100


@dataclasses.dataclass
class Saturating:
    """A session as on a CPU whose sums saturate: outputs that are wrong by a tenth."""

    session: Any

    def run(self, arrays: Arrays) -> list[np.ndarray[Any, Any]]:
        outputs: list[np.ndarray[Any, Any]] = self.session.run(arrays)
        return [0.9 * output for output in outputs]


@pytest.mark.parametrize("saturates", [True, False])
def test_a_file_for_another_cpu_is_checked_with_exact_sums(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = compiled("seven bits")  # right on every CPU
    monkeypatch.setattr("lobo_fx.exporters.onnx.exporter.products_saturate", lambda: saturates)
    load = OnnxRuntime.load
    monkeypatch.setattr(OnnxRuntime, "load", lambda *given, **named: Saturating(load(*given, **named)))
    if saturates:
        artifact = result.export(tmp_path / "model.onnx", confirm=False)
        assert artifact.details["saturated"] == pytest.approx(20, abs=0.1)
        assert artifact.parity < 1e-3
        assert any("the file agrees with PyTorch to 20.0 dB here" in note for note in result.report.notes)
        result.save_card(tmp_path)
        sample = np.load(tmp_path / "sample.npz")
        x = torch.from_numpy(sample["input:input"])
        assert signal_to_noise(result.module(x), torch.from_numpy(sample["output:output"])) > 60
    else:
        with pytest.raises(lobo_fx.ExportError, match=r"agree with PyTorch's to 20\.0 dB"):
            result.export(tmp_path / "model.onnx", confirm=False)
        assert not list(tmp_path.iterdir())
