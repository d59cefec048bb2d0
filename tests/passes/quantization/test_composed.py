"""Any small network in any format, formats on top of each other and of pruning, and whole models."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx import Artifact, Pass, Result
from lobo_fx.graph.inputs import Inputs
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes import (
    EqualizeLayers,
    MixedPrecision,
    PruneChannels,
    PruneWeights,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    SmoothActivations,
)
from lobo_fx.sources.models import build

EXAMPLES = int(os.environ.get("LOBO_FX_EXAMPLES", "3"))
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.body(x) + self.shortcut(x))


class Sequences(nn.Module):
    """Tokens through an embedding, blocks of attention or recurrence, and a head that may be tied."""

    def __init__(self, kinds: list[str], width: int, heads: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, width)
        self.kinds, self.heads = kinds, heads
        self.blocks = nn.ModuleList(self.block(kind, width) for kind in kinds)
        self.head = nn.Linear(width, 30, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def block(self, kind: str, width: int) -> nn.Module:
        if kind == "lstm":
            return nn.LSTM(width, width, batch_first=True)
        if kind == "gru":
            return nn.GRU(width, width, batch_first=True)
        if kind == "attention":
            return nn.Linear(width, 3 * width)
        hidden = nn.Linear(width, 2 * width)
        return nn.Sequential(nn.LayerNorm(width), hidden, nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embedding(tokens)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            if kind == "attention":
                q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in block(x).chunk(3, -1))
                x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            else:
                out = block(x)
                x = x + (out if isinstance(out, torch.Tensor) else out[0])
        return self.head(x)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """Any of those, weights of very different sizes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    kinds = draw(st.lists(st.sampled_from(["lstm", "gru", "mlp", "attention"]), min_size=1, max_size=3))
    heads = draw(st.sampled_from([1, 2, 4]))
    model = Sequences(kinds, draw(st.sampled_from([4, 8, 12])), heads, draw(st.booleans())).eval()
    return model, torch.randint(0, 30, (4, draw(st.sampled_from([1, 5, 8]))))


@st.composite
def images(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A few convolutions, residual adds, pools and activations, a head or none; channels of very different sizes."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    channels, size = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([7, 8, 11]))
    x = torch.randn(4, channels, size, size) * 10 ** draw(st.integers(-3, 2))
    layers: list[nn.Module] = []

    def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=draw(st.booleans()))
        with torch.no_grad():
            exponents = torch.randint(-2, 2, (outputs, 1, 1, 1))
            conv.weight.mul_(10.0**exponents)
            if draw(st.booleans()):
                conv.weight[draw(st.integers(0, outputs - 1))] = 0
            if conv.bias is not None:
                conv.bias.mul_(10.0 ** draw(st.integers(-2, 2)))
        return conv

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "residual", "norm", "max_pool", "average_pool"]))
        if kind == "conv":
            outputs = draw(st.integers(1, 6))
            layers.append(convolution(channels, outputs, draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))))
            channels = outputs
        elif kind == "depthwise":
            layers.append(convolution(channels, channels, 3, groups=channels))
        elif kind == "residual":
            layers.append(Residual(convolution(channels, channels, 3), convolution(channels, channels, 1)))
        elif kind == "norm":
            layers += [convolution(channels, channels, 1), nn.BatchNorm2d(channels)]
        elif kind == "max_pool":
            layers.append(nn.MaxPool2d(3, 2, 1))
        else:
            layers.append(nn.AvgPool2d(3, 1, 1))
        layers += draw(st.sampled_from([[], [nn.ReLU()], [nn.ReLU6()], [nn.Hardswish()]]))
    head = draw(st.sampled_from(["none", "flatten", "pool", "tokens"]))
    with torch.no_grad():
        shape = nn.Sequential(*layers).eval()(x).shape
    if head == "flatten":
        layers += [nn.Flatten(), nn.Linear(math.prod(shape[1:]), 4, bias=draw(st.booleans()))]
    elif head == "pool":
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]
    elif head == "tokens":
        layers += [nn.Flatten(2), nn.Linear(math.prod(shape[2:]), 4)]
    model = nn.Sequential(*layers)
    model.train()(x)  # statistics of the norms
    return model.eval(), x


PASSES: dict[str, tuple[Pass, ...]] = {
    "static": (QuantizeStatic(kernels="all"),),
    "static, min_max, compensated": (QuantizeStatic("min_max", kernels="all", rounding="compensated"),),
    "static, avx2": (QuantizeStatic(kernels="all", target="x86-avx2"),),
    "static, cheapest": (QuantizeStatic(),),
    "mixed": (MixedPrecision(25, quantizer=QuantizeStatic(kernels="all")),),
    "dynamic": (QuantizeDynamic(),),
    "equalized": (EqualizeLayers(), QuantizeStatic(kernels="all")),
    "smoothed": (SmoothActivations(), QuantizeStatic(kernels="all")),
    "pruned": (PruneChannels(0.5, round_to=1), QuantizeStatic(kernels="all")),
    "masked": (PruneWeights(0.5), QuantizeDynamic()),
    **{name: (QuantizeWeights(name, 16),) for name in FORMATS},
}


def quantize(model: nn.Module, x: torch.Tensor, *passes: Pass) -> Result:
    return lobo_fx.compile(model, passes, example_inputs=x[:2], calibration_data=[x[:2], x[2:]], progress=False)


def run_file(artifact: Artifact, inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(np.asarray(output))


@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.one_of(images(), sequences()), st.sampled_from(sorted(PASSES)))
def test_any_small_network_in_any_format(
    tmp_path_factory: pytest.TempPathFactory, network: tuple[nn.Module, torch.Tensor], name: str
) -> None:
    """The exporter compares the file with PyTorch; here: it is saved, loaded and evaluated as it was."""
    model, x = network
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = quantize(model, x, *PASSES[name])
    folder = tmp_path_factory.mktemp("any")
    artifact = result.export(folder / "model.onnx", confirm=False)
    assert "ConvInteger" not in artifact.details.get("kernels", {})
    result.save(folder / "saved")
    with torch.no_grad():
        assert torch.equal(lobo_fx.load(folder / "saved").module(x), result.module(x))
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


class Both(nn.Module):
    """Convolutions, and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16 * 16, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> Any:
        x = F.max_pool2d(torch.relu(self.norm(self.first(x))), 2)
        return self.head(F.max_pool2d(torch.relu(self.second(x)), 2).flatten(1))


def test_linear_layers_dynamic_and_convolutions_static(tmp_path: Path) -> None:
    model = Both().eval()
    static = QuantizeStatic(kernels="all", overrides={"head.*": "float"})
    result = quantize(model, IMAGES, static, QuantizeDynamic())
    artifact = result.export(tmp_path / "model.onnx")
    kernels = artifact.details["kernels"]
    assert kernels["QLinearConv"] == 2
    assert kernels["DynamicQuantizeMatMul"] == 2
    assert signal_to_noise(model(IMAGES), run_file(artifact, IMAGES)) > 30


@pytest.mark.parametrize(
    "pass_",
    [
        QuantizeStatic(rounding="compensated"),
        QuantizeWeights("int4"),
        pytest.param(QuantizeStatic(kernels="all"), marks=pytest.mark.slow),
        pytest.param(QuantizeDynamic(), marks=pytest.mark.slow),
    ],
)
def test_masks_stay_through_quantization_and_training_before_it(pass_: Pass, tmp_path: Path) -> None:
    model = Both().eval()
    pruned = quantize(model, IMAGES, PruneWeights(0.6))
    optimizer = torch.optim.SGD(pruned.module.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        pruned.module.train()(IMAGES).square().mean().backward()
        optimizer.step()
    again = lobo_fx.compile(
        pruned.module.eval(), [pass_], example_inputs=IMAGES[:2], calibration_data=[IMAGES], progress=False
    )
    again.export(tmp_path / "model.onnx", confirm=False)
    assert again.report.rows[-1].sparsity > 0.55


@pytest.mark.slow
def test_pruned_and_quantized_in_every_order_that_makes_sense(tmp_path: Path) -> None:
    model = Both().eval()
    size = None
    for passes in (
        [PruneChannels(0.5, round_to=1), QuantizeStatic(kernels="all")],
        [PruneWeights(0.5), PruneChannels(0.5, round_to=1), EqualizeLayers(), QuantizeStatic(kernels="all")],
        [PruneChannels(0.5, round_to=1), QuantizeWeights("int4")],
    ):
        artifact = quantize(model, IMAGES, *passes).export(tmp_path / "model.onnx", confirm=False)
        size = size or quantize(model, IMAGES).export(tmp_path / "float.onnx", confirm=False).bytes
        assert artifact.bytes < 0.45 * size


# Whole models, their widths and inputs as small as they go, random weights.

MODELS: dict[str, tuple[int, ...]] = {
    "torchvision:resnet50": (2, 3, 64, 64),
    "timm:mobilevitv2_050": (2, 3, 64, 64),
    "torchvision:efficientnet_b0": (2, 3, 64, 64),
    "timm:vit_tiny_patch16_224": (2, 3, 224, 224),
    "tiny:whisper": (),
    "tiny:bert": (),
    "tiny:gpt2": (),
}
FORMATS_OF_MODELS: dict[str, tuple[Pass, ...]] = {
    "static": (QuantizeStatic(kernels="all"),),
    "cheapest": (QuantizeStatic(rounding="compensated"),),
    "dynamic": (QuantizeDynamic(),),
    "int4": (QuantizeWeights("int4"),),
    "e4m3": (QuantizeWeights("e4m3"),),
    "pruned": (PruneChannels(0.5, round_to=1), QuantizeStatic(kernels="all")),
}


def model_and_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Inputs]:
    source, _, rest = name.partition(":")
    if source == "tiny":
        monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "benchmarks")
        made: tuple[nn.Module, Inputs] = importlib.import_module("tiny_transformers").build_tiny(rest)
        return made
    model, _ = build(name)
    assert isinstance(model, nn.Module)
    return model, Inputs((torch.randn(MODELS[name]),))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*agrees with PyTorch to .* only")  # weights are random: rounding is amplified
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", FORMATS_OF_MODELS)
def test_models_export_and_agree(name: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs(name, monkeypatch)
    result = lobo_fx.compile(
        model, FORMATS_OF_MODELS[format], example_inputs=inputs, calibration_data=[inputs], progress=False
    )
    artifact = result.export(tmp_path / "model.onnx", confirm=False)
    if format in ("static", "dynamic"):
        integer = ("QLinear", "QGemm", "Integer", "DynamicQuantizeMatMul", "MatMulNBits")  # the last in blocks
        assert any(name in kernel for kernel in artifact.details["kernels"] for name in integer)
    assert result.report.rows[-1].bytes < 0.45 * result.report.rows[0].bytes
