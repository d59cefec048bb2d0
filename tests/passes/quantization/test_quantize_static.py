"""Static quantization: the numbers against plain arithmetic, the files against PyTorch, the kernels by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import Artifact, InvalidInput, Result
from lobo_fx.contracts.split import is_held_out
from lobo_fx.graph.operators import is_call
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import MixedPrecision, PruneWeights, QuantizeStatic
from lobo_fx.passes.quantization.integers.bias_correction import shrunken_mean
from lobo_fx.passes.quantization.integers.targets import target_of_this_machine
from lobo_fx.testing import check_pass

Array = npt.NDArray[Any]
Observer = Literal["min_max", "histogram"]
IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(11))
VECTORS = torch.randn(6, 10, generator=torch.Generator().manual_seed(12))
ROWS = torch.randn(64, 10, generator=torch.Generator().manual_seed(14))
SEQUENCES = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(13))


def seen(rows: torch.Tensor) -> torch.Tensor:
    """The rows that observers see."""
    return rows[[row for row in range(len(rows)) if not is_held_out(row)]]


def quantize(
    model: nn.Module, data: Any, *, observer: Observer = "min_max", passes: Any = (), **settings: Any
) -> Result:
    """Calibrates on `data` in two batches."""
    batches = [data[:2], data[2:]] if isinstance(data, torch.Tensor) else data
    model.eval()
    return lobo_fx.compile(
        model,
        [*passes, QuantizeStatic(**{"observer": observer, "kernels": "all", **settings})],
        example_inputs=batches[0],
        calibration_data=batches,
        progress=False,
    )


def run_file(artifact: Artifact, inputs: torch.Tensor) -> Array:
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return np.asarray(output)


def state(result: Result) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in result.module.state_dict().items()}


# The arithmetic, in numpy. Rounding is to even, scales are float32.


def activation_parameters(values: torch.Tensor) -> tuple[np.float32, int]:
    """Scale and zero point of unsigned 8-bit integers over the range of `values`, which includes zero."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    return scale, int(np.clip(-np.round(np.float32(low) / scale), 0, 255))


def weight_parameters(weight: Array, axis: int = 0) -> Array:
    """A scale per output channel, so that the largest magnitude becomes 127."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    return np.asarray(np.abs(weight).max(axis=others) / np.float32(127.0))


def to_integers(values: Array, scale: Array, low: int, high: int) -> Array:
    return np.clip(np.round(values / scale), low, high).astype(np.int64)


def along(values: Array, ndim: int, axis: int = 0) -> Array:
    return values.reshape([-1 if index == axis else 1 for index in range(ndim)])


def activation_nodes(result: Result) -> list[tuple[float, int]]:
    """Scale and zero point of every activation that is quantized, in graph order."""
    targets = (torch.ops.quantized_decomposed.quantize_per_tensor.default,)
    return [(node.args[1], node.args[2]) for node in result.program.graph.nodes if is_call(node, *targets)]


def assert_quantized_weights(result: Result, name: str, weight: Array, bias: Array, source: np.float32) -> None:
    """Weight, scale and bias stored under `name` are those of the formulas."""
    found = state(result)
    scale = weight_parameters(weight)
    assert found[f"{name}.weight"].dtype == np.int8
    assert found[f"{name}.bias"].dtype == np.int32
    np.testing.assert_allclose(found[f"{name}.weight_scale"], scale, rtol=1e-6, atol=0)
    assert not found[f"{name}.weight_zero_point"].any()
    assert not found[f"{name}.bias_zero_point"].any()
    expected = to_integers(weight, along(scale, weight.ndim), -127, 127)
    np.testing.assert_array_equal(found[f"{name}.weight"], expected)
    assert np.abs(expected).max() == 127
    np.testing.assert_allclose(found[f"{name}.bias_scale"], source * scale, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(found[f"{name}.bias"], to_integers(bias, source * scale, -(2**31), 2**31 - 1))


def test_a_convolution_is_the_integer_arithmetic_it_stands_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval()
    result = quantize(model, IMAGES, correct_bias=False, target="x86-vnni")
    weight, bias = (tensor.detach().numpy() for tensor in model.parameters())
    in_scale, in_zero = activation_parameters(seen(IMAGES))
    out_scale, out_zero = activation_parameters(model(seen(IMAGES)).detach())
    scales, zeros = zip(*activation_nodes(result), strict=True)
    assert scales == pytest.approx([in_scale, out_scale], rel=1e-6)
    assert zeros == (in_zero, out_zero)
    assert in_zero not in (0, 255)
    assert out_zero == 0, "a ReLU leaves nothing below zero, so the whole range is above"
    assert_quantized_weights(result, "0", weight, bias, in_scale)

    x = np.clip(np.round(IMAGES.numpy() / in_scale) + in_zero, 0, 255).astype(np.int64) - in_zero
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    stored = state(result)
    sums = np.einsum("nihwkl,oikl->nohw", windows, stored["0.weight"].astype(np.int64))
    sums = sums + along(stored["0.bias"].astype(np.int64), 4, axis=1)
    real = np.maximum(sums * along(stored["0.bias_scale"].astype(np.float64), 4, axis=1), 0)
    steps = np.clip(np.round(real / out_scale), 0, 255)
    found = np.round(result.module(IMAGES).numpy() / out_scale)
    assert np.abs(found - steps).max() <= 1
    assert (found != steps).mean() < 1e-3, "only what lies between two integers may be rounded either way"


def test_a_linear_layer_is_the_integer_arithmetic_it_stands_for() -> None:
    model = nn.Sequential(nn.Linear(10, 7))
    result = quantize(model, VECTORS, correct_bias=False, target="x86-vnni")
    weight, bias = (tensor.detach().numpy() for tensor in model.parameters())
    scale, zero = activation_parameters(seen(VECTORS))
    scales, zeros = zip(*activation_nodes(result), strict=True)
    assert scales == pytest.approx([scale], rel=1e-6), "a linear layer gives float"
    assert zeros == (zero,)
    assert_quantized_weights(result, "0", weight, bias, scale)
    stored = state(result)
    x = np.clip(np.round(VECTORS.numpy() / scale) + zero, 0, 255).astype(np.int64) - zero
    sums = x @ stored["0.weight"].astype(np.int64).T + stored["0.bias"].astype(np.int64)
    np.testing.assert_allclose(result.module(VECTORS).numpy(), sums * stored["0.bias_scale"], rtol=1e-5, atol=1e-5)


def test_ranges_are_taken_over_all_batches() -> None:
    """The widest values are in different batches."""
    low, high = VECTORS.clone(), VECTORS.clone()
    low[0, 0], high[0, 0] = -9.0, 20.0
    result = quantize(nn.Sequential(nn.Linear(10, 3)), [VECTORS, low, high, VECTORS])
    scale, zero = activation_nodes(result)[0]
    assert scale == pytest.approx(29 / 255, rel=1e-6)
    assert zero == round(9 * 255 / 29)


def test_a_histogram_cuts_off_what_is_rare() -> None:
    values = VECTORS.repeat(500, 1)
    values[0, 0] = 100.0
    model = nn.Sequential(nn.Linear(10, 3))
    coarse, fine = (quantize(model, [values], observer=observer) for observer in ("min_max", "histogram"))
    (wide, _), (narrow, _) = (activation_nodes(result)[0] for result in (coarse, fine))
    assert wide == pytest.approx((100 - float(VECTORS.min())) / 255, rel=1e-6)
    assert narrow < 0.5 * wide
    expected = model(VECTORS).detach()
    noises = [signal_to_noise(expected, result.module(VECTORS)) for result in (fine, coarse)]
    assert noises[0] > noises[1] + 6


def test_parameters_keep_their_names() -> None:
    """The integers stand under the parameter's own name, scale and zero point beside it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    result = check_pass(QuantizeStatic(kernels="all"), model.eval(), IMAGES, calibration_data=[IMAGES])
    names = {f"{module}.{kind}" for module in ("0", "4") for kind in ("weight", "bias")}
    beside = {f"{name}_{suffix}" for name in names for suffix in ("scale", "zero_point")}
    assert set(result.module.state_dict()) == names | beside
    assert dict(result.module.named_parameters()) == {}
    assert result.report.rows[-1].parameters == 3 * 4 * 9 + 4 + 400 * 5 + 5, "the bias that folding made counts too"


# The file against PyTorch, and the kernels that ONNX Runtime runs.


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.body(x) + self.shortcut(x))


class HuggingFaceConv1D(nn.Module):
    """A linear layer that keeps its weight as inputs × outputs, as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.lm_head(torch.tanh(self.hidden(self.embedding(tokens))))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(20 * self.conv(x))


def convolutions(*layers: nn.Module) -> nn.Module:
    """A 3 × 3 convolution to 8 channels, `layers`, and a convolution to 4."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.LazyConv2d(4, 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, int]]] = {
    "relu6": (lambda: convolutions(nn.ReLU6()), 4 * IMAGES, {"QLinearConv": 2, "Clip": 0}),
    "layers": (
        lambda: convolutions(
            Apply(lambda x: x.clamp(min=0.2)),
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ReLU(),
        ),
        IMAGES,
        {"QLinearConv": 4},
    ),
    "between": (
        lambda: convolutions(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Sigmoid(), nn.LeakyReLU(), nn.AdaptiveAvgPool2d(2)),
        IMAGES,
        {"QLinearConv": 2, "NhwcMaxPool": 1, "QLinearSigmoid": 1, "QLinearLeakyRelu": 1, "QLinearAveragePool": 1},
    ),
    "clamp_above_zero": (lambda: convolutions(Apply(lambda x: x.clamp(min=0.2))), IMAGES, {"QLinearConv": 2}),
    "padded_by_name": (lambda: convolutions(nn.Conv2d(8, 8, 3, padding="same")), IMAGES, {"QLinearConv": 3}),
    "depthwise": (lambda: convolutions(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()), IMAGES, {"QLinearConv": 3}),
    "pools": (
        lambda: convolutions(nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(2)),
        IMAGES,
        {"QLinearConv": 2, "NhwcMaxPool": 1, "QLinearAveragePool": 1},
    ),
    "activations": (
        lambda: convolutions(nn.Sigmoid(), nn.LeakyReLU(), nn.AvgPool2d(2, 2, 1)),
        IMAGES,
        {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearLeakyRelu": 1, "QLinearAveragePool": 1},
    ),
    "resizes": (
        lambda: convolutions(nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.Conv2d(2, 8, 3)),
        IMAGES,
        {"QLinearConv": 3, "Resize": 1, "DepthToSpace": 1, "DequantizeLinear": 1},
    ),
    "head": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)),
        IMAGES,
        {"QLinearConv": 1, "QGemm": 1},
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(6, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)),
        SEQUENCES,
        {"QLinearConv": 2},
    ),
    "linear_3d": (
        lambda: nn.Sequential(nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 3)),
        SEQUENCES,
        {"MatMulIntegerToFloat": 2},
    ),
    "addmm": (
        lambda: nn.Sequential(HuggingFaceConv1D(8, 10), nn.GELU(), HuggingFaceConv1D(5, 8)),
        SEQUENCES,
        {"QGemm": 2},
    ),
    "tied": (Tied, torch.arange(18).view(6, 3), {"MatMulIntegerToFloat": 2, "Gather": 2}),
    "called_twice": (CalledTwice, IMAGES, {"QLinearConv": 2}),
}
FLOAT_KERNELS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MaxPool")


SLOW = {"relu6", "head", "addmm", "clamp_above_zero", "padded_by_name", "depthwise", "pools", "activations"}
"""What others have too: `layers` the convolutions and the clamp, `between` pools and activations, and for linear layers
of two dimensions, which `addmm` becomes, there is another test."""


@pytest.mark.parametrize("kind", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS])
def test_the_file_runs_as_integers_and_agrees_with_pytorch(kind: str, tmp_path: Path) -> None:
    make, x, kernels = NETWORKS[kind]
    model = make().eval()
    model(x)
    result = quantize(model, x)
    artifact = result.export(tmp_path / "model.onnx")
    found = artifact.details["kernels"]
    assert {name: found.get(name, 0) for name in kernels} == kernels
    assert not set(FLOAT_KERNELS) & set(found)
    with torch.no_grad():
        expected = result.module(x).numpy()
    difference = np.abs(run_file(artifact, x) - expected) / np.abs(expected).max()
    assert difference.max() <= 0.02, "a step of rounding at most"
    assert np.median(difference) <= 1e-6
    assert signal_to_noise(model(x), result.module(x)) > 30


ACTIVATIONS = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardsigmoid,
    nn.ReLU6,
    nn.GELU,
)
"""Most of them are merged into a float product of two dimensions, which no integer kernel takes the place of then."""


@pytest.mark.parametrize(
    "activation", [ACTIVATIONS[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ACTIVATIONS[1:])]
)
def test_a_flat_layer_runs_as_integers_whatever_follows(activation: type[nn.Module], tmp_path: Path) -> None:
    result = quantize(nn.Sequential(nn.Linear(10, 8), activation(), nn.Hardswish()).eval(), ROWS)
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.details["kernels"].get("QGemm") == 1
    assert not set(FLOAT_KERNELS) & set(artifact.details["kernels"])
    expected = result.module(ROWS).detach().numpy()
    assert np.abs(run_file(artifact, ROWS) - expected).max() <= 0.02 * np.abs(expected).max(), "a step of rounding"


def small_resnet() -> nn.Module:
    def norm(*layers: nn.Module) -> list[nn.Module]:
        return [*layers, nn.BatchNorm2d(layers[-1].out_channels)]  # type: ignore[arg-type]

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        body = nn.Sequential(
            *norm(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)),
            nn.ReLU(inplace=True),
            *norm(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)),
        )
        shortcut = nn.Sequential(*norm(nn.Conv2d(inputs, outputs, 1, stride, bias=False))) if stride > 1 else None
        return Residual(body, shortcut)

    return nn.Sequential(
        *norm(nn.Conv2d(3, 8, 3, 2, 1, bias=False)),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        block(8, 8, 1),
        block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def test_every_convolution_of_a_small_resnet_runs_as_integers(tmp_path: Path) -> None:
    model = small_resnet()
    x = torch.randn(6, 3, 16, 16)
    model(x)  # statistics of the norms
    model.eval()
    result = quantize(model, x, observer="histogram")
    artifact = result.export(tmp_path / "model.onnx")
    kernels = artifact.details["kernels"]
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert kernels["QLinearConv"] == count == 6
    assert kernels["QLinearAdd"] == 2
    assert kernels["QGemm"] == 1
    assert not set(FLOAT_KERNELS) & set(kernels)
    assert artifact.parity < 0.02
    assert signal_to_noise(model(x), result.module(x)) > 30
    float_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert result.report.rows[-1].bytes < 0.45 * float_bytes


# Values at the edges of what integers hold.


def test_a_dead_channel_keeps_its_bias(tmp_path: Path) -> None:
    """Its weight scale would be tiny, and the bias, at input scale × weight scale, would overflow int32."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[1:3] = 0
        model.get_parameter("0.bias")[1:3] = torch.tensor([2.0, -50.0])
    result = quantize(model, IMAGES)
    step = activation_nodes(result)[-1][0]
    output = result.module(IMAGES)
    assert float((output[:, 1] - 2).abs().max()) <= step
    assert not bool(output[:, 2].any())
    assert not state(result)["0.weight"][1:3].any()
    from_file = run_file(result.export(tmp_path / "model.onnx"), IMAGES)
    np.testing.assert_array_equal(from_file[:, 1], output[:, 1].numpy())


def test_a_nearly_dead_channel_with_a_large_bias_is_bias(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 3)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[1] = 1e-12
        model.get_parameter("0.bias").copy_(torch.tensor([0.5, 1e4, -3.0]))
    result = quantize(model, VECTORS)
    np.testing.assert_allclose(result.module(VECTORS)[:, 1].numpy(), 1e4, rtol=1e-6)
    np.testing.assert_allclose(run_file(result.export(tmp_path / "model.onnx"), VECTORS)[:, 1], 1e4, rtol=1e-6)
    assert signal_to_noise(model(VECTORS)[:, ::2], result.module(VECTORS)[:, ::2]) > 35


def test_a_nearly_dead_channel_of_a_product_over_sequences_keeps_its_bias(tmp_path: Path) -> None:
    """Its bias stays float here; ONNX Runtime quantizes it by itself, at input scale × weight scale."""
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model.get_parameter("0.weight")[1] = 1e-12
        model.get_parameter("0.bias")[1] = 2.0
    x = torch.randn(4, 5, 10)
    result = quantize(model, x)
    from_file = run_file(result.export(tmp_path / "model.onnx"), x)
    assert signal_to_noise(result.module(x), torch.from_numpy(from_file)) > 60
    assert signal_to_noise(model(x), result.module(x)) > 25


@pytest.mark.parametrize("observer", ["min_max", "histogram"])
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_quantization_does_not_depend_on_the_unit_of_measurement(size: float, observer: Observer) -> None:
    """Without a bias a convolution is linear: inputs a billion times smaller give outputs that much smaller."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False))
    plain = quantize(model, IMAGES, observer=observer).module(IMAGES)
    scaled = quantize(model, IMAGES * size, observer=observer).module(IMAGES * size)
    assert signal_to_noise(model(IMAGES), plain) > 30
    assert signal_to_noise(plain, scaled / size) > 40


def test_an_input_that_never_moves_is_no_trouble(tmp_path: Path) -> None:
    model = nn.Sequential(Apply(lambda x: x * 0), nn.Conv2d(3, 4, 1))
    result = quantize(model, IMAGES)
    assert signal_to_noise(model(IMAGES), result.module(IMAGES)) > 35
    result.export(tmp_path / "model.onnx")


def test_zeros_of_pruned_weights_stay_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)).eval()
    pruned = lobo_fx.compile(model, [PruneWeights(0.7)], example_inputs=IMAGES, progress=False)
    result = quantize(model, IMAGES, passes=[PruneWeights(0.7)])
    for name in ("0.weight", "4.weight"):
        zeros = state(pruned)[name] == 0
        integers = state(result)[name]
        assert integers.dtype == np.int8
        assert not integers[zeros].any()
        assert (integers[~zeros] != 0).mean() > 0.9
    assert result.report.rows[-1].sparsity >= result.report.rows[1].sparsity
    assert signal_to_noise(pruned.module(IMAGES), result.module(IMAGES)) > 30


def test_a_tied_embedding_that_is_to_stay_float_stands_beside_the_integers() -> None:
    model, tokens = Tied(), torch.arange(18).view(6, 3)
    result = quantize(model, tokens, overrides={"embedding": "float"}, target="x86-vnni")
    found = [array for array in state(result).values() if array.shape == (20, 8)]
    assert sorted(str(array.dtype) for array in found) == ["float32", "int8"]
    weight = model.embedding.weight.detach().numpy()
    by_type = {str(array.dtype): array for array in found}
    np.testing.assert_array_equal(by_type["float32"], weight)
    np.testing.assert_array_equal(by_type["int8"], to_integers(weight, weight_parameters(weight)[:, None], -127, 127))
    assert result.report.rows[-1].parameters == result.report.rows[0].parameters


def test_a_tied_embedding_looks_up_what_products_multiply_with(
    free_integers: Callable[[], str], tmp_path: Path
) -> None:
    model, tokens = Tied(), torch.arange(18).view(6, 3)
    quantize(model, tokens, kernels="cheapest")  # measures what costs the table must have
    result = quantize(model, tokens, kernels="cheapest", costs=free_integers())
    found = [array for array in state(result).values() if array.shape == (20, 8)]
    assert [str(array.dtype) for array in found] == ["int8"]
    assert result.report.rows[-1].parameters == result.report.rows[0].parameters
    assert len({"embedding.weight", "lm_head.weight"} & state(result).keys()) == 1
    assert signal_to_noise(model(tokens), result.module(tokens)) > 30
    artifact = result.export(tmp_path / "model.onnx", confirm=False)
    content = onnx.load(artifact.path)
    sizes = [math.prod(tensor.dims) for tensor in content.graph.initializer]
    assert sizes.count(160) == 1
    assert any("Integer" in kernel or "QGemm" in kernel for kernel in artifact.details["kernels"])


@pytest.mark.parametrize("pool", ["int8", "float"])
def test_what_is_quantized_is_not_rounded_again(pool: str, free_integers: Callable[[], str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(9 * 49, 5))
    images, ops = torch.randn(6, 3, 16, 16), torch.ops.quantized_decomposed
    earlier = QuantizeStatic("min_max", kernels="all", overrides={"2": "float"} if pool == "float" else {})
    again: dict[str, Any] = {"observer": "percentile", "kernels": "cheapest", "passes": [earlier]}
    quantize(model, images, **again)  # measures what costs the table must have
    twice = quantize(model, images, **again, costs=free_integers())
    once = lobo_fx.compile(
        model, [earlier], example_inputs=images[:2], calibration_data=[images[:2], images[2:]], progress=False
    )
    (node,) = twice.program.graph.find_nodes(op="call_function", target=torch.ops.aten.avg_pool2d.default)
    assert {user.target for user in node.users} == {ops.quantize_per_tensor.default}  # placed by one of the passes
    pairs = twice.program.graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default)
    assert all(pair.args[0].target is not ops.dequantize_per_tensor.default for pair in pairs)
    assert all(node.users for node in twice.program.graph.nodes if node.op == "call_function")
    assert torch.equal(once.module(images), twice.module(images))


@pytest.mark.parametrize("why", ["coarse", "overridden", "read"])
def test_a_tied_embedding_keeps_values_of_its_own_where_codes_would_not_do(
    why: str, free_integers: Callable[[], str]
) -> None:
    class Read(Tied):
        def forward(self, tokens: torch.Tensor) -> Any:
            found = super().forward(tokens)
            return found + self.embedding.weight[tokens].sum() if why == "read" else found

    model, tokens = Read(), torch.arange(18).view(6, 3)
    if why == "coarse":  # a token that must not come out, but may come in
        model.lm_head.bias = nn.Parameter(torch.zeros(20))
        model.lm_head.bias.data[3] = -1e9
    overrides = {"embedding": "float"} if why == "overridden" else {}
    settings: dict[str, Any] = {"kernels": "cheapest", "overrides": overrides}
    quantize(model, tokens, **settings)
    result = quantize(model, tokens, costs=free_integers(), **settings)
    (lookup,) = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    noises = signal_to_noise(model.embedding.weight, lookup_table(result, lookup))
    assert noises > (100 if why != "coarse" else 35)


def lookup_table(result: Result, lookup: torch.fx.Node) -> torch.Tensor:
    """What a lookup reads."""
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in result.program.graph.nodes:
        if node is lookup:
            graph.output(values[node.all_input_nodes[0]])
            break
        values[node] = graph.node_copy(node, values.__getitem__)
    module = torch.fx.GraphModule(result.program.module, graph)
    found: torch.Tensor = module(torch.arange(18).view(6, 3))
    return found


def test_numbers_that_are_computed_may_be_added_and_multiplied_with(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.logit_scale = nn.Linear(10, 10), nn.Parameter(torch.tensor(0.3))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.linear(x)
            return (y + y.mean()) * self.logit_scale.exp()

    model = Scaled()
    result = quantize(model, VECTORS, kernels="cheapest")
    assert signal_to_noise(model(VECTORS), result.module(VECTORS)) > 30
    result.export(tmp_path / "model.onnx", confirm=False)


def test_a_computed_weight_stays_float_and_is_reported() -> None:
    weight = torch.randn(4, 3, 3, 3)
    model = Apply(lambda x: F.conv2d(x, weight * x.mean()).relu())
    result = quantize(model, IMAGES)
    assert activation_nodes(result) == []
    assert any("stays float: its weight is computed" in note for note in result.report.notes)
    assert torch.allclose(result.module(IMAGES), model(IMAGES), rtol=0, atol=1e-6)


def test_quantizing_twice_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    once = quantize(model, IMAGES)
    twice = quantize(model, IMAGES, passes=[QuantizeStatic(observer="min_max", kernels="all")])
    assert activation_nodes(twice) == activation_nodes(once) != []
    assert torch.equal(twice.module(IMAGES), once.module(IMAGES))


# What keeps accuracy.


class Biased(nn.Module):
    """Two convolutions, of groups and with a stride, and a linear layer; some weights are pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.head = nn.Linear(8 * 16, 5)
        for layer in (self.first, self.second, self.head):
            layer.weight.data[torch.rand_like(layer.weight) < 0.3] = 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


@pytest.mark.parametrize("overrides", [{}, {"head": "float"}, {"first": "float"}])
def test_biases_take_back_the_mean_error_of_the_outputs(overrides: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = Biased().eval()
    images = torch.randn(24, 3, 12, 12)
    means = []
    for correct_bias in (False, True):
        result = quantize(model, images, correct_bias=correct_bias, overrides=overrides, target="x86-vnni")
        error = (result.module(images) - model(images)).detach().double()
        means.append(error.mean(0).norm().item())
    chance = (error.var(0) / len(error)).sqrt()
    assert bool((error.mean(0).abs() < chance + 1e-4).all()), "what rows do not agree on stays"
    assert means[1] < 0.9 * means[0]


def test_means_are_shrunk_by_what_chance_puts_there() -> None:
    errors = torch.tensor([[1.0, 3.0, 1.0, 2.0], [1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    # means 1, 2, 0, 0.5; variances of the means 0, 1, 1, 2.25
    np.testing.assert_allclose(shrunken_mean(errors), [1.0, 2 * (1 - 1 / 4), 0.0, 0.0])
    assert not shrunken_mean(errors[:1]).any()


def test_a_correction_from_few_rows_does_no_harm_to_others() -> None:
    torch.manual_seed(0)
    model = Biased().eval()
    unseen = torch.randn(60, 3, 12, 12)
    noises = []
    for correct_bias in (False, True):
        result = quantize(model, IMAGES[:3], correct_bias=correct_bias)
        noises.append(signal_to_noise(model(unseen), result.module(unseen)))
    assert noises[1] > noises[0] - 0.05


@pytest.mark.parametrize("image", [torch.randn(3, 12, 12), torch.randn(3, 12, 12)[:, :8]])
def test_layers_without_a_batch_are_corrected_too(image: torch.Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(0), nn.LazyLinear(5)).eval()
    model(image)
    settings: dict[str, Any] = {"example_inputs": image, "dynamic_shapes": None, "progress": False}
    result = lobo_fx.compile(model, [QuantizeStatic(kernels="all")], calibration_data=[image, 2 * image], **settings)
    assert signal_to_noise(model(image), result.module(image)) > 25


def test_a_bias_that_others_read_is_left_alone() -> None:
    shared = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    shared[2].bias = shared[0].bias
    corrected, plain = (state(quantize(shared, VECTORS, correct_bias=correct)) for correct in (True, False))
    assert corrected.keys() == plain.keys()
    assert all(np.array_equal(corrected[name], plain[name]) for name in plain)


@pytest.mark.parametrize("target", ["x86-vnni", "x86-avx2"])
def test_compensated_rounding_serves_the_outputs(target: str) -> None:
    torch.manual_seed(0)
    model = Biased().eval()
    mix = torch.randn(3, 3)
    mixed, unseen = (torch.einsum("bcxy,cd->bdxy", torch.randn(60, 3, 12, 12), mix) for _ in range(2))
    settings: dict[str, Any] = {"target": target, "correct_bias": False}
    nearest = quantize(model, mixed, rounding="nearest", **settings)
    result = quantize(model, mixed, rounding="compensated", **settings)
    limit = 127 if target == "x86-vnni" else 63
    for name in ("first", "second", "head"):
        codes, others = (state(found)[f"{name}.weight"].astype(np.int64) for found in (result, nearest))
        assert np.abs(codes - others).max() in (1, 2), "a code near the nearest"
        assert not codes[model.get_parameter(f"{name}.weight").detach().numpy() == 0].any()
        np.testing.assert_array_equal(np.abs(codes).reshape(len(codes), -1).max(1), limit)
    noises = []
    for found in (nearest, result):  # what the rounding of weights alone does
        rounded = copy.deepcopy(model)
        for name in ("first", "second", "head"):
            stored, scale = (torch.from_numpy(state(found)[f"{name}.weight{end}"]).float() for end in ("", "_scale"))
            rounded.get_parameter(f"{name}.weight").data = stored * scale.view(-1, *[1] * (stored.dim() - 1))
        noises.append(signal_to_noise(model(unseen), rounded(unseen)))
    assert noises[1] > noises[0] + 0.5


# Calibration data.


def calibrated_on(data: Any) -> Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    pass_ = QuantizeStatic(observer="min_max", kernels="all")
    return lobo_fx.compile(model, [pass_], example_inputs=IMAGES, calibration_data=data, progress=False)


def one_shot() -> Iterator[torch.Tensor]:
    yield IMAGES


def broken(value: float) -> torch.Tensor:
    batch = IMAGES.clone()
    batch[1, 2, 3, 4] = value
    return batch


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "needs calibration_data="),
        ([], "calibration_data is empty"),
        (one_shot(), r"one-shot iterator \(generator\)"),
        ([IMAGES[:, :2]], r"calibration_data, batch 0: .*\[6, 2, 12, 12\]"),
        ([IMAGES, IMAGES[:, :, :5]], r"calibration_data, batch 1: .*\[6, 3, 5, 12\]"),
        ([IMAGES, IMAGES, IMAGES.double()], r"calibration_data, batch 2: .*float64"),
        ([IMAGES, "images"], "calibration_data, batch 1: a batch is a str"),
        ([IMAGES, broken(math.nan)], "calibration_data, batch 1 holds NaN or infinity"),
        ([IMAGES, broken(math.inf)], "calibration_data, batch 1 holds NaN or infinity"),
        ([{"picture": IMAGES}], r"calibration_data, batch 0: .*missing \['input'\]"),
    ],
)
def test_calibration_data_that_can_not_work_is_refused(data: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        calibrated_on(data)


@pytest.mark.parametrize("observer", ["min_max", "histogram"])
def test_ranges_that_are_infinite_are_refused_and_the_layer_named(observer: Observer) -> None:
    model = nn.Sequential(nn.Linear(10, 4), Apply(torch.exp), nn.Linear(4, 3)).eval()
    with pytest.raises(InvalidInput, match=r"infinite range at aten\.exp"):
        lobo_fx.compile(
            model,
            [QuantizeStatic(observer=observer, kernels="all")],
            example_inputs=VECTORS,
            calibration_data=[VECTORS, 1e4 * VECTORS],
            progress=False,
        )


def test_a_first_input_without_dimensions_is_no_trouble() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 7)

        def forward(self, t: torch.Tensor, x: torch.Tensor) -> Any:
            return self.layer(x) * t

    model = Timed()
    result = quantize(model, [(torch.tensor(0.5), VECTORS)], target="x86-vnni")
    weight = model.layer.weight.detach().numpy()
    expected = to_integers(weight, along(weight_parameters(weight), 2), -127, 127)
    np.testing.assert_array_equal(state(result)["layer.weight"], expected)
    assert signal_to_noise(model(torch.tensor(0.5), VECTORS), result.module(torch.tensor(0.5), VECTORS)) > 30


def test_without_facts_about_the_cpu_weights_have_the_bit_less_that_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    monkeypatch.setattr("pathlib.Path.read_text", mock.Mock(side_effect=FileNotFoundError))
    assert target_of_this_machine() == "x86-avx2"


def test_labels_are_ignored_and_loaders_accepted() -> None:
    dataset = torch.utils.data.TensorDataset(IMAGES, torch.arange(6))
    from_loader = calibrated_on(torch.utils.data.DataLoader(dataset, batch_size=4))
    from_list = calibrated_on([IMAGES[:4], IMAGES[4:]])
    by_name = calibrated_on([{"input": IMAGES, "labels": torch.arange(6)}])
    assert activation_nodes(from_loader) == activation_nodes(from_list) == activation_nodes(by_name)


def test_data_is_read_batch_by_batch_and_as_often_as_asked() -> None:
    class Generated:
        """Makes its batches anew every time it is read, and holds none."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            for index in range(5):
                yield IMAGES + index

    data = Generated()
    first = activation_nodes(calibrated_on(data))
    assert activation_nodes(calibrated_on(data)) == first
    rows = seen(torch.cat(list(data)))
    low, high = float(rows.min()), float(rows.max())
    assert first[0][0] == pytest.approx((high - low) / 255, rel=1e-5)


@pytest.mark.parametrize(
    ("observer", "words"), [("minmax", "did you mean min_max"), *((value, "known: entropy") for value in ("", None, 3))]
)
def test_an_unknown_observer_is_refused(observer: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"^observer is {observer!r}; {words}"):
        QuantizeStatic(observer=observer, kernels="all")


# Accuracy.


def test_a_trained_network_loses_less_than_a_point(tmp_path: Path) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    train, test = order[:1100], order[1100:]
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in torch.split(train[torch.randperm(len(train), generator=generator)], 50):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return float((module(images[test]).argmax(1) == labels[test]).double().mean())

    result = lobo_fx.compile(
        model,
        [QuantizeStatic(kernels="all")],
        example_inputs=images[:2],
        calibration_data=torch.split(images[train[:200]], 50),
        evaluate=score,
        progress=False,
    )
    before, after = (row.score for row in result.report.rows)
    assert before is not None
    assert after is not None
    assert before == score(model) > 0.95
    assert after == score(result.module)
    assert after > before - 0.01
    artifact = result.export(tmp_path / "model.onnx")
    predicted = run_file(artifact, images[test]).argmax(1)
    agreeing = float((torch.from_numpy(predicted) == result.module(images[test]).argmax(1)).double().mean())
    assert agreeing > 0.995


# --- norms that stay, and parts that one scale would drown -------------------------------------------------


class TwoReaders(nn.Module):
    """A convolution whose result a norm reads, and a sum after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return torch.as_tensor(self.norm(x) + x)


class NormPerLevel(TwoReaders):
    """One convolution for two levels, each with a norm of its own (RetinaNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(self.conv(x)).mean((2, 3)) + self.other(self.conv(x[..., ::2])).mean((2, 3)))


class TiedWeight(TwoReaders):
    """Two convolutions with one weight, a norm after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Conv2d(3, 8, 3)
        self.twin.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.norm(self.conv(x)) + self.twin(x))


class OfTheBatch(TwoReaders):
    """A norm with the statistics of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        *((kind, "static") for kind in (TwoReaders, NormPerLevel, TiedWeight, OfTheBatch)),
        (OfTheBatch, "mixed"),
        *(pytest.param(kind, "mixed", marks=pytest.mark.slow) for kind in (TwoReaders, NormPerLevel, TiedWeight)),
    ],
)
def test_norms_that_can_not_be_folded_stay(kind: type[TwoReaders], passes: str) -> None:
    """A library would fold them, whoever else reads the convolution or shares its weight."""
    torch.manual_seed(0)
    model = kind().eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)  # type: ignore[union-attr]
            norm.weight.data.uniform_(0.5, 3)
    chosen = (
        QuantizeStatic(kernels="all")
        if passes == "static"
        else MixedPrecision(20, quantizer=QuantizeStatic(kernels="all"))
    )
    result = lobo_fx.compile(model, [chosen], example_inputs=IMAGES, calibration_data=[IMAGES], progress=False)
    norms = [node for node in result.module.graph.nodes if is_call(node, torch.ops.aten.batch_norm.default)]
    assert norms
    assert signal_to_noise(model(IMAGES), result.module(IMAGES)) > 25


class Detector(nn.Module):
    """Boxes in pixels and scores below one, joined or as channels of one layer."""

    def __init__(self, joined: bool, boxes: float) -> None:
        super().__init__()
        self.joined = joined
        self.first, self.box, self.score = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.both = nn.Conv2d(8, 10, 1)
        with torch.no_grad():
            self.box.weight.mul_(boxes)
            self.both.weight[:4].mul_(boxes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        return torch.cat([self.box(x), self.score(x)], 1) if self.joined else torch.as_tensor(self.both(x))


def test_what_a_layer_gives_may_be_split() -> None:
    """A split gives a list, which has no shape (MixNet)."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = torch.split(self.first(x), [4, 4], 1)
            return torch.cat([self.left(left), self.right(right)], 1)

    torch.manual_seed(0)
    model = Split().eval()
    assert signal_to_noise(model(IMAGES), quantize(model, IMAGES).module(IMAGES)) > 25


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("boxes", [500.0, 1.0])
def test_one_scale_drowns_no_part(joined: bool, boxes: float) -> None:
    torch.manual_seed(0)
    model = Detector(joined, boxes).eval()
    result = quantize(model, IMAGES)
    before, after = model(IMAGES), result.module(IMAGES)
    assert signal_to_noise(before[:, 4:], after[:, 4:]) > 20
    drowned = [note for note in result.report.notes if "one scale would leave" in note]
    assert bool(drowned) == (boxes > 1)
    if drowned:
        assert ("'score' gives" if joined else "a channel of the output") in drowned[0]


@pytest.mark.parametrize("settings", [{"costs": 5}, {"costs": True}, {"target": []}], ids=str)
def test_settings_of_another_type_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=f"{next(iter(settings))} is .*it must be"):
        QuantizeStatic(**settings)


def test_every_pair_of_rows_is_compared_though_batches_differ_in_size() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            return self.encode(a) @ self.encode(b).t()

    torch.manual_seed(0)
    model, batches = Siamese(), [(torch.randn(rows, 6), torch.randn(rows, 6)) for rows in (3, 4, 5)]
    passes = [QuantizeStatic(kernels="all")]
    result = lobo_fx.compile(model, passes, example_inputs=batches[0], calibration_data=batches, progress=False)
    assert signal_to_noise(model(*batches[2]), result.module(*batches[2])) > 20


def test_time_steps_are_no_channels() -> None:
    """Quiet steps of a sequence share the scale of loud ones; a channel that is quiet throughout is drowned."""

    class Steps(nn.Module):
        def __init__(self, quiet_channel: float) -> None:
            super().__init__()
            linears = [nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 4)]
            for linear in linears:
                linear.bias.data.zero_()
            for linear in linears[1:]:
                linear.weight.data[0] *= quiet_channel
            self.layers = nn.ModuleList(linears)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.layers[0](x).relu()
            return self.layers[1](hidden) + self.layers[2](hidden)

    generator = torch.Generator().manual_seed(0)
    loudness = torch.tensor([1.0, 1e-4]).repeat(3)[:, None]
    batches = [torch.randn(4, 6, 6, generator=generator) * loudness for _ in range(2)]
    for quiet, drowned in ((1.0, False), (1e-4, True)):
        torch.manual_seed(0)
        model = Steps(quiet)
        passes = [QuantizeStatic(kernels="all")]
        result = lobo_fx.compile(model, passes, example_inputs=batches[0], calibration_data=batches, progress=False)
        assert any("one scale would leave a channel of the output" in note for note in result.report.notes) == drowned
