"""Versions that a file asks for: no more than its operators and types need, which older readers then take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnx.versions import lower_versions


def model_of(operator: str, opset: int, dtype: int = onnx.TensorProto.FLOAT, **attributes: Any) -> ir.Model:
    """A model of one operator, importing a set that nothing is taken from besides."""
    x, y = (helper.make_tensor_value_info(name, dtype, [2, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **attributes)], "g", [x], [y])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("unused", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=imports, ir_version=10))


@pytest.mark.parametrize(
    ("operator", "opset", "lowest", "ir_version"),
    [
        ("Relu", 20, 14, 7),
        ("Gelu", 23, 20, 9),
        ("Identity", 22, 21, 10),
        ("Identity", 20, 19, 9),
        ("Softmax", 18, 13, 7),
    ],
)
def test_the_set_that_defined_the_operators_is_imported(
    operator: str, opset: int, lowest: int, ir_version: int
) -> None:
    model = model_of(operator, opset)
    lower_versions(model)
    assert model.opset_imports == {"": lowest}
    assert model.ir_version == ir_version == helper.find_min_ir_version_for([helper.make_opsetid("", lowest)])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_set_that_was_asked_for_stays() -> None:
    model = model_of("Relu", 21)
    lower_versions(model, keep_opset=True)
    assert (model.opset_imports, model.ir_version) == ({"": 21}, 10)


def test_types_newer_than_the_operators_need_their_version() -> None:
    model = model_of("Custom", 13, onnx.TensorProto.INT4, domain="elsewhere")
    model.opset_imports["elsewhere"] = 1
    lower_versions(model)
    assert model.ir_version == 10


def test_a_file_asks_for_what_it_uses(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    result = lobo_fx.compile(layers, ["fold_weights"], example_inputs=torch.randn(2, 3, 8, 8), progress=False)
    content = onnx.load(result.export(tmp_path / "model.onnx").path)
    assert (content.ir_version, [entry.version for entry in content.opset_import]) == (7, [14])
    asked = onnx.load(result.export(tmp_path / "asked.onnx", OnnxExporter(opset=18)).path)
    assert (asked.ir_version, [entry.version for entry in asked.opset_import]) == (8, [18])


def test_the_original_says_that_nothing_was_done_to_it(tmp_path: Path) -> None:
    result = lobo_fx.compile(nn.Linear(4, 3), ["fold_weights"], example_inputs=torch.randn(2, 4), progress=False)
    for artifact, done in (
        (result.export_original(tmp_path / "a.onnx"), "[]"),
        (result.export(tmp_path / "b.onnx"), "fold"),
    ):
        found = {entry.key: entry.value for entry in onnx.load(artifact.path).metadata_props}
        assert done in found["lobo_fx.passes"]
        assert found["lobo_fx.model"] == "Linear"


class Counter(nn.Module):
    """Scales by how often it was called."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layer, self.used = nn.Linear(4, 3), used
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.add_(1)  # type: ignore[operator]
        return self.layer(x) * (self.calls if self.used else 1)


@pytest.mark.parametrize(("used", "second"), [(True, "differs from the model's by"), (False, "gives the same")])
def test_a_file_that_keeps_no_state_is_called_so(used: bool, second: str, tmp_path: Path) -> None:
    model = Counter(used).eval()
    result = lobo_fx.compile(model, example_inputs=torch.randn(2, 4), progress=False)
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.details["state"]["buffers"] == ["calls"]
    (note,) = [note for note in result.report.notes if "keeps no state" in note]
    assert "'calls', which forward writes" in note
    assert second in note
    assert (artifact.details["state"]["second_call"] > 0.1) == used
    assert float(model.calls) == 0.0  # type: ignore[arg-type]


def test_a_buffer_that_is_only_read_is_no_state(tmp_path: Path) -> None:
    norm = lobo_fx.compile(nn.BatchNorm1d(4).eval(), example_inputs=torch.randn(2, 4), progress=False)
    assert "state" not in norm.export(tmp_path / "model.onnx").details
    assert not norm.report.notes
