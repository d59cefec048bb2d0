"""Weight-only quantization: the numbers against numpy, the files against PyTorch, by size and by kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from sklearn import covariance
from torch import nn

import lobo_fx
from lobo_fx import Artifact, InvalidInput, Result
from lobo_fx.measures.counts import measure
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.own_operators.decode import DECODE, decode
from lobo_fx.own_operators.formats import FORMATS, unpack
from lobo_fx.own_operators.products import PRODUCT
from lobo_fx.passes import PruneWeights, QuantizeStatic, QuantizeWeights
from lobo_fx.passes.fitting import layer_grams
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.quantization.codes import product_kernels
from lobo_fx.passes.quantization.codes.gptq import round_compensated
from lobo_fx.passes.quantization.codes.rounding import Rounded, round_nearest
from lobo_fx.passes.quantization.codes.weights import Weight
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost
from lobo_fx.testing import check_pass

Array = npt.NDArray[Any]
Method = Literal["auto", "round", "hqq", "gptq"]
TOKENS = torch.arange(14).view(2, 7)
VECTORS = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
DECODING = ("Split", "BitwiseOr")


class Priced(CostTable):
    """A table that knows every product, by what it takes as a share of float's: (bits, level, rows) to a ratio."""

    def __init__(self) -> None:
        super().__init__("test", {})
        self.share: Callable[[int, int, int], float | None] = lambda bits, level, rows: 0.5 if bits + level == 5 else 2
        self.asked: set[str] = set()

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        self.asked |= {kernel.key for kernel in kernels}
        return []

    def find(self, kernel: Kernel) -> Cost | NoCost:
        settings = dict(kernel.settings)
        share = self.share(settings["bits"], settings["level"], kernel.shapes[0][0])  # type: ignore[arg-type]
        return NoCost("the test says so") if share is None else Cost(10.0, 10.0 * share)


@pytest.fixture(autouse=True, name="priced")
def priced_fixture(monkeypatch: pytest.MonkeyPatch) -> Priced:
    """Unless a test says otherwise, float activations are fast with 4 bits and slow with 8, and int8 always slow."""
    table = Priced()
    monkeypatch.setattr(product_kernels, "open_table", lambda path: table)
    return table


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def quantize(model: nn.Module, example: torch.Tensor, *passes: Any, **settings: Any) -> Result:
    return lobo_fx.compile(model, passes, example_inputs=example, progress=False, **settings)


def state(result: Result) -> dict[str, torch.Tensor]:
    return result.module.state_dict()


def weight_of(result: Result, name: str, format: str, shape: list[int], block_size: int) -> Array:
    """A stored weight, decoded."""
    found = state(result)
    zero_point = found.get(f"{name}_zero_point")
    values: Array = decode(found[name], found[f"{name}_scale"], zero_point, format, shape, block_size).numpy()
    return values


def run_file(artifact: Artifact, example: torch.Tensor) -> Array:
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    return np.asarray(output)


def stored_bytes(artifact: Artifact) -> int:
    """Bytes of the tensors in a file."""
    tensors = onnx.load(artifact.path).graph.initializer
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)


class InputsTimesOutputs(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class EveryKind(nn.Module):
    """Each operator that reads a weight; rows of 40, 48, 33 and 147 entries do not divide into blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 48)
        self.recurrent = nn.LSTM(48, 20, batch_first=True, bidirectional=True)
        self.linear, self.addmm = nn.Linear(40, 33), InputsTimesOutputs(33, 64)
        self.factor = nn.Parameter(0.1 * torch.randn(64, 49))
        self.conv, self.turned = nn.Conv2d(3, 8, 7), nn.ConvTranspose1d(8, 4, 3)

    def forward(self, tokens: torch.Tensor) -> Any:
        hidden = self.addmm(torch.relu(self.linear(self.recurrent(self.embedding(tokens))[0])))
        image = (hidden @ self.factor)[:, :3].unflatten(-1, (7, 7))
        return self.turned(self.conv(torch.nn.functional.pad(image, (3, 3))).flatten(2))


class Layer(nn.Module):
    """A layer of a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = InputsTimesOutputs(width, 3 * width), InputsTimesOutputs(width, width)
        self.up, self.down = InputsTimesOutputs(width, 4 * width), InputsTimesOutputs(4 * width, width)

    def forward(self, x: torch.Tensor) -> Any:
        parts = self.qkv(self.norm_1(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class Decoder(nn.Module):
    """GPT-2 in small: the output layer is tied to the embedding."""

    def __init__(self, width: int = 64, vocabulary: int = 500) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(vocabulary, width), Layer(width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.norm(self.layer(self.tokens(tokens))))


# The numbers.


def test_int8_is_the_arithmetic_it_stands_for() -> None:
    model = nn.Sequential(nn.Linear(70, 5))
    result = check_pass(QuantizeWeights("int8"), model, torch.randn(4, 70))
    weight = model.get_parameter("0.weight").detach().numpy()
    blocks = np.pad(weight, ((0, 0), (0, 26))).reshape(5, 3, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    codes = np.clip(np.round(blocks / scale[..., None]), -127, 127).reshape(5, 96)[:, :70]
    np.testing.assert_array_equal(state(result)["0.weight"].numpy(), codes)
    np.testing.assert_array_equal(state(result)["0.weight_scale"].numpy(), scale)
    assert list(state(result)) == ["0.bias", "0.weight", "0.weight_scale"]
    assert [name for name, _ in result.module.named_parameters()] == ["0.bias"]
    expected = VECTORS.new_tensor(codes * np.repeat(scale, 32, 1)[:, :70])
    x = torch.randn(3, 70)
    assert torch.equal(result.module(x), nn.functional.linear(x, expected, model.get_parameter("0.bias")))


@pytest.mark.parametrize("name", ["log2_8", "e4m3", "e5m2", "e3m4"])
def test_eight_bits_put_the_largest_weight_of_a_row_on_the_largest_code(name: str) -> None:
    weight = torch.randn(4, 50)
    rounded = round_nearest(weight, FORMATS[name], 50)
    largest = FORMATS[name].largest
    np.testing.assert_allclose(rounded.scale[:, 0], weight.abs().amax(1) / largest, rtol=1e-6)
    expected = FORMATS[name].encode(weight / rounded.scale)
    assert torch.equal(rounded.codes, expected)


def rounded_to_four_bits(weight: Array, block_size: int) -> Array:
    """Round to nearest between the smallest and the largest weight of a block, as ONNX Runtime's quantizer does."""
    blocks = weight.reshape(len(weight), -1, block_size)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    scale = (high - low) / 15
    zero = np.round(-low / scale)
    codes = np.clip(np.round(blocks / scale) + zero, 0, 15)
    return np.asarray((codes - zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize("method", ["round", "hqq"])
def test_int4_is_nearer_than_plain_rounding(method: Method) -> None:
    weight = np.random.default_rng(0).standard_t(4, (16, 128)).astype(np.float32)
    model = nn.Sequential(nn.Linear(128, 16, bias=False))
    model[0].weight.data = torch.from_numpy(weight)
    result = quantize(model, torch.randn(2, 128), QuantizeWeights("int4", method=method))
    found = weight_of(result, "0.weight", "int4", [16, 128], 32)
    power = 2.0 if method == "round" else 0.7
    errors = [np.abs(w - weight).reshape(16, 4, 32) ** power for w in (found, rounded_to_four_bits(weight, 32))]
    ours, plain = (error.sum(-1) for error in errors)
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.97 * plain.sum()
    zeros = unpack(state(result)["0.weight_zero_point"], 4, 4)
    assert zeros.min() < 8 < zeros.max()


def compensated(weight: Array, gram: Array, codes_of: Callable[[Array], Array]) -> Array:
    """Optimal brain quantization in columns order, the inverse Hessian updated by elimination: no Cholesky factor.

    Each row's largest magnitude stays.
    """
    largest = weight * (np.abs(weight) == np.abs(weight).max(1, keepdims=True))
    weight, hessian = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    hessian += np.eye(len(hessian)) * 0.01 * hessian.diagonal().mean()
    for column in range(weight.shape[1]):
        inverse = np.linalg.inv(hessian[column:, column:])
        rounded = np.where(largest[:, column], largest[:, column], codes_of(weight[:, column]))
        error = (weight[:, column] - rounded) / inverse[0, 0]
        weight[:, column:] -= np.outer(error, inverse[0])
        weight[:, column] = rounded
    return weight


def test_gptq_is_optimal_brain_quantization() -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(6, 20)).astype(np.float32)
    inputs = generator.normal(size=(100, 20)) @ generator.normal(size=(20, 20))
    gram = (inputs.T @ inputs).astype(np.float32)
    number = FORMATS["int8"]
    scale = np.abs(weight).max(1) / np.float32(127)
    expected = compensated(weight, gram, lambda column: np.clip(np.round(column / scale), -127, 127) * scale)
    rounded = round_compensated(
        torch.from_numpy(weight), number, 20, Gram(torch.from_numpy(gram)[None], True, 100, torch.zeros(1))
    )
    found = (rounded.codes * rounded.scale).numpy()
    assert np.mean(np.abs(found - expected) > 1e-4) < 0.02, "but for values that lie between two codes"
    plain = np.round(weight / scale[:, None]) * scale[:, None]
    noise = [np.linalg.norm(inputs @ (w - weight).T) for w in (found, plain)]
    assert noise[0] < 0.8 * noise[1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block_size", [16, 40])
def test_compensation_lowers_the_error_of_the_outputs_and_keeps_zeros(name: str, block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator) @ torch.randn(8, 40, generator=generator)
    inputs += 0.1 * torch.randn(256, 40, generator=generator)
    inputs[:, 7] = 0
    weight = torch.randn(24, 40, generator=generator)
    zeros = torch.rand(weight.shape, generator=generator) < 0.3
    weight[zeros] = 0
    number = FORMATS[name]
    noises = []
    for rounded in (
        round_compensated(weight, number, block_size, Gram.of_rows(inputs[None])),
        round_nearest(weight, number, block_size),
    ):
        values = reconstructed(rounded, name, weight, block_size)
        assert not values[zeros].any()
        noises.append(signal_to_noise(inputs @ weight.T, inputs @ values.T))
    assert noises[0] > noises[1] + 3


@pytest.mark.parametrize(("rows", "columns"), [(4, 30), (40, 30), (4000, 30), (7, 1)])
def test_sums_over_few_rows_are_shrunk_as_scikit_learn_shrinks_them(rows: int, columns: int) -> None:
    mix = torch.randn(columns, columns, dtype=torch.float64)
    inputs = torch.randn(rows, columns, dtype=torch.float64) @ mix
    found = Gram.of_rows(inputs[None]).shrunk()
    expected, _ = covariance.oas(inputs.numpy(), assume_centered=True)
    np.testing.assert_allclose((found.sums[0] + found.ridge * torch.eye(columns)) / rows, expected, rtol=1e-9)


@pytest.mark.parametrize("rows", [4, 32, 256])
def test_rounding_that_serves_few_rows_is_no_worse_on_others(rows: int) -> None:
    """On inputs without structure there is nothing to gain; sums as they are would lose."""
    weight, inputs, others = torch.randn(40, 256), torch.randn(rows, 256), torch.randn(2000, 256)
    gram = Gram.of_rows(inputs[None])
    noises = []
    for rounded in (
        round_nearest(weight, FORMATS["int8"], 256),
        round_compensated(weight, FORMATS["int8"], 256, gram.shrunk()),
        round_compensated(weight, FORMATS["int8"], 256, gram),
    ):
        values = reconstructed(rounded, "int8", weight, 256)
        noises.append(signal_to_noise(others @ weight.T, others @ values.T))
    assert noises[1] > noises[0] - 0.1
    assert noises[2] < noises[0] - 0.3


@pytest.mark.parametrize("name", ["int8", "int4", "e4m3"])
@pytest.mark.parametrize("block_size", [16, 160])
@pytest.mark.parametrize("groups", [1, 2])
def test_few_rows_compensate_as_their_sums_would(name: str, block_size: int, groups: int) -> None:
    """Without anything of columns × columns; twin: sums of other rows round otherwise."""
    weight = torch.randn(6 * groups, 160)
    mix = torch.randn(groups, 12, 160, dtype=torch.double)
    inputs = torch.randn(groups, 40, 12, dtype=torch.double) @ mix + 0.3 * torch.randn(groups, 40, 160).double()
    few = Gram.of_rows(inputs).shrunk()
    sums = dataclasses.replace(few, values=few.sums, is_sum=True)
    other = Gram.of_rows(torch.randn_like(inputs)).shrunk()
    assert not few.is_sum
    codes = [round_compensated(weight, FORMATS[name], block_size, gram).codes for gram in (few, sums, other)]
    assert (codes[0] != codes[1]).double().mean() < 0.01
    assert (codes[0] != codes[2]).double().mean() > 0.05


@pytest.mark.parametrize("rows", [12, 64])
def test_a_group_whose_inputs_are_all_zero_is_rounded_to_nearest(rows: int) -> None:
    weight, inputs = torch.randn(12, 40), torch.randn(2, rows, 40, dtype=torch.double)
    inputs[0] = 0
    found = round_compensated(weight, FORMATS["int8"], 40, Gram.of_rows(inputs).shrunk())
    nearest = round_nearest(weight, FORMATS["int8"], 40)
    assert torch.equal(found.codes[:6], nearest.codes[:6])
    assert not torch.equal(found.codes[6:], nearest.codes[6:])


def test_weights_are_compensated_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all moments would take too much memory, data is read once for each part, and the codes are the same."""
    model = seeded(lambda: nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.Tanh())]))
    read = []

    class Loader:
        def __iter__(self) -> Any:
            read.append(1)
            return iter([torch.randn(40, 24, generator=torch.Generator().manual_seed(1))])

    found = []
    for limit in (1 << 30, 2 * 8 * 24 * 24, 1):
        monkeypatch.setattr(layer_grams, "_TOGETHER", limit)
        read.clear()
        result = quantize(model, torch.randn(2, 24), QuantizeWeights("int4", 16), calibration_data=Loader())
        found.append((len(read), state(result)))
    assert [count - found[0][0] for count, _ in found] == [0, 1, 2]
    for _, tensors in found[1:]:
        assert all(torch.equal(tensors[name], tensor) for name, tensor in found[0][1].items())


def test_what_can_not_be_compensated_is_noted() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.turned, self.table = nn.Linear(24, 24), nn.ConvTranspose1d(3, 4, 8), nn.Embedding(50, 24)

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.turned(self.linear(self.table(tokens)))

    tokens = torch.randint(50, (16, 3))
    result = quantize(Turned(), tokens, QuantizeWeights(), calibration_data=[tokens])
    (note,) = [note for note in result.report.notes if "without compensation" in note]
    assert note.startswith("'turned.weight' is rounded to the nearest code")


class Spectra(nn.Module):
    """A trained network makes use of all columns of its input: where they are small, weights are large."""

    def __init__(self, size: torch.Tensor, layer: Any = nn.LSTM) -> None:
        super().__init__()
        self.layer, self.head = layer(len(size), 32, batch_first=True, bidirectional=True), nn.Linear(64, 5)
        for name, parameter in self.layer.named_parameters():
            if "weight_ih" in name:
                parameter.data /= size

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.layer(x)[0])


SIZES = torch.logspace(0, -2.85, 40)


def spectra(rows: int, seed: int) -> torch.Tensor:
    """Columns that differ 700-fold."""
    return SIZES * torch.randn(rows, 12, 40, generator=torch.Generator().manual_seed(seed)).square()


@pytest.mark.parametrize("layer", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_columns_are_evened_by_calibration_data(layer: Any, tmp_path: Path) -> None:
    model, data, fresh = seeded(lambda: Spectra(SIZES, layer)), [spectra(8, seed) for seed in range(4)], spectra(8, 9)
    found = {}
    for name, settings in {"none": {}, "data": {"calibration_data": data}}.items():
        result = quantize(model, data[0][:2], QuantizeWeights(block_size=None), **settings)
        found[name] = signal_to_noise(model(fresh), result.module(fresh))
    assert found["data"] > 38
    assert found["none"] < 25
    assert "layer.weight_ih_l0_columns" in state(result)
    assert "head.weight_columns" not in state(result), "columns that are alike gain nothing"
    artifact = result.export(tmp_path / "model.onnx")
    expected = result.module(fresh).detach().numpy()
    np.testing.assert_allclose(run_file(artifact, fresh), expected, atol=1e-5 * np.abs(expected).max())
    assert "Mul" not in artifact.details["kernels"], "columns are put back when the file is loaded"


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_what_static_quantization_leaves_float_is_evened(rounding: Any) -> None:
    model, data, fresh = seeded(lambda: Spectra(SIZES)), [spectra(8, seed) for seed in range(4)], spectra(8, 9)
    static = QuantizeStatic(kernels="all", rounding=rounding, overrides={"head": "float"})
    result = quantize(model, data[0][:2], static, calibration_data=data)
    assert state(result)["layer.weight_ih_l0"].dtype == torch.int8
    assert signal_to_noise(model(fresh), result.module(fresh)) > 36


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_tied_weight_that_static_quantization_leaves_float_is_evened(rounding: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.GRU(40, 16, batch_first=True), nn.GRU(40, 16, batch_first=True)
            self.p.get_parameter("weight_ih_l0").data /= SIZES
            self.q.weight_ih_l0 = self.p.weight_ih_l0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.p(x)[0] * self.q(x)[0]
            return found

    model, data, fresh = seeded(Tied), [spectra(8, seed) for seed in range(4)], spectra(8, 9)
    static = QuantizeStatic(kernels="all", rounding=rounding)
    result = quantize(model, data[0][:2], static, calibration_data=data)
    assert sum(name.endswith("weight_ih_l0_columns") for name in state(result)) == 1
    assert signal_to_noise(model(fresh), result.module(fresh)) > 36


@pytest.mark.parametrize("limit", [63, 127])
def test_rounding_int8_once_more_changes_nothing(limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(size, 40, generator=generator) for size in (24, 256))
    number = dataclasses.replace(FORMATS["int8"], limits=(-limit, limit))
    first = round_compensated(weight, number, 40, Gram.of_rows(inputs[None]))
    assert not torch.equal(first.codes, round_nearest(weight, number, 40).codes)
    again = round_nearest(first.codes * first.scale, number, 40)
    assert torch.equal(first.codes, again.codes)
    torch.testing.assert_close(first.scale, again.scale, rtol=1e-6, atol=0)
    assert first.codes.abs().amax(1).eq(limit).all()


@pytest.mark.parametrize(
    "settings", [{"padding": 1}, {"stride": 2, "groups": 2}, {"dilation": 2, "padding": "same"}, {"groups": 4}]
)
def test_compensation_counts_on_a_convolutions_own_inputs(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 8, 3, **settings)
    mixed = torch.einsum("bcxy,cd->bdxy", torch.randn(16, 4, 12, 12), torch.randn(4, 4))
    data = [nn.functional.avg_pool2d(mixed, 3, 1, 1)]
    noises = {}
    for method in ("round", "gptq"):
        result = quantize(model, data[0], QuantizeWeights("log2_4", None, method), calibration_data=data)
        noises[method] = signal_to_noise(model(data[0]), result.module(data[0]))
    assert noises["gptq"] > noises["round"] + 1


def reconstructed(rounded: Rounded, name: str, weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Decoded by hand."""
    spread = torch.arange(weight.shape[1]) // block_size
    number = FORMATS[name]
    values = number.decode(rounded.codes)
    if rounded.zero_point is not None:
        values = rounded.codes.float() - rounded.zero_point.float()[:, spread]
    return values * rounded.scale[:, spread]


# The file.


@pytest.mark.parametrize("name", ["int4", pytest.param("e4m3", marks=pytest.mark.slow)])
def test_every_kind_of_layer_agrees_with_pytorch(name: Any, tmp_path: Path) -> None:
    model = seeded(EveryKind)
    result = quantize(model, TOKENS, QuantizeWeights(name))
    artifact = result.export(tmp_path / "model.onnx")
    with torch.no_grad():
        expected = result.module(TOKENS).numpy()
    np.testing.assert_allclose(run_file(artifact, TOKENS), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert signal_to_noise(model(TOKENS), result.module(TOKENS)) > {4: 8, 6: 20, 8: 22}[FORMATS[name].bits]
    before, after = result.report.rows
    assert after.parameters == before.parameters
    assert after.macs == before.macs
    weights = {name for name, tensor in model.named_parameters() if tensor.dim() > 1}
    assert weights <= set(state(result))
    assert not any(state(result)[weight].is_floating_point() for weight in weights)
    assert not result.report.notes


class EveryFormat(nn.Module):
    """A convolution and a lookup in each format, all in one file."""

    def __init__(self) -> None:
        super().__init__()
        for name in FORMATS:
            self.add_module(name, nn.ModuleList([nn.Embedding(20, 36), nn.Conv1d(36, 3, 3)]))

    def forward(self, tokens: torch.Tensor) -> Any:
        pairs: Any = self.children()
        return [conv(embed(tokens).transpose(1, 2)) for embed, conv in pairs]


def test_every_format_agrees_with_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_module(weight: Weight) -> QuantizeWeights:
        return QuantizeWeights(weight.name.partition(".")[0])

    rounded, stored = QuantizeWeights._round, QuantizeWeights._store
    monkeypatch.setattr(QuantizeWeights, "_round", lambda _, weight, *rest: rounded(by_module(weight), weight, *rest))
    monkeypatch.setattr(
        QuantizeWeights, "_store", lambda _, program, weight, *rest: stored(by_module(weight), program, weight, *rest)
    )
    model = seeded(EveryFormat)
    result = quantize(model, TOKENS, QuantizeWeights())
    used = [node.args[3] for node in result.program.graph.nodes if node.target is DECODE]
    assert used == [name for name in FORMATS for _ in range(2)]
    session = onnxruntime.InferenceSession(str(result.export(tmp_path / "model.onnx").path))
    found = session.run(None, {"tokens": TOKENS.numpy()})
    for name, expected, values in zip(FORMATS, result.module(TOKENS), found, strict=True):
        wanted = expected.detach().numpy()
        assert np.abs(values - wanted).max() <= 1e-6 * np.abs(wanted).max(), name


def test_what_decodes_is_gone_once_the_file_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 5), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval()
    artifact = quantize(model, torch.randn(2, 8, 20), QuantizeWeights("log2_6")).export(tmp_path / "model.onnx")
    assert {node.op_type for node in onnx.load(artifact.path).graph.node} >= {*DECODING, "Gather"}
    assert not {*DECODING, "Gather", "Mul"} & set(artifact.details["kernels"])


class Looped(nn.Module):
    """A tied embedding, whose rows of 72 fill no whole blocks, and a product with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner, self.head = nn.Embedding(50, 72), nn.Linear(72, 72), nn.Linear(72, 50)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(torch.relu(self.inner(self.tokens(tokens))))


class Convolved(nn.Module):
    """A lookup whose rows are read one by one, and a window of odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.conv = nn.Embedding(50, 36), nn.Conv1d(36, 9, 3)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.conv(self.tokens(tokens).transpose(1, 2))


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int8", 8)])
def test_products_read_plain_initializers_of_the_shape_the_operator_wants(name: Any, bits: int, tmp_path: Path) -> None:
    """So OpenVINO takes them; and ONNX Runtime before 1.20, whose operator has no input for a bias."""
    result = quantize(seeded(Looped), TOKENS, QuantizeWeights(name, compute="int8"))
    artifact = result.export(tmp_path / "model.onnx")
    graph = onnx.load(artifact.path).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert [shapes[product.input[1]] for product in products] == [[72, 3, 4 * bits], [50, 3, 4 * bits]]
    assert all(set(product.input[1:]) <= set(shapes) for product in products)
    assert [len(product.input) for product in products] == [4 if bits == 4 else 3] * 2
    assert sum(node.op_type == "Add" for node in graph.node) == 2
    assert "Add" not in artifact.details["kernels"], "the runtime fuses it"
    assert sum("uint8" in str(onnx.numpy_helper.to_array(tensor).dtype) for tensor in graph.initializer) <= 4


def test_openvino_reads_the_files(tmp_path: Path) -> None:
    """It rounds activations in a way of its own unless it is told not to."""
    core = pytest.importorskip("openvino").Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    name: Any
    for name, block_size in (("int8", 32), ("int4", 32), ("int4", None), ("log2_6", 32)):
        for model in (Looped, Convolved):
            result = quantize(seeded(model), TOKENS, QuantizeWeights(name, block_size))
            path = result.export(tmp_path / "model.onnx").path
            with torch.no_grad():
                expected = result.module(TOKENS).numpy()
            found = core.compile_model(core.read_model(path), "CPU", settings)([TOKENS.numpy()])[0]
            np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "block_size", "compute", "products"),
    [
        ("int4", 32, "float32", 2),
        ("int4", 16, "int8", 2),
        ("int8", 64, "int8", 2),
        ("int8", 32, "float32", 0),
    ],
)
def test_low_bit_products_run_where_they_are_no_slower(
    name: Any, block_size: Any, compute: Any, products: int, tmp_path: Path
) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(80, 70), nn.ReLU(), InputsTimesOutputs(70, 24)))
    x = torch.randn(3, 5, 80)
    result = quantize(model, x, QuantizeWeights(name, block_size, compute=compute))
    artifact = result.export(tmp_path / "model.onnx")
    found = artifact.details["kernels"]
    assert found.get("MatMulNBits", 0) == products
    assert found.get("Gemm", 0) + found.get("FusedGemm", 0) + found.get("MatMul", 0) == 2 - products
    assert not set(DECODING) & set(found)
    with torch.no_grad():
        expected = result.module(x).numpy()
    error = np.abs(run_file(artifact, x) - expected).max() / np.abs(expected).max()
    assert error < (1e-5 if compute == "float32" else 2e-3)
    assert signal_to_noise(model(x), result.module(x)) > {4: 15, 8: 25}[FORMATS[name].bits]


# Which kernel multiplies.


def computes(result: Result) -> list[str]:
    """What the products that multiply with codes compute activations in."""
    return [node.args[-1] for node in result.program.graph.nodes if node.target is PRODUCT]


@pytest.mark.parametrize(
    ("many", "one", "expected"),
    [
        ({1: 0.9, 4: 0.8}, {1: 0.5, 4: 0.2}, "int8"),
        ({1: 0.3, 4: 0.8}, {1: 0.5, 4: 0.5}, "float32"),
        ({1: 0.9, 4: 1.1}, {1: 0.9, 4: 0.1}, "float32"),  # slower at many rows, however fast at one
        ({1: 0.9, 4: 0.1}, {1: 0.9, 4: 1.1}, "float32"),
        ({1: 1.1, 4: 1.1}, {1: 0.1, 4: 0.1}, None),
        ({1: 17.0, 4: 39.0}, {1: 17.0, 4: 39.0}, None),
        ({1: None, 4: 0.5}, {1: 0.5, 4: 0.5}, "int8"),
        ({1: None, 4: None}, {1: None, 4: None}, None),
    ],
)
def test_the_fastest_that_is_nowhere_slower_than_float_is_taken(
    many: Any, one: Any, expected: str | None, priced: Priced
) -> None:
    priced.share = lambda bits, level, rows: {10: many, 1: one}[rows][level]
    model = seeded(lambda: nn.Linear(96, 40))
    free = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    result = quantize(model, torch.randn(2, 5, 96), QuantizeWeights("int4"), dynamic_shapes=free)
    assert computes(result) == ([expected] if expected else [])
    assert priced.asked == {
        f"product {rows}x96 40x96 bits=4 block=32 level={level}" for rows in (10, 1) for level in (1, 4)
    }
    unknown = [note for note in result.report.notes if "is not known: the test says so" in note]
    assert len(unknown) == sum(share is None for share in many.values())
    (sheet,) = result.report.sheets
    assert sheet.rows[0][-1] == (expected or "decoded")


def test_rows_are_as_few_as_free_sizes_allow_and_large_products_are_priced_in_part(
    priced: Priced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_kernels, "_MOST_WEIGHTS", product_kernels._MOST_WEIGHTS >> 6)
    monkeypatch.setattr(product_kernels, "_CACHED", product_kernels._CACHED >> 6)
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 2500), nn.Linear(2500, 4)))
    quantize(model, torch.randn(2, 7, 64), QuantizeWeights("int8", 64))
    assert {key.replace("level=1", "level=4") for key in priced.asked} == {
        f"product {shapes} bits=8 block=64 level=4" + " streamed=1" * (rows == 1)
        for rows in (14, 1)  # batch and length are free
        for shapes in (f"{rows}x64 1024x64", f"{rows}x2500 4x2500")
    }


@pytest.mark.parametrize(
    ("name", "outlier", "expected"), [("int4", 1.0, "int8"), ("int4", 300.0, "float32"), ("int8", 1.0, None)]
)
def test_activations_are_rounded_only_where_that_keeps_the_noise(
    name: Any, outlier: float, expected: str | None, priced: Priced
) -> None:
    """Beside an outlier in its block an activation is rounded coarsely; and codes of 8 bits are as fine as that."""
    priced.share = lambda bits, level, rows: {1: 0.9 if bits == 4 else 9.0, 4: 0.1}[level]
    model = seeded(lambda: nn.Linear(256, 64, bias=False))
    model.get_parameter("weight").data[:, ::32] = 0
    x = torch.randn(100, 256)
    x[:, ::32] *= outlier
    result = quantize(model, x, QuantizeWeights(name))
    assert computes(result) == ([expected] if expected else [])
    with torch.no_grad():
        plain, kept = (
            signal_to_noise(model(x), quantize(model, x, QuantizeWeights(name, compute=compute)).module(x))
            for compute in ("float32", "int8")
        )
    assert (plain - kept > 0.5) == (expected != "int8"), "the judge sees the noise"
    lost = result.report.sheets[0].rows[0][-2]
    assert lost == pytest.approx(plain - kept, abs=0.15)


def test_what_was_asked_for_is_done_and_said_to_be_slower(priced: Priced) -> None:
    priced.share = lambda bits, level, rows: {1: 0.1, 4: 1.25}[level]
    model = seeded(lambda: nn.Linear(96, 40))
    result = quantize(model, torch.randn(7, 96), QuantizeWeights("int4", compute="int8"))
    assert computes(result) == ["int8"]
    assert [note for note in result.report.notes if "1.25 times as long as decoded, at 7 rows" in note]
    assert computes(quantize(model, torch.randn(7, 96), QuantizeWeights("int4", compute="float32"))) == ["float32"]
    assert not quantize(model, torch.randn(7, 96), QuantizeWeights("int4")).report.notes


@pytest.mark.parametrize("name", FORMATS)
def test_stored_weights_take_the_bits_that_the_format_promises(name: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 200))
    result = quantize(model, torch.randn(2, 16, 8, 8), QuantizeWeights(name))
    weights = 16 * 144 + 576 * 200
    scales = 16 * 5 + 18 * 200
    promised = weights * FORMATS[name].bits / 8 + scales * (4.5 if name == "int4" else 4) + 4 * 216
    assert promised <= result.report.rows[-1].bytes <= 1.001 * promised


def test_the_file_of_a_decoder_is_a_sixth(tmp_path: Path) -> None:
    model = seeded(lambda: Decoder(192, 1500))
    result = quantize(model, TOKENS, QuantizeWeights("int4"))
    artifact, original = result.export(tmp_path / "model.onnx"), result.export_original(tmp_path / "original.onnx")
    weights = sum(tensor.numel() for tensor in model.parameters() if tensor.dim() > 1)
    rest = sum(tensor.numel() for tensor in model.parameters()) - weights
    promised = weights * (4 + 36 / 32) / 8 + 4 * rest
    assert stored_bytes(artifact) < 1.01 * promised
    assert artifact.bytes < 1.05 * promised
    assert artifact.bytes < original.bytes / 5.7
    assert artifact.details["kernels"]["MatMulNBits"] == 5
    assert artifact.parity < 1e-5


def test_a_tied_embedding_is_stored_once_and_looked_up_row_by_row(tmp_path: Path) -> None:
    model = seeded(Decoder)
    result = quantize(model, TOKENS, QuantizeWeights("int4"))
    targets = [node.target for node in result.program.graph.nodes]
    assert targets.count(DECODE) == 1
    assert targets.count(PRODUCT) == 5
    stored = [name for name, tensor in state(result).items() if tensor.shape == (500, 32)]
    assert stored == ["tokens.weight"] or stored == ["head.weight"]
    assert result.report.rows[0].parameters == result.report.rows[1].parameters
    artifact = result.export(tmp_path / "model.onnx")
    optimized = Path(tmp_path / "optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    floats = [tensor for tensor in onnx.load(optimized).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(math.prod(tensor.dims) for tensor in floats) <= 500 * 2, "scales, never the decoded table"


def test_a_small_resnet_keeps_its_convolutions(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))

        def forward(self, x: torch.Tensor) -> Any:
            return torch.relu(x + self.body(x))

    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Block(), Block(), nn.Flatten(), nn.Linear(1600, 7)))
    images = torch.randn(2, 3, 12, 12)
    result = quantize(model, images, QuantizeWeights("e3m4", None))
    artifact = result.export(tmp_path / "model.onnx")
    found = artifact.details["kernels"]
    assert sum(count for kernel, count in found.items() if "Conv" in kernel) == 5
    assert "Gather" not in found
    assert artifact.parity < 1e-5
    assert signal_to_noise(model(images), result.module(images)) > 30
    assert stored_bytes(artifact) < 0.3 * 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["int4", pytest.param("log2_6", marks=pytest.mark.slow)])
def test_saved_and_loaded_it_is_the_same(name: Any, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(20, 48), nn.Linear(48, 32), nn.Linear(32, 20)))
    result = quantize(model, TOKENS, QuantizeWeights(name))
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert torch.equal(loaded.module(TOKENS), result.module(TOKENS))
    assert measure(loaded.program, None).parameters == result.report.rows[-1].parameters
    assert loaded.export(tmp_path / "model.onnx").parity < 1e-5


# What it meets.


@pytest.mark.parametrize("name", ["int4", "log2_4"])
def test_zeros_of_pruned_weights_stay_zero(name: Any) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)))
    pruned = quantize(model, VECTORS, PruneWeights(0.6))
    result = quantize(model, VECTORS, PruneWeights(0.6), QuantizeWeights(name), calibration_data=[VECTORS])
    for weight, shape, block in (("0.weight", [40, 64], 32), ("2.weight", [8, 40], 32)):
        zeros = state(pruned)[weight].numpy() == 0
        assert zeros.mean() == pytest.approx(0.6, abs=0.01)
        assert not weight_of(result, weight, name, shape, block)[zeros].any()
    assert result.report.rows[-1].sparsity >= result.report.rows[-2].sparsity


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_zeros_and_extreme_scales_are_no_trouble(name: Any) -> None:
    weight = torch.randn(6, 64)
    weight[1], weight[2, :32] = 0, 0
    weight[3] *= 1e-20
    weight[4] *= 1e20
    weight[5, 1:] = 0
    found = round_nearest(weight, FORMATS[name], 32)
    codes = found.codes if found.zero_point is None else found.codes.int() - found.zero_point.repeat_interleave(32, 1)
    assert not codes[1].any()
    assert not codes[2, :32].any()
    number = FORMATS[name]
    values = codes.float() if number.is_integer else number.decode(found.codes)
    ratios = (values * found.scale.repeat_interleave(32, 1))[3:5] / weight[3:5]
    assert bool(ratios.isfinite().all())
    assert float((ratios - 1).abs().median()) < 0.3


def test_a_weight_that_something_else_reads_is_left_alone_and_noted() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(self.a(x)) + self.a.weight.sum()

    model = Penalised()
    result = quantize(model, VECTORS, QuantizeWeights("int4"))
    assert torch.equal(state(result)["a.weight"], model.a.weight.detach())
    assert not state(result)["b.weight"].is_floating_point()
    assert any(note.startswith("'a.weight' is left alone: aten.sum") for note in result.report.notes)


def test_a_weight_that_is_an_output_too_is_left_alone_and_noted() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x), self.a.weight

    notes = quantize(Shown(), VECTORS, QuantizeWeights(), dynamic_shapes=None).report.notes
    assert "'a.weight' is left alone: it is an output too" in notes


class Positions(nn.Module):
    """Learned positions, added: a table of rows, with a dimension for the batch; and a bias of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 6, 40) * torch.logspace(-3, 0, 6)[:, None])
        self.offset = nn.Parameter(torch.randn(1, 1, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions + self.offset


def test_tables_that_are_added_are_stored_row_by_row(tmp_path: Path) -> None:
    model, x = Positions(), torch.zeros(2, 6, 40)
    result = quantize(model, x, QuantizeWeights("int8", block_size=None))
    table = model.positions.detach()
    codes, scale = (state(result)[f"positions{suffix}"] for suffix in ("", "_scale"))
    assert codes.dtype == torch.int8
    assert scale.shape == (6, 1)
    found = result.module(x)[0] - model.offset.detach()[0]
    assert bool(((found - table[0]).abs() <= table[0].abs().amax(1, keepdim=True) / 127).all())
    assert torch.equal(state(result)["offset"], model.offset.detach())
    np.testing.assert_allclose(
        run_file(result.export(tmp_path / "model.onnx"), x), result.module(x).detach(), rtol=0, atol=1e-6
    )


def test_other_dtypes_and_weights_too_small_to_shrink_are_left_alone_and_noted() -> None:
    model = nn.Sequential(nn.Linear(64, 1), nn.Linear(1, 3)).double()
    first, *notes = quantize(model, VECTORS.double(), QuantizeWeights()).report.notes
    assert first.reason.startswith("'0.weight' is float64, which runtimes do not compute in")
    assert notes == [
        "'0.weight' is left alone: it is float64, not float32",
        "'1.weight' is left alone: it is float64, not float32",
        "quantize_weights found no weight to quantize",
    ]
    result = quantize(model.float(), VECTORS, QuantizeWeights())
    assert result.report.notes == ["'1.weight' is left alone: with its scales it would not get smaller"]
    assert state(result)["0.weight"].dtype == torch.int8


def test_a_model_without_weights_is_left_as_it_is() -> None:
    result = quantize(nn.LayerNorm(64), VECTORS, QuantizeWeights())
    assert result.report.notes == ["quantize_weights found no weight to quantize"]
    assert result.report.rows[-1].snr == math.inf


def test_what_is_quantized_already_stays_as_it_is() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 8)))
    once = quantize(model, VECTORS, QuantizeWeights("e4m3"))
    twice = quantize(model, VECTORS, QuantizeWeights("e4m3"), QuantizeWeights("int4"))
    assert torch.equal(once.module(VECTORS), twice.module(VECTORS))
    static = quantize(model, VECTORS, QuantizeStatic(), QuantizeWeights("int4"), calibration_data=[VECTORS])
    assert "quantize_weights found no weight to quantize" in static.report.notes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "int3"}, "format is 'int3'; did you mean int4 or int8"),
        ({"block_size": 33}, "block_size is 33; it must be one of 16, 32, 64, 128, 256, None"),
        ({"block_size": 32.0}, "block_size is 32.0"),
        ({"method": "awq"}, "method is 'awq'; it must be one of auto, round, hqq, gptq"),
        ({"compute": "int4"}, "compute is 'int4'; it must be one of auto, float32, int8"),
        ({"costs": 5}, "costs is 5; it must be the path of a cost table"),
        ({"costs": "none.json"}, "can't read the cost table none.json"),
        ({"format": "e4m3", "compute": "int8"}, "compute 'int8' needs the format int4 or int8 and a block_size"),
        ({"block_size": None, "compute": "int8"}, "compute 'int8' needs the format int4 or int8 and a block_size"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        QuantizeWeights(**settings)
    assert words in str(refused.value)


def test_gptq_needs_finite_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(64, 40))
    with pytest.raises(InvalidInput, match="calibration_data"):
        quantize(model, VECTORS, QuantizeWeights("int4", method="gptq"))

    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(torch.exp(x))

    with pytest.raises(InvalidInput, match=r"NaN or infinity at the input of aten\.linear\.default in module 'linear'"):
        quantize(Overflow(), VECTORS, QuantizeWeights("int4"), calibration_data=[VECTORS, VECTORS + 1000])


class Biased(nn.Module):
    """Adds entries of a table that are chosen by position."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, 4)
        self.register_buffer("index", torch.arange(8).flip(0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(x + self.table[self.index])  # type: ignore[index]


def test_parameters_of_alike_modules_that_are_left_alone_are_one_note() -> None:
    model = nn.Sequential(*(Biased() for _ in range(4))).eval()
    result = lobo_fx.compile(model, ["quantize_weights"], example_inputs=torch.randn(2, 8, 4), progress=False)
    (told,) = [line for line in str(result).splitlines() if "is left alone" in line]
    assert "'0.table', '1.table' and 2 others: each is left alone: aten.index.Tensor" in told
