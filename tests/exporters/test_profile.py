"""Where the time of a file goes: every microsecond has an owner, and it is the right one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.operators import aten
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.passes import FoldBatchNorm
from lobo_fx.passes.goal.costs import _givers
from lobo_fx.plugins.kernels import ProfilesNodes

IMAGES, ROWS = torch.randn(2, 3, 16, 16), torch.randn(2, 6, 32)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inside, self.outside = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.inside(self.norm(x)).view(x.shape[0], 6, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.outside(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def written(model: nn.Module, example: torch.Tensor, folder: Path, chosen: Any = ()) -> tuple[Any, Path, Any]:
    """The program, its file, and one row of inputs."""
    result = lobo_fx.compile(model.eval(), chosen, example_inputs=example, progress=False)
    path = OnnxExporter().export(result.program, folder / "model.onnx", {}).path
    return result.program, path, named_arrays(result.program, with_rows(result.program, 1))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module], torch.Tensor], Any]:
    """As `written`, without passes, once for each network."""
    return functools.cache(lambda make, example: written(make(), example, tmp_path_factory.mktemp("file")))


def profiled(program: Any, path: Path, arrays: Any) -> Any:
    names = {node.name: node.name for node in program.graph.nodes}
    (output,) = program.graph.output_node().args[0]
    return OnnxRuntime().node_times(path, arrays, {**names, "output": output.name})


@pytest.mark.parametrize(("make", "example"), [(convolutions, IMAGES), (Attention, ROWS)])
def test_every_microsecond_is_some_nodes_or_nobodys(
    make: Any, example: torch.Tensor, once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, path, arrays = once(make, example)
    kept: list[Any] = []

    def read(text: str) -> Any:
        kept.append(json.JSONDecoder().decode(text))
        return kept[-1]

    monkeypatch.setattr("lobo_fx.exporters.onnxruntime.profile.json.loads", read)
    found = profiled(program, path, arrays)
    times: dict[str, list[float]] = {}
    for event in kept[0]:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"])
    fastest = [sorted(values[3:])[: 3 * (len(values) - 3) // 4] for values in times.values()]
    every = sorted(sum(values) / len(values) for values in fastest)
    assert all(23 <= len(values) <= 60 for values in times.values())
    assert sorted(time for owned in found.values() for time in owned) == pytest.approx(every)
    assert all(owned == sorted(owned, reverse=True) for owned in found.values())
    assert found.keys() <= {node.name for node in program.graph.nodes} | {""}


def test_nodes_of_a_file_belong_to_those_of_the_program_that_they_were_made_of(tmp_path: Path) -> None:
    program, path, arrays = written(convolutions(), IMAGES, tmp_path, [FoldBatchNorm()])
    calls = {node.target: node.name for node in program.graph.nodes if node.op == "call_function"}
    found = profiled(program, path, arrays)
    linear, relu, flatten = (calls[name] for name in (aten.linear.default, aten.relu.default, aten.flatten.using_ints))
    convolution = calls[aten.conv2d.default]
    # ONNX Runtime fuses the activation into the convolution, whose time it is; then it may change the layout.
    assert len(found[convolution]) == 1
    assert len(found.get(relu, [])) <= 1
    # The exporter writes the pool as a mean under another name: it is found upstream of what reads it.
    assert len(found[flatten]) == 2
    assert found.keys() - {relu} == {convolution, flatten, linear}


def test_all_that_attention_became_is_its_own(once: Any) -> None:
    program, path, arrays = once(Attention, ROWS)
    found = profiled(program, path, arrays)
    attention = next(
        node.name for node in program.graph.nodes if node.target is aten.scaled_dot_product_attention.default
    )
    assert len(found[attention]) >= 3  # two products, a softmax, and what shapes are computed by
    layers = [node.name for node in program.graph.nodes if node.target is aten.linear.default]
    norm = next(node.name for node in program.graph.nodes if node.target is aten.layer_norm.default)
    total = next(node.name for node in program.graph.nodes if node.target is aten.add.Tensor)
    assert {*layers, norm, attention, total} <= found.keys()
    assert len(found[norm]) == len(found[total]) == 1
    assert "" not in found


def test_names_that_no_value_has_leave_all_to_nobody(once: Any) -> None:
    _, path, arrays = once(convolutions, IMAGES)
    found = OnnxRuntime().node_times(path, arrays, {"something else": "something else"})
    assert found.keys() == {""}
    assert len(found[""]) >= 3


def test_the_runtime_says_that_it_profiles() -> None:
    assert isinstance(OnnxRuntime(), ProfilesNodes)
    assert not isinstance(object(), ProfilesNodes)


class Two(nn.Module):
    """Outputs that a file names otherwise than the program names what gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        return x, self.second(x).tanh()


def test_what_gives_an_output_has_its_time(tmp_path: Path) -> None:
    program, path, arrays = written(Two(), torch.randn(2, 32), tmp_path)
    found = OnnxRuntime().node_times(path, arrays, _givers(program))
    calls = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["linear", "linear_1", "tanh"]
    assert found.keys() | {"tanh"} == set(calls)  # it may be fused into the layer
    assert all(len(found[name]) == 1 for name in calls[:2])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x).relu()
        return (x + self.second(x)).relu().mean((2, 3))


def test_a_convolution_with_a_sum_and_an_activation_is_the_convolution(tmp_path: Path) -> None:
    program, path, arrays = written(Residual(), IMAGES, tmp_path)
    found = OnnxRuntime().node_times(path, arrays, _givers(program))
    assert {"conv2d", "conv2d_1"} <= found.keys()
    assert len(found["conv2d"]) == len(found["conv2d_1"]) == 1
