"""The placement: decided once, frozen, with a reason for everything that stays float, and carried out as it says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import Result
from lobo_fx.contracts.context import Context
from lobo_fx.exporters.onnxruntime import runtime as onnx_runtime
from lobo_fx.graph.operators import is_call
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes import MixedPrecision, QuantizeStatic
from lobo_fx.passes.quantization.integers.kernels import ONNX_RUNTIME
from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS
from lobo_fx.passes.quantization.integers.placement import Choices, Observing, Placement, Request
from lobo_fx.passes.quantization.integers.targets import TARGETS
from lobo_fx.plugins.kernels import Cost, Kernel, NoCost

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A sum between convolutions, a sigmoid, a transposed convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.wider, self.head = nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.relu(self.first(x))
        x = torch.sigmoid(self.second(x) + self.third(x))
        return self.head(self.wider(x).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def traced() -> Program:
    return lobo_fx.trace(net(), IMAGES)


def choices(**overrides: Observing | None) -> Choices:
    request = Request(ONNX_RUNTIME, TARGETS["x86-vnni"], Observing("min_max"), overrides)
    return Choices.find(traced().clone().graph, request)


def table(found: Choices, **costs: Cost | NoCost) -> CostTable:
    """Integers cost a hundredth of float, conversions next to nothing; `costs` say otherwise by operator."""
    known = CostTable("test", {})
    usual = {"convert": Cost(0.1, 0.1), **costs}
    known.add({kernel: usual.get(kernel.operator, Cost(100.0, 1.0)) for kernel in found.priced})
    return known


def cheapest(**costs: Cost | NoCost) -> Placement:
    found = choices()
    return dataclasses.replace(found, costs=table(found, **costs)).place()


def test_a_placement_is_one_record_for_one_decision() -> None:
    placement = cheapest()
    assert placement == cheapest()
    assert placement != cheapest(add=Cost(1.0, 100.0))
    assert set(placement.integer) == {"conv2d", "conv2d_1", "conv2d_2", "add", "sigmoid", "linear"}
    assert set(placement.integer.values()) == {Observing("min_max")}
    assert placement.floating == {"conv_transpose2d": "there is no integer kernel for it"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.microseconds = 0.0  # type: ignore[misc]


def test_a_placement_reads_as_a_text() -> None:
    lines = str(cheapest(linear=Cost(1.0, 50.0))).splitlines()
    assert lines[0].startswith("5 operators run as integers in onnxruntime, 2 stay float; ")
    assert lines[0].endswith(" µs all in float")
    assert "conv2d: integers, min_max" in lines
    assert "linear: float, 1 µs, as integers 50 µs beside conversions of 0 µs" in lines
    assert str(Observing("percentile", 99.5)) == "percentile 99.5"


def test_the_reason_for_float_counts_conversions_of_what_is_read_and_given_in_float() -> None:
    placement = cheapest(linear=Cost(60.0, 50.0), convert=Cost(7.0, 5.0))
    assert placement.floating["linear"] == "60 µs, as integers 50 µs beside conversions of 7 µs", (
        "it gives float itself"
    )
    given = cheapest(sigmoid=Cost(1.0, 50.0), convert=Cost(7.0, 5.0))
    assert given.floating["sigmoid"] == "1 µs, as integers 50 µs beside conversions of 5 µs", (
        "a sum in integers feeds it"
    )


def test_what_a_placement_costs_is_the_sum_over_what_had_a_choice() -> None:
    placement = cheapest(convert=Cost(0.0, 0.0))
    assert placement.in_float == pytest.approx(600)
    assert placement.microseconds == pytest.approx(6 * 1.1)


def test_penalties_and_a_smaller_choice_leave_operators_float() -> None:
    found = choices()
    found = dataclasses.replace(found, costs=table(found))
    assert "linear" not in found.place({"linear": 99.0}).integer
    assert found.place({"linear": 99.0}).penalties == {"linear": 99.0}
    assert "linear" in found.place({"linear": 90.0}).integer
    few = found.place(among=["conv2d", "linear"])
    assert set(few.integer) == {"conv2d", "linear"}
    assert few.floating["add"] == "it was left out"


def test_an_operator_whose_kernel_has_no_cost_stays_float() -> None:
    placement = cheapest(conv=NoCost("RuntimeError: the kernel is broken"))
    assert not {"conv2d", "conv2d_1", "conv2d_2"} & placement.integer.keys()
    reason = "what it costs is not known: RuntimeError: the kernel is broken"
    assert {placement.floating[name] for name in ("conv2d", "conv2d_1", "conv2d_2")} == {reason}
    assert "linear" in placement.integer


def test_without_costs_layers_are_integers_anywhere_and_others_between_integers() -> None:
    assert set(choices().place().integer) == {"conv2d", "conv2d_1", "conv2d_2", "add", "sigmoid", "linear"}
    placement = choices(third=None).place()
    assert set(placement.integer) == {"conv2d", "conv2d_1", "linear"}
    assert placement.floating["conv2d_2"] == "overrides say so"
    assert placement.floating["add"] == placement.floating["sigmoid"] == "what it reads is float"
    assert placement.overridden == {"conv2d_2"}


def test_the_last_override_that_matches_is_taken() -> None:
    found = choices(**{"*ir*": Observing("mse"), "third": None}).place()
    assert found.integer["conv2d"] == Observing("mse")
    assert "conv2d_2" in found.floating
    assert choices(**{"third": None, "*ir*": Observing("mse")}).place().integer["conv2d_2"] == Observing("mse")


def test_the_observers_that_can_be_asked_for_are_those_that_exist() -> None:
    for name in OBSERVERS:
        QuantizeStatic(observer=name)
    with pytest.raises(lobo_fx.InvalidInput) as refused:
        QuantizeStatic(observer="unknown")
    listed = str(refused.value).partition("observer is 'unknown'; known: ")[2].partition(";")[0]
    assert set(listed.split(", ")) == set(OBSERVERS)


def integers(result: Result) -> set[str]:
    """Operators that read a dequantized value and give one that is quantized, or have a dequantized weight."""
    ops = torch.ops.quantized_decomposed
    reads = (ops.dequantize_per_tensor.default, ops.dequantize_per_channel.default)
    return {
        node.name
        for node in result.program.graph.nodes
        if not ONNX_RUNTIME.passes(node) and not ONNX_RUNTIME.fuses(node) and not is_call(node, *reads)
        if any(is_call(source, *reads) for source in node.all_input_nodes)
    }


def compiled(model: nn.Module, pass_: Any, x: torch.Tensor = IMAGES, **settings: Any) -> Result:
    settings = {"example_inputs": x, "calibration_data": [x], "progress": False, **settings}
    return lobo_fx.compile(model.eval(), [pass_], **settings)


@pytest.mark.parametrize("kernels", ["all", "cheapest"])
def test_what_was_placed_is_what_is_carried_out(kernels: Any) -> None:
    pass_ = QuantizeStatic(kernels=kernels)
    program = traced().clone()
    placement = pass_.place(program, Context(program.signature, show_progress=False))
    result = compiled(net(), pass_)
    assert integers(result) - {"conv_transpose2d"} == set(placement.integer)
    reasons = {note.reason for note in result.report.notes}
    assert {f"stays float: {reason}" for reason in placement.floating.values()} <= reasons


@pytest.mark.parametrize("pass_", [QuantizeStatic(), MixedPrecision(decibels=20)])
def test_costs_are_opened_once_a_compilation(pass_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lobo_fx.passes.quantization import quantize_static

    opened: list[str | None] = []

    def open_table(path: str | None) -> CostTable:
        opened.append(path)
        return CostTable("test", {})

    monkeypatch.setattr(quantize_static, "open_table", open_table)
    compiled(net(), pass_)
    assert opened == [None]


def test_a_runtime_that_refuses_a_kernel_leaves_its_operators_float(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_: object, kernels: list[Kernel]) -> dict[Kernel, Cost | NoCost]:
        return {k: NoCost("it has a bad day") for k in kernels if k.operator != "convert"}

    monkeypatch.setattr(onnx_runtime.OnnxRuntime, "measure_kernels", measure)
    monkeypatch.setattr(CostTable, "of_this_machine", classmethod(lambda cls, runtime: cls("test", {})))
    result = compiled(net(), QuantizeStatic())
    assert integers(result) == set()
    assert any("stays float: what it costs is not known: it has a bad day" in note for note in result.report.notes)
    assert signal_to_noise(net()(IMAGES), result.module(IMAGES)) > 35


class Odd(nn.Module):
    """What no cost describes: attention of grouped queries and of three and five dimensions, and an odd convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(64, 64)
        self.even, self.alone = nn.Conv1d(64, 64, 4, padding="same"), nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )  # [batch, heads, length, 8]
        x = x + F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        x = x + F.scaled_dot_product_attention(x, x, x)
        deep = q.unflatten(1, (2, 4))  # [batch, 2, 4, length, 8]
        x = x + F.scaled_dot_product_attention(deep, deep, deep).flatten(1, 2).transpose(1, 2).flatten(2)
        x = self.even(x.transpose(1, 2)).transpose(1, 2)
        return self.o(x) + self.alone(x[0].T).T


@pytest.mark.parametrize("shapes", ["batch", None])
def test_what_costs_can_not_describe_stays_float_with_a_note(shapes: str | None) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    result = compiled(model, QuantizeStatic(), ROWS, dynamic_shapes=shapes)
    assert signal_to_noise(model(ROWS), result.module(ROWS)) > 30
    notes = list(result.report.notes)
    for reason in (
        "left alone: keys have other heads, or another batch, than queries",
        "left alone: it is not over [batch, heads, length, head_dim]",
        "stays float: what it costs is not known: it pads one side more than the other",
        "stays float: what it costs is not known: its input has no batch dimension",
    ):
        assert any(reason in note for note in notes), reason


def test_attention_of_a_fixed_batch_is_measured() -> None:
    heads = torch.randn(2, 4, 7, 8)

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(2, 7, 4, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    x = heads.transpose(1, 2).flatten(2)
    result = compiled(Attention(), QuantizeStatic(), x, dynamic_shapes=None)
    attention = result.program.graph.find_nodes(op="call_function", target=torch.ops.lobo_fx.attention.default)
    assert attention or any("separate kernels take" in note for note in result.report.notes)


def test_an_override_whose_module_was_folded_away_is_noted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    result = compiled(model, QuantizeStatic(kernels="all", overrides={"1": "float", "2": "mse"}))
    assert any("overrides: nothing that '1' matches is left" in note for note in result.report.notes)
    assert not any("'2' matches" in note for note in result.report.notes)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(64, 24, batch_first=True), nn.GRU(24, 16, batch_first=True)
        self.wider, self.head = nn.ConvTranspose1d(16, 16, 2), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.gru(self.lstm(x)[0])[0]
        return self.head(self.wider(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("kernels", ["all", "cheapest"])
def test_weights_without_an_integer_kernel_are_stored_as_int8(kernels: Any) -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    result = compiled(model, QuantizeStatic(kernels=kernels), ROWS)
    matrices = {name for name, value in model.state_dict().items() if value.dim() > 1}
    assert len(matrices) == 6
    stored = {name for name, value in result.module.state_dict().items() if value.dtype == torch.int8}
    assert stored == matrices
    for operator in ("lstm", "gru", "conv_transpose1d"):
        assert any(
            f"aten.{operator}" in note and "stays float: there is no integer kernel" in note
            for note in result.report.notes
        )
    assert signal_to_noise(model(ROWS), result.module(ROWS)) > 30


def test_weights_stored_as_inputs_by_outputs_keep_their_name() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.weight.permute(1, 0), self.bias)

    torch.manual_seed(0)
    model = Transposed()
    rows = ROWS[:, 0]
    result = compiled(model, QuantizeStatic(kernels="all", observer="min_max", target="x86-vnni"), rows)
    state = result.module.state_dict()
    assert set(state) == {f"{name}{end}" for name in ("weight", "bias") for end in ("", "_scale", "_zero_point")}
    scale = model.weight.detach().abs().amax(0) / 127
    torch.testing.assert_close(state["weight_scale"], scale)
    torch.testing.assert_close(state["weight"].T, (model.weight.detach() / scale).round().to(torch.int8))


def test_a_placement_of_before_is_taken_whatever_it_costs() -> None:
    dear = choices()
    dear = dataclasses.replace(dear, costs=table(dear, conv=Cost(1.0, 100.0), linear=Cost(1.0, 100.0)))
    assert not {"conv2d", "linear"} & dear.place().integer.keys()
    placed = dear.exactly(["conv2d", "linear", "not_there"])
    assert set(placed.integer) == {"conv2d", "linear"}
    assert placed.floating["conv2d_1"] == "the plan leaves it float"
    assert "not_there" not in placed.floating
    kept = choices(second=None).exactly(["conv2d_1"])  # what can't be integers is not, and keeps its reason
    assert not kept.integer
    assert kept.floating["conv2d_1"] == "overrides say so"
