"""Integer regions back to float, and the whole file's say in it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import Result
from lobo_fx.contracts.confirmation import Confirmation
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.passes import ComputeInFloat, PruneChannels, QuantizeStatic
from lobo_fx.passes.quantization.integers.targets import TARGETS, target_of_this_machine

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, a linear layer over three dimensions, and an `addmm`, whose weight lies the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(10, 6)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> Any:
        rows = self.linear(torch.relu(self.conv(x))).mean((1, 2))
        return torch.addmm(self.bias, rows, self.weight)


@functools.cache
def traced() -> Program:
    torch.manual_seed(0)
    return lobo_fx.trace(Net(), IMAGES)


def compiled(*passes: Any) -> Result:
    return lobo_fx.compile(traced(), passes, calibration_data=[IMAGES], progress=False)


@functools.cache
def measure_costs(pruned: bool) -> None:
    """Measures what costs the table must have, once a process: they stay in the cache of all tests."""
    compiled(*[PruneChannels(0.5)] * pruned, QuantizeStatic())


def test_weights_stay_int8_and_everything_else_is_float(tmp_path: Path) -> None:
    integers_everywhere = QuantizeStatic(kernels="all", correct_bias=False)
    result = compiled(integers_everywhere, ComputeInFloat())
    state = result.module.state_dict()
    assert {name for name, tensor in state.items() if tensor.dtype == torch.int8} == {
        "conv.weight",
        "linear.weight",
        "weight",
    }
    assert {name for name in state if "_" in name} == {"conv.weight_scale", "linear.weight_scale", "weight_scale"}
    as_integers = compiled(integers_everywhere)
    integers = as_integers.module.state_dict()
    torch.manual_seed(0)
    model = Net()
    for name in ("conv.weight", "linear.weight", "weight", "conv.bias", "bias"):
        if integers[name].dtype.is_floating_point:
            continue
        scale = integers[f"{name}_scale"]
        values = integers[name] * scale.view([-1] + [1] * (integers[name].dim() - 1))
        model.get_parameter(name).data = values if name != "weight" else values.T  # codes are outputs × inputs
    torch.testing.assert_close(result.module(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
    artifact = result.export(tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(artifact.path).graph.node}
    assert not {operator for operator in operators if "Quant" in operator or "QLinear" in operator}
    assert artifact.bytes < 1.3 * as_integers.export(tmp_path / "integers.onnx").bytes


def test_a_tied_weight_has_one_scale() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Linear(10, 8), nn.Linear(10, 8)
            self.q.weight = self.p.weight

        def forward(self, x: torch.Tensor) -> Any:
            return self.p(x) * self.q(x).tanh()

    x = torch.randn(4, 10)
    passes = [QuantizeStatic(kernels="all"), ComputeInFloat()]
    result = lobo_fx.compile(Tied().eval(), passes, example_inputs=x, calibration_data=[x], progress=False)
    assert sorted(name.partition(".")[2] for name in result.module.state_dict()) == [
        "bias",
        "bias",
        "weight",
        "weight_scale",
    ]


def test_names_of_the_network_stay() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj_in_float, self.norm = nn.Linear(10, 8), nn.LayerNorm(8)
            self.in_float = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> Any:
            return self.norm(self.proj_in_float(x)) * self.in_float

    x = torch.randn(4, 10)
    passes = [QuantizeStatic(kernels="all"), ComputeInFloat()]
    result = lobo_fx.compile(Mixed().eval(), passes, example_inputs=x, calibration_data=[x], progress=False)
    weights = [f"proj_in_float.{name}" for name in ("weight", "weight_scale", "bias")]
    assert set(result.module.state_dict()) == {*weights, "norm.weight", "norm.bias", "in_float"}


@pytest.mark.parametrize(
    ("latencies", "words", "integer"),
    [
        pytest.param({"compiled": 0.8}, None, True, marks=pytest.mark.slow),
        ({"compiled": 1.3, "floating": 0.9}, "taken back: the file took 1.30 times the original's latency", False),
        pytest.param(
            {"compiled": 1.3, "floating": 1.4},
            "the compiled file is slower than the original: 1.30 times",
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_whole_file_confirms_or_takes_back(
    latencies: dict[str, float],
    words: str | None,
    integer: bool,
    free_integers: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure_costs(pruned=False)
    result = compiled(QuantizeStatic(costs=free_integers()))
    expected = result.module(IMAGES)

    def measured(files: Mapping[str, Path], *args: Any, **settings: Any) -> Benchmark:
        times = {label: {"original": 1.0, **latencies}[label] for label in files}
        return Benchmark("test", 1, 1, 1, {label: Latency(t, t, t, t, 1) for label, t in times.items()})

    monkeypatch.setattr("lobo_fx.contracts.confirmation.benchmark", measured)
    artifact = result.export(tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(artifact.path).graph.node]
    assert ("QuantizeLinear" in operators) == integer
    told = [note for note in result.report.notes if "taken back" in note or "slower than the original" in note]
    assert [words is not None and words in note for note in told] == [True] * (words is not None)
    assert signal_to_noise(expected, result.module(IMAGES)) > 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free_integers.json", "model.onnx"]


@pytest.mark.parametrize(("floating", "integer"), [(0.2, False), (0.4, True)])
def test_a_pruned_network_is_measured_beside_itself_in_float(
    floating: float, integer: bool, free_integers: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_costs(pruned=True)
    result = compiled(PruneChannels(0.5), QuantizeStatic(costs=free_integers()))

    def measured(files: Mapping[str, Path], *args: Any, **settings: Any) -> Benchmark:
        times = {label: {"original": 1.0, "compiled": 0.3, "floating": floating}[label] for label in files}
        return Benchmark("test", 1, 1, 1, {label: Latency(t, t, t, t, 1) for label, t in times.items()})

    monkeypatch.setattr("lobo_fx.contracts.confirmation.benchmark", measured)
    operators = [node.op_type for node in onnx.load(result.export(tmp_path / "model.onnx").path).graph.node]
    assert ("QuantizeLinear" in operators) == integer
    assert any("taken back: the file took 0.30 times" in note for note in result.report.notes) != integer


def test_what_was_asked_for_is_not_taken_back(
    free_integers: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what was loaded, beside which there is no original. Twin: what costs decided is measured."""
    measure_costs(pruned=False)
    asked, estimated = compiled(QuantizeStatic(kernels="all")), compiled(QuantizeStatic(costs=free_integers()))

    def measured(*args: Any, **settings: Any) -> Benchmark:
        raise AssertionError("it is measured")

    monkeypatch.setattr("lobo_fx.contracts.confirmation.benchmark", measured)
    loaded = lobo_fx.load(estimated.save(tmp_path / "saved"))
    for name, result in (("asked", asked), ("loaded", loaded)):
        artifact = result.export(tmp_path / f"{name}.onnx")
        assert "QuantizeLinear" in {node.op_type for node in onnx.load(artifact.path).graph.node}, name
    with pytest.raises(AssertionError, match="it is measured"):
        estimated.export(tmp_path / "estimated.onnx")


@pytest.mark.parametrize("here", [True, False])
def test_latency_on_another_cpu_is_not_measured_here(
    here: bool, free_integers: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def confirmed(*args: Any, **settings: Any) -> Confirmation:
        measured.append("file")
        return Confirmation(0.5)

    monkeypatch.setattr("lobo_fx.result.confirm_file", confirmed)
    measure_costs(pruned=False)
    own = target_of_this_machine()
    other = next(name for name in TARGETS if name != own)
    costs = Path(free_integers())
    compiled(QuantizeStatic(costs=str(costs), target=own if here else other)).export(tmp_path / "target.onnx")
    if not here:
        content = json.loads(costs.read_text())
        costs.write_text(json.dumps(content | {"machine": "another CPU"}))
    compiled(QuantizeStatic(costs=str(costs))).export(tmp_path / "costs.onnx")
    assert measured == ["file", "file"] * here


def test_times_of_this_machine_for_another_cpu_are_told() -> None:
    measure_costs(pruned=False)
    for target in TARGETS:
        told = [
            f"and target='{target}' is another CPU" in note
            for note in compiled(QuantizeStatic(target=target)).report.notes
        ]
        assert any(told) == (target != target_of_this_machine())
