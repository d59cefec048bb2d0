"""Packed weights: the bits that ONNX Runtime and the reference evaluator decode are those that were packed."""

from __future__ import annotations

import functools
import math
import resource
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import lobo_fx
from lobo_fx import ExportError, InvalidInput, Result
from lobo_fx.exporters.onnx import exporter, packing
from lobo_fx.exporters.onnx.codes import mark_codes
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnx.packing import PackedWeight, pack
from lobo_fx.exporters.onnxruntime.runtime import kernels
from lobo_fx.graph.program import Program
from lobo_fx.own_operators import formats
from lobo_fx.passes import PruneWeights, QuantizeDynamic, QuantizeStatic, QuantizeWeights

Array = npt.NDArray[Any]
ROWS = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
NOT_COMPARED = OnnxExporter(compare=False)
"""For files that packed ones, which are compared with PyTorch, are compared with."""
DECODERS = {"Gather", "CumSum", "GatherElements", "Slice", "Mod"}


class GatherElements(OpRun):
    """The reference evaluator's own takes no more than 64 elements."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        return (np.take_along_axis(data, indices, axis),)


def file_of(array: Array, bits: int = 8, zero_point: Array | None = None, block_size: int = 0) -> ir.Model:
    """A file that gives a stored tensor back."""
    arrays = {"w": array} if zero_point is None else {"w": array, "z": zero_point}
    values = [ir.Value(name=name, const_value=ir.tensor(held, name=name)) for name, held in arrays.items()]
    nodes = [ir.node("Identity", [value]) for value in values]
    for node, (name, held) in zip(nodes, arrays.items(), strict=True):
        (output,) = node.outputs
        output.name, output.shape = f"{name}_out", ir.Shape(held.shape)
        output.dtype = ir.DataType.from_numpy(held.dtype)
    if bits < 8:
        mark_codes(values[0], bits, block_size, *values[1:])
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 13}, name="g")
    return ir.Model(graph, ir_version=8)


def decoded(model: ir.Model) -> tuple[Array, Array]:
    """The tensor as ONNX Runtime and as the reference evaluator give it."""
    content = ir.to_proto(model)
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = ReferenceEvaluator(content, new_ops=[GatherElements])
    return np.asarray(session.run(["w_out"], {})[0]), np.asarray(*reference.run(["w_out"], {}))


def stored(model: ir.Model, name: str) -> Array:
    held = model.graph.initializers[name].const_value
    assert held is not None
    return np.asarray(held.numpy())


def by_hand(model: ir.Model, array: Array) -> Array:
    """A masked tensor from what the file holds, without the file's nodes."""
    mask = np.unpackbits(stored(model, "w_mask"), bitorder="little")[: array.size].astype(bool)
    values = stored(model, "w_values")
    flat = np.full(array.size, values[0], array.dtype)
    flat[mask] = values[1:]
    return flat.reshape(array.shape)


SHAPES = st.sampled_from([(20000,), (8191,), (77, 101), (9, 31, 3, 13), (3, 4001)])


@settings(max_examples=12, deadline=None)
@given(SHAPES, st.sampled_from(["f4", "i1", "u1"]), st.sampled_from([0, 0.3, 0.5, 0.9, 1]), st.integers(0, 99))
def test_the_decoded_bits_are_those_that_were_stored(shape: Any, dtype: str, sparsity: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    array = random.integers(1, 100, shape).astype(dtype) if dtype != "f4" else random.standard_normal(shape, "f4")
    array[random.random(shape) < sparsity] = 0
    model = file_of(array)
    packed = pack(model)
    saved = array.itemsize * (np.count_nonzero(array == 0) - 1) - math.ceil(array.size / 8)
    assert bool(packed) == (saved > 700 + packing.SHARED_BYTES)
    if packed:
        assert by_hand(model, array).tobytes() == array.tobytes()
        assert len(stored(model, "w_mask")) == math.ceil(array.size / 8)
        assert stored(model, "w_values").size == np.count_nonzero(array) + 1
    for found in decoded(model):
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_another_mask_or_value_decodes_to_another_tensor() -> None:
    array = np.where(np.arange(20000) % 3, 0, np.arange(20000)).astype("f4")
    for name in ("w_mask", "w_values"):
        model = file_of(array)
        pack(model)
        model.graph.initializers[name].const_value = ir.tensor(np.roll(stored(model, name), 1), name=name)
        assert all(found.tobytes() != array.tobytes() for found in decoded(model))


def test_numbers_that_equal_zero_or_nothing_keep_their_bits() -> None:
    array = np.zeros(20000, "f4")
    array[:5] = -0.0, np.nan, np.inf, -np.inf, 1e-45
    model = file_of(array)
    (weight,) = pack(model)
    assert (weight.name, weight.form, weight.dense_bytes) == ("w", "mask", 80000)
    assert all(found.tobytes() == array.tobytes() for found in decoded(model))


def test_the_code_that_is_most_frequent_is_not_stored() -> None:
    array = np.full((100, 100), 128, "u1")
    array[::3] = np.arange(100)
    model = file_of(array)
    assert pack(model)
    assert stored(model, "w_values").size == 34 * 100 + 1
    assert all(found.tobytes() == array.tobytes() for found in decoded(model))


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("columns", [320, 317])
def test_codes_of_few_bits_take_as_many(bits: int, columns: int) -> None:
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (101, columns), generator=random)
    codes[torch.rand(codes.shape, generator=random) < 0.6] = 3
    array = formats.pack(codes, bits).numpy()
    model = file_of(array, bits)
    (weight,) = pack(model)
    kept = int((codes != 3).sum())
    assert weight.bytes < codes.numel() / 8 + kept * bits / 8 + 2200
    assert all(found.tobytes() == array.tobytes() for found in decoded(model))


@pytest.mark.parametrize("blocks", [10, 9])
@pytest.mark.parametrize("blocked", [True, False])
def test_codes_of_zero_that_differ_by_block_are_not_stored(blocks: int, blocked: bool) -> None:
    random = torch.Generator().manual_seed(blocks)
    zeros = torch.randint(0, 16, (199, blocks), generator=random)
    codes = torch.randint(0, 16, (199, blocks, 32), generator=random)
    codes = torch.where(torch.rand(codes.shape, generator=random) < 0.6, zeros[:, :, None], codes)
    array, zero_point = formats.pack(codes.flatten(1), 4).numpy(), formats.pack(zeros, 4).numpy()
    array = array.reshape(199, blocks, 16) if blocked else array
    model = file_of(array, 4, zero_point, 32)
    pack(model)
    kept = int((codes != zeros[:, :, None]).sum())
    assert stored(model, "w_values").size == math.ceil((kept + 1) / 2)
    assert all(found.tobytes() == array.tobytes() for found in decoded(model))


@pytest.mark.parametrize(("values", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_a_narrower_type_is_taken_where_it_holds_every_bit(values: str, dtype: Any, sparsity: float) -> None:
    random = np.random.default_rng(0)
    array = random.standard_normal((100, 101)).astype(dtype).astype("f4")
    array[random.random(array.shape) < sparsity] = 0
    model = file_of(array)
    (weight,) = pack(model, values)
    assert weight.form == (f"mask, {values}" if sparsity else values)
    assert stored(model, "w_values").dtype == dtype
    assert all(found.tobytes() == array.tobytes() for found in decoded(model))
    array[0, 0] = 1 + 2**-20
    assert not [weight for weight in pack(file_of(array), values) if values in weight.form]


def test_what_onnx_runtime_does_not_fold_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros(20000, "f4")
    assert pack(file_of(array))
    monkeypatch.setattr(packing, "MOST_WEIGHTS", 19999)
    model = file_of(array)
    assert not pack(model)
    assert model.opset_imports == {"": 13}


@pytest.mark.parametrize("size", [500, 1000, 1500, 3000, 6000])
def test_a_packed_file_is_never_larger(size: int) -> None:
    array = np.where(np.arange(size) % 2, 0, 1.5).astype("f4")
    dense = len(ir.to_proto(file_of(array)).SerializeToString())
    model = file_of(array)
    pack(model)
    assert len(ir.to_proto(model).SerializeToString()) <= dense


# Whole programs.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 257), nn.ReLU(), nn.Linear(257, 160)).eval()


@functools.cache
def traced() -> Program:
    return lobo_fx.trace(network(), ROWS)


def compiled(*passes: Any, model: nn.Module | None = None, inputs: torch.Tensor = ROWS) -> Result:
    program = traced() if model is None else lobo_fx.trace(model, inputs)
    return lobo_fx.compile(program, list(passes), calibration_data=[inputs], progress=False)


def outputs(path: Path, inputs: torch.Tensor = ROWS) -> bytes:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]).tobytes()


@pytest.mark.parametrize(
    "quantize",
    [
        [],
        [QuantizeStatic(kernels="all")],
        [QuantizeDynamic()],
        *(
            pytest.param([QuantizeWeights(form)], marks=pytest.mark.slow)
            for form in ("int8", "log2_6", "log2_4", "e4m3")
        ),
        [QuantizeWeights("int4", block_size=32, compute="float32")],  # so that no kernel has to be measured
        pytest.param([QuantizeWeights("int4", block_size=None)], marks=pytest.mark.slow),
    ],
    ids=lambda passes: "".join(map(str, passes)) or "float",
)
def test_a_packed_file_runs_the_same_kernels_on_the_same_bits(quantize: list[Any], tmp_path: Path) -> None:
    result = compiled(PruneWeights(0.7), *quantize)
    dense = result.export(tmp_path / "dense.onnx", NOT_COMPARED, confirm=False)
    packed = result.export(tmp_path / "packed.onnx", confirm=False, storage="packed")
    assert packed.bytes < dense.bytes
    assert dense.bytes - packed.bytes >= packed.details["packed"]["saved"] > 0
    assert outputs(packed.path) == outputs(dense.path)
    run = kernels(packed.path)
    assert run == kernels(dense.path)
    nodes = {node.op_type for node in onnx.load(packed.path).graph.node}
    assert {"Gather", "CumSum", "GatherElements"} <= nodes
    assert not {"CumSum", "GatherElements"} & run.keys()


class Tied(nn.Module):
    """Looks up, recurs, and multiplies with what it looked up in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.recurrent = nn.Embedding(200, 64), nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 200, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.recurrent(self.table(tokens))[0])


@pytest.mark.parametrize(
    "quantize", [pytest.param([], id="float", marks=pytest.mark.slow), pytest.param([QuantizeDynamic()], id="int8")]
)
def test_tied_and_recurrent_weights_are_packed(quantize: list[Any], tmp_path: Path) -> None:
    tokens = torch.arange(14).view(2, 7)
    result = compiled(PruneWeights(0.6), *quantize, model=Tied().eval(), inputs=tokens)
    dense = result.export(tmp_path / "dense.onnx", NOT_COMPARED, confirm=False)
    packed = result.export(tmp_path / "packed.onnx", confirm=False, storage="packed")
    assert len(packed.details["packed"]["weights"]) >= 3
    assert outputs(packed.path, tokens) == outputs(dense.path, tokens)
    assert kernels(packed.path) == kernels(dense.path)


def test_integer_kernels_stay_integer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 10)
    ).eval()
    images = torch.randn(2, 8, 8, 8)
    result = compiled(PruneWeights(0.7), QuantizeStatic(kernels="all"), model=model, inputs=images)
    dense = result.export(tmp_path / "dense.onnx", NOT_COMPARED, confirm=False)
    packed = result.export(tmp_path / "packed.onnx", confirm=False, storage="packed")
    assert packed.details["packed"]["weights"]
    assert packed.details["kernels"]["QLinearConv"] == 2
    assert packed.details["kernels"] == kernels(dense.path)
    assert outputs(packed.path, images) == outputs(dense.path, images)


@pytest.mark.parametrize(
    ("values", "dtype"), [("float16", torch.float16), pytest.param("bfloat16", torch.bfloat16, marks=pytest.mark.slow)]
)
def test_values_are_those_of_a_rounded_model(values: str, dtype: torch.dtype, tmp_path: Path) -> None:
    result = compiled(PruneWeights(0.5))
    before = {name: parameter.clone() for name, parameter in result.module.named_parameters()}
    packed = result.export(tmp_path / "packed.onnx", storage="packed", values=values)
    rounded = network()
    for name, parameter in rounded.named_parameters():
        value = before[name]
        parameter.data.copy_(value.to(dtype) if value.dim() > 1 else value)
    dense = compiled(model=rounded).export(tmp_path / "dense.onnx", NOT_COMPARED)
    whole_file = result.export(tmp_path / "whole.onnx", NOT_COMPARED)
    assert outputs(packed.path) == outputs(dense.path) != outputs(whole_file.path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in result.module.named_parameters())
    (note,) = [note for note in result.report.notes if "is packed" in note]
    whole, lost = result.module(ROWS).detach(), rounded(ROWS).detach()
    decibels = 10 * math.log10(float(whole.square().sum() / (whole - lost).square().sum()))
    assert f"rounding to {values} leaves {decibels:.1f} dB" in note


def test_a_weight_that_a_type_cannot_hold_is_left_and_named(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6  # type: ignore[index]
    result = compiled(model=model)
    artifact = result.export(tmp_path / "model.onnx", storage="packed", values="float16")
    assert artifact.details["packed"]["out_of_range"] == ["0.weight"]
    assert set(artifact.details["packed"]["weights"]) == {"2.weight"}
    assert any("can't hold them: 0.weight" in note for note in result.report.notes)


def test_a_note_says_what_was_saved(tmp_path: Path) -> None:
    result = compiled(PruneWeights(0.5))
    result.export(tmp_path / "dense.onnx")
    assert not [note for note in result.report.notes if "packed" in note]
    artifact = result.export(tmp_path / "model.onnx", storage="packed")
    weights = artifact.details["packed"]["weights"]
    assert {name: entry[0] for name, entry in weights.items()} == dict.fromkeys(("0.weight", "2.weight"), "mask")
    saved = sum(dense - packed for _, dense, packed in weights.values()) - packing.SHARED_BYTES
    assert f"model.onnx is packed: 2 as mask, {saved / 1e6:.3g} MB saved" in result.report.notes
    assert result.report.from_json(result.report.as_json()).artifacts["compiled"].details == artifact.details


def test_what_has_no_zeros_stays_dense(tmp_path: Path) -> None:
    result = compiled()
    dense, packed = (result.export(tmp_path / name, storage=name) for name in ("dense", "packed"))
    assert packed.bytes == dense.bytes
    assert "packed stays dense: no weight is smaller packed" in result.report.notes
    assert not any("saved" in note for note in result.report.notes)


def test_weights_beside_the_file_are_packed_too(tmp_path: Path) -> None:
    result = compiled(PruneWeights(0.7))
    dense = result.export(tmp_path / "dense.onnx")
    packed = result.export(tmp_path / "model.onnx", OnnxExporter(external_data=True, storage="packed"))
    assert len(packed.files) == 2
    assert packed.bytes < 0.4 * dense.bytes
    assert outputs(packed.path) == outputs(dense.path)


def test_a_packed_file_asks_for_no_newer_reader_than_it_needs(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU()).eval()
    result = compiled(PruneWeights(0.5), model=model, inputs=torch.randn(2, 3, 8, 8))
    content = onnx.load(result.export(tmp_path / "model.onnx", storage="packed").path)
    assert "CumSum" in {node.op_type for node in content.graph.node}
    assert (content.ir_version, [entry.version for entry in content.opset_import]) == (7, [14])
    exporter = OnnxExporter(opset=18, storage="packed")
    asked = onnx.load(result.export(tmp_path / "asked.onnx", exporter).path)
    assert (asked.ir_version, [entry.version for entry in asked.opset_import]) == (8, [18])


# Refusals.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"storage": "sparse"}, "storage is 'sparse'; it must be 'dense' or 'packed'"),
        ({"values": "float16"}, "give storage='packed' too"),
        ({"storage": "dense", "values": "bfloat16"}, "give storage='packed' too"),
        ({"storage": "packed", "values": "int3"}, "values is 'int3'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, str], said: str, tmp_path: Path) -> None:
    for refused in (lambda: OnnxExporter(**given), lambda: compiled().export(tmp_path / "model.onnx", **given)):  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match=said):
            refused()
    assert not list(tmp_path.iterdir())


class Other:
    """An exporter that knows of no storage."""

    suffix = ".other"

    def export(self, *_: Any) -> Any:
        raise AssertionError("nothing is written")


def test_an_exporter_without_such_a_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the exporter Other has no setting storage="):
        compiled().export(tmp_path / "model.other", Other(), storage="packed")


def test_a_file_that_was_packed_wrongly_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(model: ir.Model, values: str | None) -> list[PackedWeight]:
        packed = pack(model, values)
        value = model.graph.initializers["0.weight_values"]
        value.const_value = ir.tensor(np.roll(stored(model, "0.weight_values"), 1), name=value.name)
        return packed

    monkeypatch.setattr(exporter, "pack", shifted)
    with pytest.raises(ExportError, match="differ from PyTorch's"):
        compiled(PruneWeights(0.5)).export(tmp_path / "model.onnx", storage="packed")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external", [True, False])
def test_a_full_disk_leaves_nothing(external: bool, tmp_path: Path) -> None:
    result = compiled(PruneWeights(0.5))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(InvalidInput, match="can't write"):
            result.export(tmp_path / "model.onnx", OnnxExporter(external_data=external, storage="packed"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_the_files_initializers_are_those_that_are_named(tmp_path: Path) -> None:
    path = compiled(PruneWeights(0.5)).export(tmp_path / "model.onnx", storage="packed").path
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert {"0.weight_mask", "0.weight_values", "0.bias"} <= arrays.keys()
    assert "0.weight" not in arrays
