"""Node data for Model Explorer: about nodes that the file has, each byte once; what was not measured has no entry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.passes import FoldBatchNorm, QuantizeStatic, QuantizeWeights
from lobo_fx.report.records import SENSITIVITY, Sheet

IMAGES = torch.randn(2, 3, 16, 16)


def network() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)).eval()


def compiled(*passes: Any) -> lobo_fx.Result:
    return lobo_fx.compile(
        network(), list(passes), example_inputs=IMAGES, calibration_data=[IMAGES], progress=False
    )  # fmt: skip


def values(file: Path) -> dict[str, Any]:
    (graph,) = json.loads(file.read_text(encoding="utf-8")).values()
    return {name: result["value"] for name, result in graph["results"].items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[lobo_fx.Result, Path]:
    folder = tmp_path_factory.mktemp("node_data")
    result = compiled(FoldBatchNorm(), QuantizeStatic(kernels="all"))
    result.export_original(folder / "original.onnx")
    result.export(folder / "compiled.onnx", confirm=False)
    files = result.save_node_data(folder / "data", rounds=1)
    assert {file.name for file in files} == {
        f"{label}.{name}.json" for label in ("original", "compiled") for name in ("microseconds", "bytes", "precision")
    }
    return result, folder


@pytest.mark.parametrize("label", ["original", "compiled"])
def test_every_entry_is_about_a_node_of_the_file(label: str, written: tuple[lobo_fx.Result, Path]) -> None:
    graph = onnx.load(written[1] / f"{label}.onnx").graph
    names = {node.name for node in graph.node}
    for name in ("microseconds", "bytes", "precision"):
        file = written[1] / "data" / f"{label}.{name}.json"
        assert list(json.loads(file.read_text())) == [graph.name]
        assert set(values(file)) <= names
    stored = sum(
        math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in graph.initializer
    )
    assert sum(values(written[1] / "data" / f"{label}.bytes.json").values()) == stored
    times = values(written[1] / "data" / f"{label}.microseconds.json")
    assert {"0.0/Conv", "0.3/Conv", "3/Gemm"} <= times.keys()
    assert all(time > 0 for time in times.values())


def test_precisions_are_what_nodes_compute_in(written: tuple[lobo_fx.Result, Path], tmp_path: Path) -> None:
    layers = ("0.0/Conv", "0.3/Conv", "3/Gemm")
    precisions = {label: values(written[1] / "data" / f"{label}.precision.json") for label in ("original", "compiled")}
    assert [precisions["original"][layer] for layer in layers] == ["float32"] * 3
    assert [precisions["compiled"][layer] for layer in layers] == ["int8"] * 3
    stored = compiled(QuantizeWeights("int4", block_size=16, compute="float32"))
    stored.save_node_data(tmp_path, rounds=1)
    assert values(tmp_path / "compiled.precision.json")["0.3/Conv"] == "float32, int4"


def test_times_of_modules_are_those_of_their_nodes(written: tuple[lobo_fx.Result, Path]) -> None:
    times = values(written[1] / "data" / "compiled.microseconds.json")
    rows = {row.name: row.after for row in written[0].report.modules}
    for name in ("0", "0.0", "0.3", "3"):
        inside = [time for node, time in times.items() if node.startswith((f"{name}/", f"{name}."))]
        figures = rows[name]
        assert figures is not None
        assert figures.microseconds == pytest.approx(sum(inside))
    whole = rows[""]
    assert whole is not None
    assert whole.microseconds is not None
    assert whole.microseconds >= sum(times.values()) - 1e-6


def test_decibels_are_given_where_a_pass_measured_them_alone(tmp_path: Path) -> None:
    result = compiled(FoldBatchNorm())
    assert result.pipeline is not None
    rows = (("0.3", 31.5, "int8"), ("0.1", 40.0, "float"))
    result.pipeline.context.sheets.append(Sheet(SENSITIVITY, ("layer", "SNR alone, dB", "precision"), rows))
    result.report.modules = result.pipeline.modules()
    result.save_node_data(tmp_path, rounds=1)
    assert values(tmp_path / "compiled.decibels.json") == {"0.3/Conv": 31.5}
    assert not (tmp_path / "original.decibels.json").exists()


def test_a_loaded_result_writes_what_it_has(written: tuple[lobo_fx.Result, Path], tmp_path: Path) -> None:
    written[0].save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert loaded.report.modules == written[0].report.modules
    loaded.report.artifacts.clear()
    files = loaded.save_node_data(tmp_path / "data", rounds=1)
    assert {file.name.partition(".")[0] for file in files} == {"compiled"}
    assert loaded.report.modules[0].before == written[0].report.modules[0].before


def test_rounds_and_folder_are_checked_before_any_work(tmp_path: Path) -> None:
    result = compiled()
    with pytest.raises(InvalidInput, match="rounds"):
        result.save_node_data(tmp_path, rounds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="file is a file"):
        result.save_node_data(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
