"""Nodes of a file are named by the user's modules: whoever opens it finds the model again, in float and in codes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnx.names import module_of
from lobo_fx.passes import FoldBatchNorm, QuantizeStatic, QuantizeWeights

IMAGES, TOKENS = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 32)
LAYERS = {"Conv", "Gemm", "MatMul", "MatMulNBits"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> Any:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1, self.fc = nn.Conv2d(3, 16, 3), nn.Sequential(Block(), Block()), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.layer1(self.conv1(x)).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


MODELS: dict[str, tuple[type[nn.Module], torch.Tensor]] = {
    "residual": (Residual, IMAGES), "transformer": (Encoder, TOKENS)
}  # fmt: skip
PASSES: dict[str, list[Any]] = {
    "float": [],
    "int8": [FoldBatchNorm(), QuantizeStatic(kernels="all")],
    "stored": [QuantizeWeights("int4", block_size=16)],
}


def nodes(model: nn.Module, example: torch.Tensor, passes: Any, folder: Path, **settings: Any) -> list[onnx.NodeProto]:
    result = lobo_fx.compile(
        model.eval(), passes, example_inputs=example, calibration_data=[example], progress=False
    )  # fmt: skip
    result.export(folder / "model.onnx", confirm=False, **settings)
    return list(onnx.load(folder / "model.onnx").graph.node)


@functools.cache
def nodes_of(kind: str, passes: str) -> list[onnx.NodeProto]:
    make, example = MODELS[kind]
    with tempfile.TemporaryDirectory() as folder:
        return nodes(make(), example, PASSES[passes], Path(folder))


def namespace(node: onnx.NodeProto) -> str:
    """The groups that Model Explorer folds a node into: what is noted, else what stands before the last slash."""
    noted = {entry.key: entry.value for entry in node.metadata_props}
    return str(noted.get("namespace", node.name.rpartition("/")[0]))


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("residual", "float"),
        ("residual", "int8"),
        pytest.param("transformer", "float", marks=pytest.mark.slow),
        pytest.param("transformer", "stored", marks=pytest.mark.slow),
    ],
)
def test_every_node_is_named_by_a_module_of_the_model(kind: str, passes: str) -> None:
    model, found = MODELS[kind][0](), nodes_of(kind, passes)
    assert len({node.name for node in found}) == len(found)
    modules = {name for name, _ in model.named_modules()}
    for node in found:
        assert module_of(node.name) in modules, node.name
        assert namespace(node) == module_of(node.name).replace(".", "/")
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    computing = [module_of(node.name) for node in found if node.op_type in LAYERS]
    assert {name for name in layers if "self_attn" not in name} <= set(computing)
    if kind == "residual":
        assert sorted(computing) == sorted(layers)


def test_a_weight_is_decoded_in_the_module_that_reads_it() -> None:
    found = nodes_of("residual", "int8")
    decoding = {node.input[0]: node.name for node in found if node.input and node.input[0].endswith(".weight")}
    assert len(decoding) >= 5
    for weight, name in decoding.items():
        assert module_of(name) == weight.removesuffix(".weight")
    assert module_of(decoding["layer1.0.conv1.weight"]) != "layer1.0.conv2"


def test_packed_weights_are_unpacked_there_too(tmp_path: Path) -> None:
    model = Residual()
    with torch.no_grad():
        model.layer1[1].conv2.weight[torch.rand(16, 16, 3, 3) < 0.8] = 0  # type: ignore[union-attr, operator]
    found = nodes(model, IMAGES, [], tmp_path, storage="packed")
    unpacking = {module_of(node.name) for node in found} - {""}
    extra = [node for node in found if node.op_type not in {"Conv", "Gemm", "Relu", "Add", "ReduceMean", "Identity"}]
    assert extra
    assert {module_of(node.name) for node in extra} <= unpacking
    assert any(module_of(node.name) == "layer1.1.conv2" for node in extra)


def test_nodes_of_a_model_without_modules_are_named_by_operator_alone(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.first).relu(), self.second)

    exported = torch.export.export(Bare(), (TOKENS[0],))
    result = lobo_fx.compile(exported, [], progress=False)
    result.export(tmp_path / "model.onnx")
    found = [node.name for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert len(set(found)) == len(found) >= 3
    assert not any("/" in name for name in found)


def test_a_name_of_a_module_with_slashes_or_markup_stays_a_name(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("<b>a/b</b>", nn.Linear(32, 8))
    (node,) = [n for n in nodes(model, TOKENS[0], [], tmp_path) if n.op_type in LAYERS]
    assert module_of(node.name) == "<b>a/b</b>"
