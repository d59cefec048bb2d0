"""ONNX files as they are shown: what is in them is what onnx itself finds, and damaged or hostile ones are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner, Result

import lobo_fx
from lobo_fx.cli.app import app
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.inspection import Stored, inspect_file
from lobo_fx.exporters.onnxruntime.runtime import kernels


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ours, of which a part is quantized."""
    path = tmp_path_factory.mktemp("files") / "model.onnx"
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4))
    result = lobo_fx.compile(
        model, [lobo_fx.passes.QuantizeStatic(kernels="all")], example_inputs=torch.randn(2, 3, 8, 8),
        calibration_data=[torch.randn(8, 3, 8, 8)], progress=False,
    )  # fmt: skip
    return result.export(path).path


def stranger(path: Path, *nodes: onnx.NodeProto, stored: dict[str, object] | None = None) -> Path:
    """A file that someone else wrote."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in (stored or {}).items()],
    )
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8, producer_name="someone"), path)
    return path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_what_is_shown_is_what_onnx_finds(ours: Path) -> None:
    found, model = inspect_file(ours), onnx.load(ours)
    assert found.bytes == ours.stat().st_size
    assert {name: sum(types.values()) for name, types in found.operators.items()} == Counter(
        node.op_type for node in model.graph.node
    )
    assert found.operators["DequantizeLinear"].keys() <= {"int8", "uint8", "int32"}
    elements = Counter[str]()
    for tensor in model.graph.initializer:
        elements[str(onnx.numpy_helper.to_array(tensor).dtype)] += int(np.prod(tensor.dims))
    assert {name: entry.elements for name, entry in found.stored.items()} == elements
    assert sum(entry.bytes for entry in found.stored.values()) < found.bytes
    assert found.inputs == ("input: float32[batch, 3, 8, 8]",)
    assert found.metadata["lobo_fx.version"] == lobo_fx.__version__
    assert "quantize_static" in found.metadata["lobo_fx.passes"]
    assert found.not_run == ""


def test_kernels_are_those_that_onnx_runtime_runs_longest_first(ours: Path) -> None:
    found = inspect_file(ours).kernels
    counts = Counter[str]()
    for kernel in found:
        counts[kernel.name] += kernel.count
    assert counts == kernels(ours)
    times = [kernel.microseconds for kernel in found]
    assert times == sorted(times, reverse=True)
    assert next(kernel.type for kernel in found if kernel.name == "QLinearConv") in ("uint8", "int8")


def test_weights_in_a_file_beside_count_too(tmp_path: Path, ours: Path) -> None:
    onnx.save(onnx.load(ours), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    found = inspect_file(tmp_path / "m.onnx")
    assert found.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert found.stored == inspect_file(ours).stored
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InvalidInput, match=r"has its weights in 'w\.bin', which is not beside it"):
        inspect_file(tmp_path / "m.onnx")


def test_a_file_that_onnx_runtime_can_not_run_is_shown_all_the_same(tmp_path: Path) -> None:
    made = helper.make_node("Odd", ["x", "w"], ["y"], domain="com.example")
    path = stranger(tmp_path / "x.onnx", made, stored={"w": np.ones((2, 3), np.float16)})
    found = inspect_file(path)
    assert found.operators == {"com.example.Odd": {"float32": 1}}
    assert found.stored == {"float16": Stored(1, 6, 12)}
    assert found.kernels == ()
    assert found.not_run.startswith("not run: ONNX Runtime can't load")
    done = call(str(path))
    assert done.exit_code == 0
    assert "written by someone" in done.output
    assert "note: not run" in done.output


def test_a_small_file_of_an_unknown_shape_and_names_like_lines_read_well(tmp_path: Path) -> None:
    path = stranger(tmp_path / "x.onnx", helper.make_node("Relu", ["x"], ["y"]))
    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = "by", "me\nnote: all is well"
    onnx.save(model, path)
    found = inspect_file(path)
    assert found.outputs == ("y: float32 of a shape that is not said",)
    lines = found.to_text().splitlines()
    assert lines[0].startswith(f"{path}: {path.stat().st_size / 1e6:.3g} MB, ")
    assert "by: me note: all is well" in lines
    assert "weights" not in lines, "it has none"


def test_inputs_are_made_up_or_given(tmp_path: Path) -> None:
    made = helper.make_node("Reshape", ["x", "s"], ["y"])
    path = stranger(tmp_path / "x.onnx", made, stored={"s": np.array([6, -1])})
    assert "--example-inputs gives others" in inspect_file(path).not_run
    assert inspect_file(path, {"x": np.ones((3, 4), np.float32)}).not_run == ""
    assert inspect_file(path, batch=3).not_run == ""
    assert "the inputs given lack 'x'" in inspect_file(path, {"z": np.ones(3)}).not_run
    np.savez(tmp_path / "x.npz", x=np.ones((3, 4), np.float32))
    found = json.loads(call(str(path), "--example-inputs", str(tmp_path / "x.npz"), "--json").stdout)
    assert [kernel["name"] for kernel in found["kernels"]] == ["Reshape"]
    assert found["inputs"] == ["x: float32[n, 4]"]


def test_inputs_that_no_memory_holds_are_not_made_up(tmp_path: Path) -> None:
    path = stranger(tmp_path / "x.onnx", helper.make_node("Relu", ["x"], ["y"]))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**40
    onnx.save(model, path)
    assert "its inputs would take 8,796.1 GB" in inspect_file(path).not_run


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"hello", "damaged, or no ONNX file"), (b"\x08\x08", "it holds no graph"), (None, "no file")],
)
def test_what_is_no_file_of_onnx_is_refused_in_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "x.onnx").write_bytes(content)
    done = call(str(tmp_path / "x.onnx"))
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_way_of_cutting_a_file_off_gives_one_error_or_a_note(tmp_path: Path, ours: Path) -> None:
    whole = ours.read_bytes()
    for at in np.random.default_rng(0).integers(1, len(whole), 20):
        (tmp_path / "x.onnx").write_bytes(whole[:at])
        done = call(str(tmp_path / "x.onnx"), "--json")
        assert done.exit_code in (0, 2), done.output
        assert done.exit_code == 2 or json.loads(done.stdout)["not_run"]


@pytest.mark.parametrize("place", ["../w.bin", "/etc/passwd", "inner/w.bin"])
def test_weights_from_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    path = stranger(tmp_path / "x.onnx", helper.make_node("Add", ["x", "w"], ["y"]), stored={"w": np.float32(1)})
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput, match="outside of its folder; refused"):
        inspect_file(path)


@pytest.mark.parametrize("inside", [False, True], ids=["constant", "constant in a branch"])
def test_constants_from_elsewhere_are_refused(tmp_path: Path, inside: bool) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], name="w", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../evil.bin")
    made = helper.make_node("Constant", [], ["w"], value=tensor)
    if inside:
        branch = helper.make_graph([made], "branch", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])])
        made = helper.make_node("If", ["x"], ["w"], then_branch=branch, else_branch=branch)
    path = stranger(tmp_path / "x.onnx", helper.make_node("Relu", ["x"], ["y"]))
    model = onnx.load(path)
    model.graph.node.insert(0, made)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidInput, match=r"'\.\./evil\.bin', outside of its folder; refused"):
        inspect_file(path)


def test_names_in_a_file_are_no_terminal_codes(tmp_path: Path) -> None:
    path = stranger(tmp_path / "x.onnx", helper.make_node("Relu", ["x"], ["y"]))
    model = onnx.load(path)
    model.producer_name = "a\x1b[2Jb"
    model.metadata_props.add(key="k\x1b", value="v\x07")
    onnx.save(model, path)
    done = call(str(path), "-v")
    assert not set("\x1b\x07") & set(done.output)
    assert "written by a[2Jb" in done.output


def test_options_that_say_nothing_of_a_file_are_refused(ours: Path) -> None:
    done = call(str(ours), "--outputs", "y")
    assert done.exit_code == 2
    assert "an ONNX file is shown as it is" in done.stderr


def test_a_file_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lobo_fx.measures.latency.peak_memory", lambda *given: (1, 2))
    stored = {"w": np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)}
    stranger(tmp_path / "x.onnx", helper.make_node("MatMul", ["x", "w"], ["y"], name="head"), stored=dict(stored))
    done = CliRunner().invoke(app, ["compile", "x.onnx", "--pass", "prune_weights", "--rounds", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["nonzero"] for row in found["passes"]] == [256, 128]
    assert not any("random" in note["reason"] for note in found["notes"])
    kept = onnx.numpy_helper.to_array(onnx.load("out/original.onnx").graph.initializer[0])
    np.testing.assert_array_equal(np.sort(kept, None), np.sort(stored["w"], None))
    refused = CliRunner().invoke(app, ["compile", "x.onnx", "--pass", "fold_bn", "--checkpoint", "x.onnx"])
    assert refused.exit_code == 2
    assert "holds its own weights" in refused.stderr
