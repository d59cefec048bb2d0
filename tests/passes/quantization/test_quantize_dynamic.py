"""Dynamic quantization: PyTorch against ONNX's definition and numpy, the files against PyTorch, the kernels by name."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from onnx import helper
from torch import nn

import lobo_fx
from lobo_fx import Artifact, Result
from lobo_fx.contracts.passbase import Pass
from lobo_fx.graph.operators import aten
from lobo_fx.measures.counts import measure
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.own_operators.decode import DECODE
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.own_operators.integers import dynamic_range
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM, dynamic_lstm
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT, PRODUCT, dynamic_product
from lobo_fx.passes import FoldBatchNorm, PruneWeights, QuantizeDynamic, QuantizeWeights
from lobo_fx.passes.quantization import dynamic_forms
from lobo_fx.passes.quantization.codes.rounding import round_nearest
from lobo_fx.passes.quantization.codes.weights import find_weights
from lobo_fx.passes.quantization.dynamic_forms import BLOCK, LEAST, choose_forms, find_integers
from lobo_fx.testing import check_pass

Array = npt.NDArray[Any]
TOKENS = torch.arange(18).view(3, 6)
VECTORS = torch.randn(5, 30, generator=torch.Generator().manual_seed(5))


def quantize(model: nn.Module, example: torch.Tensor, *before: Any) -> Result:
    return lobo_fx.compile(model.eval(), [*before, QuantizeDynamic()], example_inputs=example, progress=False)


def run_file(artifact: Artifact, example: torch.Tensor) -> Array:
    (output,) = run_outputs(artifact, example)
    return output


def run_outputs(artifact: Artifact, *examples: torch.Tensor) -> list[Array]:
    """On one thread: with more, rows that share a range in an LSTM are shared out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    outputs = session.run(None, {name: example.numpy() for name, example in zip(names, examples, strict=True)})
    return [np.asarray(output) for output in outputs]


def quantizer() -> onnx.ModelProto:
    """A graph of one DynamicQuantizeLinear."""
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    floats, bytes_ = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    outputs = [
        helper.make_tensor_value_info("y", bytes_, ["n"]),
        helper.make_tensor_value_info("scale", floats, []),
        helper.make_tensor_value_info("zero", bytes_, []),
    ]
    graph = helper.make_graph([node], "quantizer", [helper.make_tensor_value_info("x", floats, ["n"])], outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


RUNTIME = onnxruntime.InferenceSession(quantizer().SerializeToString(), providers=["CPUExecutionProvider"])


@hypothesis.given(
    hypothesis_numpy.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
    )
)
@hypothesis.settings(deadline=None, max_examples=100)
def test_ranges_and_steps_are_those_of_onnx_bit_for_bit(values: Array) -> None:
    steps, scale, zero = RUNTIME.run(None, {"x": values})
    found_scale, found_zero = dynamic_range(torch.from_numpy(values))
    hypothesis.assume(scale > 1e-30)
    assert found_scale.numpy() == scale
    assert found_zero.numpy() == zero
    found = ((torch.from_numpy(values) / found_scale).round() + found_zero).clamp(0, 255)
    np.testing.assert_array_equal(found.numpy(), steps)


def test_zeros_alone_have_a_range() -> None:
    scale, zero = dynamic_range(torch.zeros(4))
    assert (float(scale), float(zero)) == (1.0, 0.0)


def test_a_product_is_the_integer_arithmetic_it_stands_for() -> None:
    model = nn.Sequential(nn.Linear(30, 8))
    result = check_pass(QuantizeDynamic("x86-vnni"), model, VECTORS)
    weight, bias = (tensor.detach().numpy() for tensor in model.parameters())
    stored = result.module.state_dict()
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    codes = np.round(weight / scale)
    np.testing.assert_array_equal(stored["0.weight"].numpy(), codes)
    np.testing.assert_array_equal(stored["0.weight_scale"].numpy(), scale)
    assert stored["0.weight"].dtype == torch.int8
    x = VECTORS.numpy()
    step = np.float32((max(x.max(), 0) - min(x.min(), 0)) / np.float32(255))
    zero = np.round(-min(x.min(), 0) / step)
    integers = np.clip(np.round(x / step) + zero, 0, 255).astype(np.int64) - int(zero)
    sums = integers @ codes.astype(np.int64).T
    expected = sums.astype(np.float32) * (step * scale[:, 0]) + bias
    np.testing.assert_allclose(result.module(VECTORS).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_products_of_long_rows_are_exact() -> None:
    """Sums past 2²⁴ are no float32; the largest codes on 4096 columns reach 1.3 × 10⁸."""
    x, codes = torch.ones(1, 4096), torch.full((2, 4096), 127, dtype=torch.int8)
    codes[1, 0] = 126
    found = dynamic_product(x, codes, torch.ones(2, 1), None)
    sums = np.array([255 * 127 * 4096, 255 * (127 * 4096 - 1)], np.float64)
    np.testing.assert_array_equal(found[0].numpy(), sums.astype(np.float32) * np.float32(1 / np.float32(255)))


class Attention(nn.Module):
    """Linear layers of two kinds, and products of activations, which stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.factor = nn.Linear(30, 90), nn.Parameter(0.2 * torch.randn(30, 30))

    def forward(self, x: torch.Tensor) -> Any:
        query, key, value = self.qkv(x[None]).chunk(3, -1)
        return torch.softmax(query @ key.transpose(1, 2), -1) @ value @ self.factor


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self, recurrent: Any) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(40, 24), recurrent(24, 24, batch_first=True)
        self.lm_head = nn.Linear(24, 40, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.lm_head(self.recurrent(self.embedding(tokens))[0])


NETWORKS: dict[str, tuple[Any, torch.Tensor, dict[str, int]]] = {
    "attention": (Attention, VECTORS, {"DynamicQuantizeMatMul": 2}),
    "lstm": (
        lambda: Tied(nn.LSTM),
        TOKENS,
        {"DynamicQuantizeMatMul": 1, "DynamicQuantizeLSTM": 1, "LSTM": 0, "Gather": 2},
    ),
    "gru": (lambda: Tied(nn.GRU), TOKENS, {"DynamicQuantizeMatMul": 1, "GRU": 1, "Gather": 2}),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2),
            nn.Flatten(),
            nn.Linear(676, 5),
        ),
        torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(6)),
        {"DynamicQuantizeMatMul": 1, "ConvTranspose": 1, "Cast": 0},
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_agrees_with_pytorch_and_runs_integer_products(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, example, kernels = NETWORKS[kind]
    model = make().eval()
    result = quantize(model, example, FoldBatchNorm())
    artifact = result.export(tmp_path / "model.onnx")
    found = artifact.details["kernels"]
    assert {name: found.get(name, 0) for name in kernels} == kernels
    with torch.no_grad():
        expected = result.module(example).numpy()
        difference = np.abs(run_file(artifact, example) - expected) / np.abs(expected).max()
    assert np.median(difference) < 1e-6
    assert difference.max() < 0.02, "a step of rounding at most"
    assert signal_to_noise(model(example), result.module(example)) > 30
    weights = {name for name, tensor in result.module.state_dict().items() if tensor.dtype == torch.int8}
    assert weights == {name for name, tensor in model.named_parameters() if tensor.dim() > 1}
    before, *_, after = result.report.rows
    assert after.parameters <= before.parameters
    assert after.macs == before.macs
    assert not result.report.notes


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    result = quantize(Tied(nn.LSTM), TOKENS)
    assert [node.target for node in result.program.graph.nodes].count(DYNAMIC_PRODUCT) == 1
    artifact = result.export(tmp_path / "model.onnx")
    stored = [tensor for tensor in onnx.load(artifact.path).graph.initializer if sorted(tensor.dims) == [24, 40]]
    assert [tensor.data_type for tensor in stored] == [onnx.TensorProto.INT8]


def test_the_file_is_a_quarter_convolutions_included(tmp_path: Path) -> None:
    layers = [layer for width in (32, 64, 64) for layer in (nn.LazyConv2d(width, 3, 1, 1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 100)).eval()
    images = torch.randn(2, 3, 16, 16)
    model(images)
    result = quantize(model, images)
    artifact, original = result.export(tmp_path / "model.onnx"), result.export_original(tmp_path / "original.onnx")
    assert artifact.bytes < 0.27 * original.bytes
    kernels = artifact.details["kernels"]
    assert not {"ConvInteger", "Cast", "DequantizeLinear"} & set(kernels), "decoded when the file is loaded"
    assert signal_to_noise(model(images), result.module(images)) > 35


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    result = quantize(nn.Sequential(nn.Embedding(20, 24), nn.Linear(24, 6)), TOKENS)
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert torch.equal(loaded.module(TOKENS), result.module(TOKENS))
    assert measure(loaded.program, None).parameters == result.report.rows[-1].parameters


@pytest.mark.parametrize("pass_", [QuantizeDynamic(), QuantizeWeights("int8", 16, compute="int8")])
def test_gradients_pass_through_quantized_products(pass_: Pass) -> None:
    """As if the layers were the linear ones that they stand for: rounding of inputs is passed straight through."""
    model = nn.Sequential(nn.LayerNorm(30), nn.Linear(30, 12)).eval()
    quantized = lobo_fx.compile(model, [pass_], example_inputs=VECTORS, progress=False).module
    twin, stored = copy.deepcopy(model), quantized.state_dict()
    scale = stored["1.weight_scale"].repeat_interleave(16 if stored["1.weight_scale"].shape[1] > 1 else 30, 1)
    twin.get_parameter("1.weight").data = stored["1.weight"] * scale[:, :30]
    for network in (quantized, twin):
        network(VECTORS).backward(torch.ones(5, 12))
    for name in ("0.weight", "0.bias", "1.bias"):
        found, expected = (network.get_parameter(name).grad for network in (quantized, twin))
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_zeros_of_pruned_weights_stay_zero_and_masks_go() -> None:
    model = nn.Sequential(nn.Linear(30, 12), nn.ReLU(), nn.Linear(12, 4))
    pruned = lobo_fx.compile(model, [PruneWeights(0.5)], example_inputs=VECTORS, progress=False)
    stored = quantize(model, VECTORS, PruneWeights(0.5)).module.state_dict()
    for name in ("0.weight", "2.weight"):
        zeros = pruned.module.state_dict()[name] == 0
        assert not stored[name][zeros].any()
        assert stored[name][~zeros].count_nonzero() > 0.9 * (~zeros).sum()


def test_half_precision_is_left_alone_and_noted() -> None:
    model = nn.Sequential(nn.Linear(30, 12)).bfloat16()
    result = quantize(model, VECTORS.bfloat16())
    assert result.report.notes[1] == "'0.weight' is left alone: it is bfloat16, not float32"
    assert not [node for node in result.program.graph.nodes if node.target in (DECODE, DYNAMIC_PRODUCT)]


def test_scaled_sums_run_in_integers() -> None:
    """`addmm` with a factor is a linear layer whose result is multiplied."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(30, 7)), nn.Parameter(torch.randn(7))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.addmm(self.bias, x, self.weight, alpha=0.5)

    model = Scaled()
    result = quantize(model, VECTORS)
    targets = [node.target for node in result.program.graph.nodes]
    assert DYNAMIC_PRODUCT in targets
    assert DECODE not in targets
    assert signal_to_noise(model(VECTORS), result.module(VECTORS)) > 35


def test_an_empty_batch_runs() -> None:
    result = quantize(nn.Sequential(nn.Linear(30, 12)), VECTORS)
    assert result.module(VECTORS[:0]).shape == (0, 12)


STEPS = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(7))


class Recurrent(nn.Module):
    """An LSTM that gives out everything, its first states given or zero."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 16, **settings)

    def forward(self, x: torch.Tensor, states: torch.Tensor | None = None) -> Any:
        output, (hidden, cell) = self.lstm(x, None if states is None else (states, states.tanh()))
        return output, hidden, cell


def targets(result: Result) -> list[Any]:
    return [node.target for node in result.program.graph.nodes]


def integers(x: Array, codes: Array, scale: Array) -> Array:
    """A product with `x` quantized as a whole, in integers."""
    low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
    step = (high - low) / np.float32(255)
    zero = int(np.round(-low / step))
    steps = np.clip(np.round(x / step) + zero, 0, 255).astype(np.int64) - zero
    sums = steps @ codes.astype(np.int64).T
    return sums.astype(np.float32) * (step * scale[:, 0])


@pytest.mark.parametrize("directions", [1, 2])
def test_an_lstm_is_the_integer_arithmetic_it_stands_for(directions: int) -> None:
    generator = np.random.default_rng(0)
    x, hidden, cell = (generator.standard_normal(size, "f") for size in ((6, 3, 10), *[(directions, 3, 8)] * 2))
    params: list[Array] = []
    for _ in range(directions):
        for columns in (10, 8):
            params += [
                generator.integers(-127, 128, (32, columns), "b"),
                generator.uniform(0, 0.01, (32, 1)).astype("f"),
            ]
        params += [generator.standard_normal(32, "f"), generator.standard_normal(32, "f")]
    found = dynamic_lstm(*map(torch.from_numpy, (x, hidden, cell)), [*map(torch.from_numpy, params)], directions)
    expected = np.zeros((6, 3, 8 * directions), "f")
    for direction in range(directions):
        codes, scale, state_codes, state_scale, *biases = params[6 * direction :][:6]
        h, c, inputs = hidden[direction], cell[direction], integers(x, codes, scale)
        for step in range(6)[:: -1 if direction else 1]:
            gates = inputs[step] + integers(h, state_codes, state_scale) + sum(biases)
            i, f, o = (1 / (1 + np.exp(-gates[:, at : at + 8])) for at in (0, 8, 24))
            c = f * c + i * np.tanh(gates[:, 16:24])
            h = o * np.tanh(c)
            expected[step, :, 8 * direction :][:, :8] = h
        for value, state in zip(found[1:], (h, c), strict=True):
            np.testing.assert_allclose(value[direction].numpy(), state, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-5)
    floats = [
        params[at] * params[at + 1] if at % 6 < 4 else params[at] for at in range(len(params)) if at % 6 not in (1, 3)
    ]
    states, weights = [*map(torch.from_numpy, (hidden, cell))], [*map(torch.from_numpy, floats)]
    twin = torch.lstm(torch.from_numpy(x), states, weights, True, 1, 0.0, False, directions == 2, False)
    assert not np.allclose(twin[0].numpy(), expected, rtol=1e-5, atol=1e-5), "a float LSTM is not held to be the same"
    assert signal_to_noise(twin, found) > 30


FORMS = list(itertools.product([1, 2], [True, False], [True, False], [True, False]))
"""Layers of an LSTM, whether it is bidirectional, whether the batch comes first, whether it has biases."""
QUICK = [form for form in FORMS if (form[0] == 2) == form[1] and form[2] == form[3]]


@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "batch_first", "bias"),
    [form if form in QUICK else pytest.param(*form, marks=pytest.mark.slow) for form in FORMS],
)
def test_files_of_lstms_agree_with_pytorch(
    num_layers: int, bidirectional: bool, batch_first: bool, bias: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    states = torch.randn(num_layers * (2 if bidirectional else 1), 3, 16)
    settings = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    model, x = Recurrent(**settings).eval(), STEPS if batch_first else STEPS.transpose(0, 1).contiguous()
    result = lobo_fx.compile(
        model, [QuantizeDynamic()], example_inputs=(x, states), dynamic_shapes=None, progress=False
    )
    artifact = result.export(tmp_path / "model.onnx")
    kernels = artifact.details["kernels"]
    assert kernels["DynamicQuantizeLSTM"] == num_layers == targets(result).count(DYNAMIC_LSTM)
    assert not {"LSTM", "Cast"} & set(kernels)
    assert DECODE not in targets(result)
    expected = result.module(x, states)
    for found, value in zip(run_outputs(artifact, x, states), expected, strict=True):
        np.testing.assert_allclose(found, value.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert signal_to_noise(model(x, states), expected) > 30
    before, *_, after = result.report.rows
    assert (after.macs, after.parameters) == (before.macs, before.parameters)


def test_an_lstm_takes_other_batches_than_it_was_traced_with(tmp_path: Path) -> None:
    result = quantize(Recurrent(num_layers=2, bidirectional=True, batch_first=True), STEPS)
    artifact = result.export(tmp_path / "model.onnx")
    for rows in (1, 5):
        x = torch.randn(rows, 7, 24)
        for found, value in zip(run_outputs(artifact, x), result.module(x), strict=True):
            np.testing.assert_allclose(found, value.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert result.module(STEPS[:0])[0].shape == (0, 7, 32)


def test_an_lstm_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    result = quantize(Recurrent(batch_first=True), STEPS)
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved").module
    assert all(torch.equal(a, b) for a, b in zip(loaded(STEPS), result.module(STEPS), strict=True))
    assert loaded.state_dict()["lstm.weight_hh_l0"].dtype == torch.int8


def test_gradients_pass_through_quantized_lstms() -> None:
    """As if the layer were the float LSTM of the decoded weights, run on what the layer before gives."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lstm = nn.LayerNorm(24), nn.LSTM(24, 16, bidirectional=True, batch_first=True)

        def forward(self, x: torch.Tensor) -> Any:
            return self.lstm(self.norm(x))[0]

    model = Deep().eval()
    quantized, twin = quantize(model, STEPS).module, copy.deepcopy(model)
    stored = quantized.state_dict()
    for name, parameter in twin.named_parameters():
        if parameter.dim() > 1:
            parameter.data = stored[name] * stored[f"{name}_scale"]
    for network in (quantized, twin):
        network(STEPS).sum().backward()
    for name, parameter in twin.named_parameters():
        if parameter.dim() == 1:
            found = quantized.get_parameter(name).grad
            assert torch.allclose(found, parameter.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


class Regularised(Recurrent):
    """A weight of the LSTM is an output's factor too."""

    def forward(self, x: torch.Tensor, states: torch.Tensor | None = None) -> Any:
        return self.lstm(x)[0] * self.lstm.get_parameter("weight_hh_l0").abs().mean()


@pytest.mark.parametrize(
    ("model", "left_float"),
    [
        (Regularised(batch_first=True), {"lstm.weight_hh_l0"}),
        (Recurrent(batch_first=True, proj_size=4), set()),
        (nn.GRU(24, 16, batch_first=True), set()),
        (nn.LSTM(24, 16, batch_first=True), None),
    ],
)
def test_what_has_no_integer_kernel_reads_decoded_weights(model: nn.Module, left_float: set[str] | None) -> None:
    result = quantize(model, STEPS)
    if left_float is None:
        assert DYNAMIC_LSTM in targets(result)
        assert DECODE not in targets(result)
        return
    assert DYNAMIC_LSTM not in targets(result)
    assert DECODE in targets(result)
    stored = result.module.state_dict()
    weights = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    assert {name for name in weights if stored[name].dtype == torch.float32} == left_float
    assert [note.split("'")[1] for note in result.report.notes if "reads it too" in note] == [*left_float]
    assert signal_to_noise(model(STEPS), result.module(STEPS)) > 30


def test_a_weight_that_two_lstms_and_an_embedding_share_is_stored_once(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.first, self.second = nn.Embedding(64, 16), nn.LSTM(16, 16), nn.LSTM(16, 16)
            self.second.weight_ih_l0 = self.first.weight_ih_l0
            self.first.weight_hh_l0 = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.second(self.first(self.embedding(tokens).transpose(0, 1))[0])[0].transpose(0, 1)

    model = Shared().eval()
    result = quantize(model, TOKENS)
    assert [targets(result).count(target) for target in (DYNAMIC_LSTM, DECODE)] == [2, 1]
    artifact = result.export(tmp_path / "model.onnx")
    dims = [tuple(tensor.dims) for tensor in onnx.load(artifact.path).graph.initializer]
    assert dims.count((64, 16)) == 3
    assert signal_to_noise(model(TOKENS), result.module(TOKENS)) > 30


def test_without_vnni_weights_have_seven_bits() -> None:
    model = nn.Linear(32, 8)
    pass_ = QuantizeDynamic("x86-avx2")
    result = lobo_fx.compile(model, [pass_], example_inputs=torch.randn(4, 32), progress=False)
    codes = result.module.state_dict()["weight"]
    assert codes.abs().amax(1).eq(63).all()
    with pytest.raises(lobo_fx.InvalidInput, match="target is 'x87'; it must be one of auto, x86-vnni"):
        QuantizeDynamic("x87")


def test_without_vnni_weights_that_no_product_reads_keep_eight_bits() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 8), nn.Flatten(), nn.Linear(8, 8))
    result = lobo_fx.compile(model, [QuantizeDynamic("x86-avx2")], example_inputs=torch.randn(4, 4, 8), progress=False)
    codes = result.module.state_dict()
    assert [int(codes[name].abs().max()) for name in ("0.weight", "2.weight")] == [127, 63]


def test_weights_of_short_rows_are_left_alone_and_noted() -> None:
    result = quantize(nn.Sequential(nn.Linear(30, 1), nn.Linear(1, 64), nn.Linear(64, 2), nn.Linear(2, 64)), VECTORS)
    reason = "is left alone: its rows of one or two entries hardly get smaller"
    assert result.report.notes == [f"'{name}' {reason}" for name in ("1.weight", "3.weight")]
    dtypes = {name: tensor.dtype for name, tensor in result.module.state_dict().items() if name.endswith(".weight")}
    assert [name for name in dtypes if dtypes[name] != torch.int8] == ["1.weight", "3.weight"]


# Noise of a layer's own.

SIZES = torch.logspace(0, -2.85, 40)


def columns(rows: int, seed: int) -> torch.Tensor:
    """Even in rows and steps, 700-fold different in columns."""
    return SIZES * torch.randn(rows, 12, 40, generator=torch.Generator().manual_seed(seed))


def spectra(rows: int, seed: int) -> torch.Tensor:
    """Power spectra: columns differ, rows are loud or quiet, and a step may be many times as loud as the next."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.exp(1.5 * torch.randn(rows, 1, 1, generator=generator))
    return loud * SIZES * torch.randn(rows, 12, 40, generator=generator).square()


class Sequence(nn.Module):
    """A layer that makes use of all its columns, as training would leave it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.head = kind, nn.Linear(48, 5)
        self.layer: Any = nn.Linear(40, 48) if kind == "linear" else nn.LSTM(40, 24, 1, True, True, bidirectional=True)
        for name, parameter in self.layer.named_parameters():
            if name.startswith("weight") and "hh" not in name:
                parameter.data /= SIZES

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.layer(x).tanh() if self.kind == "linear" else self.layer(x)[0])


FORMS_OF_NOISE = {
    ("lstm", columns): ("columns evened", {"DynamicQuantizeLSTM": 1}, 28),
    ("lstm", spectra): ("stays float", {"LSTM": 1}, 30),
    ("linear", columns): ("columns evened", {"DynamicQuantizeMatMul": 2}, 28),
    ("linear", spectra): ("", {}, 26),
}


@pytest.mark.parametrize(
    ("kind", "make"),
    [pytest.param(*form, marks=pytest.mark.slow if form == ("lstm", columns) else ()) for form in FORMS_OF_NOISE],
)
def test_a_layer_whose_own_noise_is_high_takes_another_form(kind: str, make: Any, tmp_path: Path) -> None:
    words, kernels, least = FORMS_OF_NOISE[kind, make]
    model, data, fresh = Sequence(kind).eval(), [make(8, seed) for seed in range(4)], make(16, 9)
    result = lobo_fx.compile(
        model, [QuantizeDynamic()], example_inputs=data[0][:2], calibration_data=data, progress=False
    )
    (note,) = [note for note in result.report.notes if "its own noise would leave" in note]
    assert words in note
    assert "dB" in note
    assert "'layer'" in note
    assert signal_to_noise(model(fresh), result.module(fresh)) > least
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.details["kernels"].items() >= kernels.items()
    expected = result.module(fresh).detach().numpy()
    difference = np.abs(run_file(artifact, fresh) - expected) / np.abs(expected).max()
    assert np.median(difference) < 1e-4
    assert difference.max() < 0.02, "a step of rounding at most"


@pytest.mark.parametrize("kind", ["lstm", "linear"])
def test_without_data_the_example_inputs_tell(kind: str, tmp_path: Path) -> None:
    model, example, fresh = Sequence(kind).eval(), spectra(16, 1), spectra(16, 9)
    result = quantize(model, example)
    (note,) = [note for note in result.report.notes if "its own noise would leave" in note]
    assert "stays float" in note
    assert signal_to_noise(model(fresh), result.module(fresh)) > 28
    kernels = result.export(tmp_path / "model.onnx").details["kernels"]
    assert kernels.get("DynamicQuantizeMatMul") == 1, "the head's"
    assert "DynamicQuantizeLSTM" not in kernels


def test_rows_that_differ_in_size_have_ranges_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    data = [torch.exp(2 * torch.randn(8, 1)) * torch.randn(8, 64) for _ in range(4)]
    result = lobo_fx.compile(
        model, [QuantizeDynamic()], example_inputs=data[0][:2], calibration_data=data, progress=False
    )
    (note,) = result.report.notes
    assert f"a range for every {BLOCK} columns of each row" in note
    quiet = 1e-3 * torch.cat([data[0], 1e5 * data[0]])
    assert signal_to_noise(model(quiet)[:8], result.module(quiet)[:8]) > 35
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.details["kernels"]["MatMulNBits"] == 1
    expected = result.module(quiet).detach().numpy()
    difference = np.abs(run_file(artifact, quiet) - expected)[:8] / np.abs(expected[:8]).max()
    assert difference.max() < 0.02


@pytest.mark.parametrize("kind", ["lstm", "linear"])
def test_even_inputs_stay_with_one_range(kind: str) -> None:
    model, data = Sequence(kind).eval(), [torch.randn(8, 12, 40) for _ in range(4)]
    for parameter in model.layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    result = lobo_fx.compile(
        model, [QuantizeDynamic()], example_inputs=data[0][:2], calibration_data=data, progress=False
    )
    assert not result.report.notes
    assert {DYNAMIC_LSTM if kind == "lstm" else DYNAMIC_PRODUCT} <= set(targets(result))


def test_its_own_noise_is_that_of_the_kernel_on_all_rows() -> None:
    """Against the operators themselves, on calibration data whose ends are in the rows that are judged."""
    x = spectra(16, 2)
    for kind in ("lstm", "linear"):
        model = Sequence(kind).eval()
        program = lobo_fx.trace(model, x)
        silent = lobo_fx.Context(program.signature, show_progress=False)
        weights = find_weights(program, silent)
        (layer, _) = find_integers(program, weights)
        choose_forms(program, [layer], FORMATS["int8"], silent)
        (noted,) = [str(note) for note in silent.notes]
        plain = [round_nearest(w.matrix, FORMATS["int8"], w.matrix.shape[1]) for w in (*layer.weights, *layer.states)]
        with torch.no_grad():
            if kind == "linear":
                expected = model.layer(x)
                found = dynamic_product(x, plain[0].codes, plain[0].scale, model.layer.bias)
            else:
                expected, params = model.layer(x)[0], []
                for w, r, suffix in ((plain[0], plain[2], ""), (plain[1], plain[3], "_reverse")):
                    biases = [model.layer.get_parameter(f"bias_{part}_l0{suffix}") for part in ("ih", "hh")]
                    params += [w.codes, w.scale, r.codes, r.scale, *biases]
                zeros = torch.zeros(2, 16, 24)
                found = dynamic_lstm(x.transpose(0, 1), zeros, zeros, params, 2)[0].transpose(0, 1)
        by_row = (expected - found).square().sum(-1) / expected.square().sum(-1)
        least = min(signal_to_noise(expected, found), -10 * float(by_row.median().log10()))
        decibels = float(noted.split("would leave ")[1].split(" dB")[0])
        assert decibels == pytest.approx(least, abs=1.5), "an LSTM's states share a range with one more row"
        assert decibels < LEAST


@pytest.mark.parametrize("steps", [1, 2])
def test_a_sequence_of_one_step_has_the_whole_range(steps: int) -> None:
    """Judged on quiet data, the range is still that of all data, at both ends."""
    torch.manual_seed(0)
    model, quiet = nn.LSTM(24, 16, batch_first=True).eval(), 0.02 * torch.randn(64, steps, 24)
    program = lobo_fx.trace(model, quiet)
    context = lobo_fx.Context(program.signature, show_progress=False)
    (layer,) = find_integers(program, find_weights(program, context))
    noise = {}
    for low in (0.0, -50.0):
        columns = dynamic_forms._Columns()
        columns.add(torch.stack([torch.full((24,), low), torch.full((24,), 1.0)]))
        simulate = dynamic_forms._simulated_lstm(layer, dynamic_forms.Form("integers"), FORMATS["int8"], columns)
        names = [argument.name for argument in layer.node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, (quiet, [torch.zeros(1, 64, 16)] * 2, list(model.parameters()), True, 1), strict=False))
        given |= {"dropout": 0.0, "train": False, "bidirectional": False, "batch_first": True}
        expected, found = simulate(given, model(quiet))
        noise[low] = signal_to_noise(expected, found)
    assert noise[-50.0] < noise[0.0] - 20


class Thrice(nn.Module):
    """One layer reads rows alike in size, rows that differ, and large values that it multiplies with zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 48)
        self.layer.weight.data[:, ::BLOCK] = 0
        self.register_buffer("idle", torch.zeros(64))
        self.idle: torch.Tensor
        self.idle[::BLOCK] = 1e4

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), self.layer(x * torch.exp(3 * x[:, :1])), self.layer(x + self.idle)


def test_a_weight_in_blocks_leaves_float_what_is_too_noisy_and_moves_the_rest(tmp_path: Path) -> None:
    model, x = Thrice().eval(), torch.randn(64, 64)
    result = quantize(model, x)
    moved, blocks, left = sorted((note for note in result.report.notes), key=lambda note: "would leave" in note)
    assert f"a range for every {BLOCK} columns of each row: a layer that shares its weight needs" in moved
    assert f"a range for every {BLOCK} columns of each row, " in blocks
    assert "stays float" in left
    assert [targets(result).count(target) for target in (PRODUCT, aten.linear.default)] == [2, 1]
    for expected, found in zip(model(x), result.module(x), strict=True):
        assert signal_to_noise(expected, found) > LEAST


class SharedMatrix(nn.Module):
    """A matrix that an LSTM multiplies its inputs with, and its states or a linear layer's inputs."""

    def __init__(self, by_states: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.linear = nn.LSTM(40, 40, batch_first=True), nn.Linear(40, 160)
        shared: Any = self.lstm.get_parameter("weight_ih_l0")
        shared.data /= 100 * SIZES
        if by_states:
            self.lstm.weight_hh_l0 = shared
        else:
            self.linear.weight = shared

    def forward(self, x: torch.Tensor) -> Any:
        return self.lstm(100 * x)[0], self.linear(100 * x * torch.exp(3 * x[:, :, :1]))


@pytest.mark.parametrize("by_states", [True, False])
def test_a_matrix_that_is_multiplied_with_two_things_is_not_moved(by_states: bool, tmp_path: Path) -> None:
    model, data, fresh = SharedMatrix(by_states).eval(), [columns(8, seed) for seed in range(4)], columns(8, 9)
    result = lobo_fx.compile(
        model, [QuantizeDynamic()], example_inputs=data[0][:2], calibration_data=data, progress=False
    )
    assert not any("'lstm'" in note and "evened" in note for note in result.report.notes)
    assert any("would leave" in note for note in result.report.notes)
    for expected, found in zip(model(fresh), result.module(fresh), strict=True):
        # states need the columns that inputs make coarse; were they moved, nothing would be left
        assert signal_to_noise(expected, found) > (5 if by_states else 15)
    result.export(tmp_path / "model.onnx")
