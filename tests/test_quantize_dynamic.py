"""Dynamic quantization: PyTorch against ONNX's definition and numpy, the files against PyTorch, the kernels by name."""

from __future__ import annotations

import copy
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
from lobo_fx.measures import signal_to_noise
from lobo_fx.own_operators import DECODE, DYNAMIC_PRODUCT, dynamic_product, dynamic_range
from lobo_fx.passbase import Pass
from lobo_fx.passes import FoldBatchNorm, PruneWeights, QuantizeDynamic, QuantizeWeights
from lobo_fx.testing import check_pass

Array = npt.NDArray[Any]
TOKENS = torch.arange(18).view(3, 6)
VECTORS = torch.randn(5, 30, generator=torch.Generator().manual_seed(5))


def quantize(model: nn.Module, example: torch.Tensor, *before: Any) -> Result:
    return lobo_fx.compile(model.eval(), [*before, QuantizeDynamic()], example_inputs=example, progress=False)


def run_file(artifact: Artifact, example: torch.Tensor) -> Array:
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    return np.asarray(output)


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
    result = check_pass(QuantizeDynamic(), model, VECTORS)
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
    "lstm": (lambda: Tied(nn.LSTM), TOKENS, {"DynamicQuantizeMatMul": 1, "LSTM": 1, "Gather": 2}),
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
    assert found.items() >= {name: count for name, count in kernels.items() if count}.items() or "Gather" in kernels
    assert all(found.get(name, 0) == count for name, count in kernels.items() if name != "Gather")
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
    assert lobo_fx.measures.measure(loaded.program, None).parameters == result.report.rows[-1].parameters


@pytest.mark.parametrize("author", [QuantizeDynamic(), QuantizeWeights("int8", 16, compute="int8")])
def test_gradients_pass_through_quantized_products(author: Pass) -> None:
    """As if the layers were the linear ones that they stand for: rounding of inputs is passed straight through."""
    model = nn.Sequential(nn.LayerNorm(30), nn.Linear(30, 12)).eval()
    quantized = lobo_fx.compile(model, [author], example_inputs=VECTORS, progress=False).module
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
    assert result.report.notes[0] == "'0.weight' is left alone: it is bfloat16, not float32"
    assert not [node for node in result.program.graph.nodes if node.target in (DECODE, DYNAMIC_PRODUCT)]


def test_scaled_sums_keep_a_float_product() -> None:
    """`addmm` with a factor is no linear layer: its weight is decoded."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(30, 7)), nn.Parameter(torch.randn(7))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.addmm(self.bias, x, self.weight, alpha=0.5)

    model = Scaled()
    result = quantize(model, VECTORS)
    targets = [node.target for node in result.program.graph.nodes]
    assert DECODE in targets
    assert DYNAMIC_PRODUCT not in targets
    assert signal_to_noise(model(VECTORS), result.module(VECTORS)) > 35


def test_an_empty_batch_runs() -> None:
    result = quantize(nn.Sequential(nn.Linear(30, 12)), VECTORS)
    assert result.module(VECTORS[:0]).shape == (0, 12)
