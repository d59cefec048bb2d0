"""Every kit on what comes with lobo-fx, and on a broken twin that it must catch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.axes import Axis, Call, Inference, any_of, axis_rule
from lobo_fx.axes import call as rules
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.operators import aten
from lobo_fx.own_operators.formats import FORMATS, Format
from lobo_fx.passes import FoldBatchNorm
from lobo_fx.passes.pruning.criteria import Criterion, Scorer
from lobo_fx.passes.quantization.integers.observers import CountingObserver, MeanSquaredErrorObserver, RangeObserver
from lobo_fx.testing import (
    check_axis_rule,
    check_criterion,
    check_exporter,
    check_number_format,
    check_observer,
    check_pass,
    check_pass_battery,
    check_runtime,
    check_translation,
)

# --- passes ----------------------------------------------------------------------------------------------

FOLDED = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
NOT_FOLDED = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Tanh())
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight.data, module.running_var, module.running_mean):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
    return model


@pytest.mark.slow
def test_a_fold_passes_its_battery() -> None:
    check_pass_battery(FoldBatchNorm(), settled(FOLDED), ROWS, twins=[(settled(NOT_FOLDED), ROWS)])


def test_a_pass_that_does_nothing_is_caught() -> None:
    with pytest.raises(AssertionError, match="the pass changes nothing"):
        check_pass_battery(FoldBatchNorm(), settled(NOT_FOLDED), ROWS, twins=[])


def test_a_pass_that_changes_a_twin_is_caught() -> None:
    with pytest.raises(AssertionError, match="twin 0 was changed"):
        check_pass_battery(FoldBatchNorm(), settled(FOLDED), ROWS, twins=[(settled(FOLDED), ROWS)], dtypes=())


@dataclasses.dataclass(frozen=True)
class WritesRowsDown(lobo_fx.Pass):
    """Adds zeros of the example's number of rows: right on the example alone."""

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        for node in program.graph.find_nodes(op="call_function", target=aten.relu.default):
            rows = len(program.example_inputs.tensors[0])
            with program.graph.inserting_after(node):
                repeated = program.graph.call_function(aten.expand.default, (node, [rows, 8]))
            node.replace_all_uses_with(repeated, delete_user_cb=lambda user, new=repeated: user is not new)
        return program


def test_a_pass_that_writes_rows_down_is_caught() -> None:
    with pytest.raises(lobo_fx.ContractError, match="a free dimension became 3"):
        check_pass_battery(WritesRowsDown(), FOLDED, ROWS, twins=[])


@dataclasses.dataclass(frozen=True)
class DoublesWeights(lobo_fx.Pass):
    """Promises that nothing changes, and doubles what comes out."""

    promise: ClassVar[lobo_fx.Promise] = lobo_fx.Promise.EXACT

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        next(program.module.parameters()).data.mul_(2)
        return program


def test_a_broken_promise_is_the_compilers_own_error() -> None:
    with pytest.raises(lobo_fx.ContractError, match="it promises exactness, but the outputs moved"):
        check_pass(DoublesWeights(), FOLDED, ROWS)


# --- criteria --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ByFunction(Criterion):
    """Scores as a function of the size and the members says."""

    function: Callable[[int, Any], torch.Tensor]

    def scorer(self, inference: Inference, context: lobo_fx.Context) -> Scorer:
        return lambda leaf, members: self.function(int(leaf.size), [m.along(leaf, m.weight.abs()) for m in members])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l1", "taylor", "activation", "geometric_median"])
def test_criteria_pass_their_battery(name: str) -> None:
    check_criterion(name)


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (lambda size, scores: torch.arange(size), "zeros is not scored lower"),
        (lambda size, scores: torch.ones(size), "zeros is not scored lower"),
        (lambda size, scores: torch.stack(scores).sum(0)[:-1], "for .* positions"),
        (lambda size, scores: 1.0, "scores are a float; expected a tensor"),
        (lambda size, scores: torch.stack(scores).sum(0) * float("nan"), "not finite"),
        (lambda size, scores: torch.stack(scores).sum(0) * torch.rand(1), "follow channels|asked for again"),
        (lambda size, scores: torch.stack(scores).sum(0) * torch.arange(1, size + 1), "don't follow channels"),
    ],
)
def test_broken_criteria_are_caught(
    function: Callable[[int, Any], Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lobo_fx.testing.criteria.check_composed", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError, match=fault):
        check_criterion(ByFunction(function))


# --- axis rules ------------------------------------------------------------------------------------------

X, WEIGHT = torch.randn(4, 6), torch.rand(6) + 0.5


@torch.library.custom_op("lobo_fx_kits::flipped_scale", mutates_args=())
def flipped_scale(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.sigmoid().flip(-1) * weight


@flipped_scale.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules of one test."""
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))


@pytest.mark.parametrize(
    ("call", "operands", "free"),
    [
        (torch.add, (X, X.clone()), (4, 6)),
        (torch.nn.functional.linear, (X, torch.randn(5, 6)), (4, 5, 6)),
        (lambda x: x.softmax(-1), (X,), (4,)),
        (lambda x: x.transpose(0, 1).reshape(6, 2, 2), (X,), (2, 2, 6)),
        (lambda x: x.cumsum(0), (X,), (6,)),  # a twin: what came before counts
    ],
)
def test_rules_of_our_own_pass(call: Callable[..., torch.Tensor], operands: Sequence[Any], free: Any) -> None:
    check_axis_rule(call, *operands, free=free)


def test_an_operator_without_a_rule_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"no axis rule: lobo_fx_kits\.flipped_scale"):
        check_axis_rule(flipped_scale, X, WEIGHT, free=(4, 6))


@pytest.mark.usefixtures("table")
def test_a_rule_that_frees_too_much_is_caught() -> None:
    @axis_rule(torch.ops.lobo_fx_kits.flipped_scale.default)
    def wrong(call: Call) -> tuple[Axis, ...]:
        rows, channels = call.axes("x")
        return rows, call.unify(channels, call.axes("weight")[0])

    with pytest.raises(AssertionError, match="free, not of"):
        check_axis_rule(flipped_scale, X, WEIGHT, free=(4,))
    with pytest.raises(AssertionError, match="where its outputs are weighted"):
        check_axis_rule(flipped_scale, X, WEIGHT, free=(4, 6))


@pytest.mark.usefixtures("table")
def test_a_rule_that_locks_too_much_is_caught() -> None:
    @axis_rule(torch.ops.lobo_fx_kits.flipped_scale.default)
    def careful(call: Call) -> tuple[Axis, ...]:
        rows, channels = call.axes("x")
        channels.lock("they are flipped")
        call.axes("weight")[0].lock("they are flipped")
        return rows, call.fixed(6, "they are flipped")

    check_axis_rule(flipped_scale, X, WEIGHT, free=(4,))
    with pytest.raises(AssertionError, match="they are flipped"):
        check_axis_rule(flipped_scale, X, WEIGHT, free=(4, 6))


@pytest.mark.usefixtures("table")
def test_a_rule_that_says_too_much_of_zeros_is_caught() -> None:
    @axis_rule(torch.ops.lobo_fx_kits.flipped_scale.default, zeros=any_of("x"))  # sigmoid(0) is none
    def wrong(call: Call) -> tuple[Axis, ...]:
        rows, channels = call.axes("x")
        for axis in (channels, call.axes("weight")[0]):
            axis.lock("they are flipped")
        return rows, call.fixed(6, "they are flipped")

    with pytest.raises(AssertionError, match="zeros= says too much"):
        check_axis_rule(flipped_scale, X, WEIGHT, free=(4,))


# --- translations ----------------------------------------------------------------------------------------


def flips(x: Any, weight: Any) -> Any:
    from onnxscript import opset18

    op: Any = opset18
    last, first = op.Constant(value_ints=[-1]), op.Constant(value_ints=[-100])
    return op.Mul(op.Slice(op.Sigmoid(x), last, first, last, last), weight)


def forgets(x: Any, weight: Any) -> Any:
    from onnxscript import opset18 as op

    return op.Mul(op.Sigmoid(x), weight)


CASES = ((X, WEIGHT), (torch.randn(2, 3, 5), torch.rand(5)))


def test_a_translation_passes() -> None:
    check_translation(flipped_scale, *CASES, translations={torch.ops.lobo_fx_kits.flipped_scale.default: flips})
    check_translation(lambda x: x.round(), (X,), (X.int().long().float(),))


def test_a_wrong_translation_is_caught() -> None:
    wrong = r"^lobo_fx_kits\.flipped_scale\.default: .*differ from PyTorch's"
    with pytest.raises(AssertionError, match=wrong):
        check_translation(flipped_scale, *CASES, translations={torch.ops.lobo_fx_kits.flipped_scale.default: forgets})


def test_a_translation_that_onnx_runtime_refuses_is_caught_by_name() -> None:
    """Floats where ONNX takes booleans."""
    from onnxscript import opset18 as op

    table: dict[Any, Any] = {torch.ops.lobo_fx_kits.positive.default: lambda x: op.Not(x)}
    with pytest.raises(AssertionError, match=r"^lobo_fx_kits\.positive\.default: "):
        check_translation(positive, (X.abs(),), translations=table)
    with pytest.raises(AssertionError, match=r"^lobo_fx_kits\.positive\.default: .*has no ONNX form"):
        check_translation(positive, (X.abs(),))


def test_a_translation_that_is_right_on_the_example_alone_is_caught() -> None:
    """`abs` of what is positive."""
    from onnxscript import opset18 as op

    table: dict[Any, Any] = {torch.ops.lobo_fx_kits.positive.default: lambda x: op.Abs(x)}
    with pytest.raises(AssertionError, match=r"^lobo_fx_kits\.positive\.default: .* times -1: off by"):
        check_translation(positive, (X.abs(),), translations=table)


@torch.library.custom_op("lobo_fx_kits::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_min(0)


@positive.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# --- observers -------------------------------------------------------------------------------------------


class Blind(CountingObserver):
    """Takes the same range whatever was seen."""

    def choose(self, seen: Any) -> tuple[float, float]:
        return -1.0, 1.0


class Doubles(RangeObserver):
    """Hands on other values than it saw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x) * 2
        return found


def test_observers_pass_their_battery() -> None:
    check_observer(MeanSquaredErrorObserver)


@pytest.mark.parametrize(("broken", "fault"), [(Blind, "decibels|times the scale"), (Doubles, "not passed through")])
def test_broken_observers_are_caught(broken: type, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_observer(broken)


# --- number formats --------------------------------------------------------------------------------------


def slow(*numbers: Format) -> list[Any]:
    return [pytest.param(number, marks=pytest.mark.slow) for number in numbers]


TERNARY = Format("ternary", 2, (0.0, 1.0))
ODD = Format("odd", 3, (0.0, 0.3, 0.7, 1.0))


@pytest.mark.parametrize("number", [ODD, *slow(FORMATS["int4"], FORMATS["log2_6"], TERNARY)], ids=lambda n: n.name)
def test_formats_pass_their_battery(number: Format) -> None:
    check_number_format(number)
    assert ("ternary" in FORMATS, "odd" in FORMATS) == (False, False)


class Truncated(Format):
    """Codes of the number below, not of the nearest."""

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        return super().encode(values * 0.8)


def test_a_format_that_does_not_round_to_the_nearest_is_caught() -> None:
    with pytest.raises(AssertionError, match="nearest"):
        check_number_format(Truncated("truncated", 3, (0.0, 0.3, 0.7, 1.0)))


@pytest.mark.parametrize("settings", [(5, (0.0, 1.0)), (2, (0.0, 1.0, 2.0)), (4, (0.5, 1.0)), (4, (0.0, 2.0, 1.0))])
def test_formats_that_can_not_be_packed_are_refused(settings: Any) -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=r"mine: (bits|magnitudes)"):
        Format("mine", *settings)


# --- exporters and runtimes ------------------------------------------------------------------------------


class Forgetful(OnnxExporter):
    """Names fewer files than it writes."""

    def export(self, program: lobo_fx.Program, path: Path, metadata: Mapping[str, str]) -> lobo_fx.Artifact:
        artifact = super().export(program, path, metadata)
        (path.parent / "rest.bin").write_bytes(b"1")
        return artifact


class Off:
    """A session whose outputs are another's times a factor."""

    def __init__(self, session: Any) -> None:
        self.session, self.inputs = session, session.inputs

    def run(self, arrays: Any) -> list[Any]:
        return [np.multiply(output, 1.01) for output in self.session.run(arrays)]


class Inexact(OnnxRuntime):
    """Computes something else."""

    def load(self, path: Path, threads: int | None) -> Any:
        return Off(super().load(path, threads))


class Trusting(OnnxRuntime):
    """Loads anything."""

    def load(self, path: Path, threads: int | None) -> Any:
        return None if path.read_bytes() == b"no model" else super().load(path, threads)


def test_onnx_and_its_runtime_pass() -> None:
    check_exporter(OnnxExporter(), OnnxRuntime())
    check_runtime(OnnxRuntime())


@pytest.mark.slow
def test_broken_exporters_and_runtimes_are_caught() -> None:
    with pytest.raises(AssertionError, match="files are"):
        check_exporter(Forgetful(), OnnxRuntime())
    with pytest.raises(AssertionError, match="off by"):
        check_exporter(OnnxExporter(), Inexact())
    with pytest.raises(AssertionError, match="off by"):
        check_runtime(Inexact())
    with pytest.raises(AssertionError, match="not refused"):
        check_runtime(Trusting())
