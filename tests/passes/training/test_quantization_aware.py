"""Quantization-aware training: what converts computes what was trained, and is never below static quantization."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchao.quantization.pt2e import FakeQuantize, MovingAverageMinMaxObserver

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.operators import arguments, aten
from lobo_fx.graph.program import Program
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes import QuantizationAwareTraining, QuantizeStatic
from lobo_fx.passes.quantization.integers.training_ranges import LearnedRange
from lobo_fx.passes.training import loop, quantization_aware
from lobo_fx.passes.training.learning_rate import Found
from lobo_fx.plugins.kernels import Cost
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.result import Result

IMAGES = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = (IMAGES.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1
DATA = [(IMAGES[at : at + 16], LABELS[at : at + 16]) for at in range(0, 64, 16)]
STATIC = QuantizeStatic(kernels="all")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 3),
    ).eval()


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(network(), IMAGES[:2])


def trained(program: Program, evaluate: Any = None, **settings: Any) -> Result:
    settings = {"quantize": STATIC, "epochs": 2, "learning_rate": 2e-3, **settings}
    return lobo_fx.compile(
        program,
        [QuantizationAwareTraining(**settings)],
        train_data=DATA,
        calibration_data=[IMAGES[:32]],
        loss_fn=cross_entropy,
        evaluate=evaluate,
        progress=False,
    )


def loss_score(module: nn.Module) -> float:
    with torch.no_grad():
        return -float(cross_entropy(module(IMAGES), LABELS))


@pytest.mark.parametrize("ranges", ["followed", "learned"])
def test_what_converts_computes_what_was_trained(
    program: Program, ranges: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    class Kept(quantization_aware._Quantized):
        def finish(self) -> None:
            super().finish()
            made.append(self.candidate())

    monkeypatch.setattr(quantization_aware, "_Quantized", Kept)
    result = trained(program, ranges=ranges)
    with torch.no_grad():
        faked, found, before = made[0](IMAGES), result.module(IMAGES), program.module(IMAGES)
    step = float((faked.max() - faked.min()) / 255)
    assert (found - faked).abs().max() <= 2 * step
    assert (before - faked).abs().max() > 4 * step  # it has learned
    artifact = result.export(tmp_path / "model.onnx")  # parity is checked
    assert artifact.details["kernels"].get("QLinearConv") == 2
    assert loss_score(result.module) > loss_score(program.module)


def test_it_is_never_below_static_quantization(program: Program) -> None:
    static = lobo_fx.compile(program, [STATIC], calibration_data=[IMAGES[:32]], progress=False)
    for rate, epochs in ((2e-3, 2), (5.0, 1)):  # one that helps, one that ruins
        result = trained(program, loss_score, learning_rate=rate, epochs=epochs, schedule="constant", warmup=0.0)
        assert loss_score(result.module) >= loss_score(static.module) - 1e-6
        assert result.report.rows[-1].score == pytest.approx(loss_score(result.module))


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_a_score_that_is_lost_in_converting_is_seen(program: Program, rounding: Any) -> None:
    """Training scores well on fake quantizers and badly as converted: what static quantization gives is kept."""
    quantize = dataclasses.replace(STATIC, rounding=rounding)
    rising = itertools.count(1.0)

    def score(module: nn.Module) -> float:
        faked = any(isinstance(part, FakeQuantize) for part in module.modules())
        with torch.no_grad():
            return next(rising) if faked else -float((module(IMAGES[:8]) - program.module(IMAGES[:8])).abs().mean())

    static = lobo_fx.compile(program, [quantize], calibration_data=[IMAGES[:32]], progress=False)
    result = trained(program, score, learning_rate=0.05, quantize=quantize)
    assert any("without it" in note.reason for note in result.report.notes)
    expected = static.module.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in result.module.state_dict().items())


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_weights_that_stay_float_are_rounded_before_scores_are_compared(
    program: Program, rounding: Any, tmp_path: Path
) -> None:
    """What training gains before that may be lost by it."""
    lobo_fx.compile(program, [QuantizeStatic()], calibration_data=[IMAGES[:32]], progress=False)  # measures costs
    known = CostTable.of_this_machine(RUNTIMES.get(RUNTIMES.default)().version).costs
    costs = {key: Cost(100, 1) if key.startswith("conv ") else Cost(0.1, 100) for key in known}
    CostTable("test", costs | {k: Cost(0.1, 0.1) for k in known if k.startswith("convert")}).save(
        tmp_path / "costs.json"
    )
    quantize = QuantizeStatic(rounding=rounding, costs=str(tmp_path / "costs.json"))
    expected = program.module(IMAGES).detach()

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return -1e4 * float((module(IMAGES) - expected).square().mean())

    static = lobo_fx.compile(program, [quantize], calibration_data=[IMAGES[:32]], progress=False)
    result = trained(program, score, quantize=quantize, learning_rate=1e-9, epochs=1)
    assert any(name.endswith("codes") or "6.weight" in name for name in result.module.state_dict())
    assert score(result.module) >= score(static.module) - 1e-6


def test_ranges_follow_weights_and_settle(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    class Noted(quantization_aware._Quantized):
        def begin_step(self, share: float) -> None:
            super().begin_step(share)
            observers = [part for part in self.modules() if isinstance(part, MovingAverageMinMaxObserver)]
            seen.append([float(part.get_buffer("max_val")) for part in observers])

    monkeypatch.setattr(quantization_aware, "_Quantized", Noted)
    trained(program, settle_at=0.5, epochs=2)
    assert len(seen) == 8
    assert len({tuple(entry) for entry in seen[:5]}) == 5
    assert len({tuple(entry) for entry in seen[4:]}) == 1
    result = trained(program, settle_at=1.0)
    assert result.report.rows[-1].snr is not None


def test_what_a_trial_settles_follows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm before everything else can't be folded: it follows the data in the first half of each training."""
    seen: list[tuple[bool, bool]] = []

    class Noted(quantization_aware._Quantized):
        def begin_step(self, share: float) -> None:
            super().begin_step(share)
            (norm,) = self.program_module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
            observers = [part for part in self.modules() if isinstance(part, FakeQuantize)]
            following = [bool(part.observer_enabled[0]) for part in observers]  # those of weights always do
            seen.append((bool(arguments(norm)["training"]), all(following)))

    def one(trial: Callable[[float, int], float], steps: int) -> Found:
        assert trial(1e-3, 8) < math.inf
        return Found(1e-3, "")

    monkeypatch.setattr(quantization_aware, "_Quantized", Noted)
    monkeypatch.setattr(loop, "best_rate", one)
    torch.manual_seed(0)
    first = trace(nn.Sequential(nn.BatchNorm2d(3), network()).eval(), IMAGES[:2])
    trained(first, learning_rate="auto", settle_at=0.5)
    following, settled = (True, True), (False, False)
    assert seen == [following] * 4 + [settled] * 4 + [following] * 5 + [settled] * 4


def test_learned_ranges_have_the_gradient_of_what_they_compute() -> None:
    """The straight-through gradient is that of the function in which rounding adds a constant."""
    fake = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    values = torch.linspace(-2, 3, 40)
    fake(torch.tensor([-1.0, 2.0]))
    made = LearnedRange(fake).double()
    values = values.double().requires_grad_()
    made(values).square().sum().backward()

    scale = float((made.high - made.low).detach()) / 255
    shift = [round(-float(made.low.detach()) / scale) + float(made.low.detach()) / scale]
    roundings = (values.detach() / scale).round() - values.detach() / scale

    def smooth(low: float, high: float, x: torch.Tensor) -> torch.Tensor:
        step = (high - low) / 255
        zero = -low / step + shift[0]
        codes = x / step + roundings + zero
        return (codes.clamp(0, 255) - zero) * step

    def total(low: float, high: float) -> float:
        return float(smooth(low, high, values.detach()).square().sum())

    low, high = float(made.low.detach()), float(made.high.detach())
    assert torch.allclose(smooth(low, high, values.detach()), made(values).detach(), atol=1e-12)
    h = 1e-6
    for parameter, slope in (
        (made.low, (total(low + h, high) - total(low - h, high)) / (2 * h)),
        (made.high, (total(low, high + h) - total(low, high - h)) / (2 * h)),
    ):
        assert parameter.grad is not None
        assert float(parameter.grad) == pytest.approx(slope, rel=1e-4)
        assert abs(slope) > 1e-3
    inside = (values > low + scale) & (values < high - scale)
    expected = torch.where(inside, 2 * made(values).detach(), torch.zeros(()).double())
    assert values.grad is not None
    assert torch.allclose(values.grad[inside], expected[inside], rtol=1e-6)
    assert float(values.grad[0]) == float(values.grad[-1]) == 0.0


def test_a_range_computes_what_its_fake_quantizer_does() -> None:
    fake = FakeQuantize(observer=MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.int8)
    values = torch.randn(1000) * 2
    fake(values)
    fake.disable_observer()
    made = LearnedRange(fake)
    assert (made(values) - fake(values)).abs().max() <= float(fake.scale) * 1.001  # at most one code, in ties
    assert ((made(values) - fake(values)).abs() > 1e-5).double().mean() < 0.01
    assert math.isclose(float(made.low.detach()), float(values.min()), rel_tol=1e-6)


def test_a_killed_training_goes_on(program: Program, tmp_path: Path) -> None:
    whole = trained(program, ranges="learned").module.state_dict()
    left = iter(range(5))

    class Killed(BaseException):
        """Nothing catches it."""

    def dying(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Killed
        return cross_entropy(outputs, labels)

    settings: dict[str, Any] = {"quantize": STATIC, "epochs": 2, "learning_rate": 2e-3, "ranges": "learned"}
    training = QuantizationAwareTraining(checkpoint_dir=tmp_path, **settings)
    given: dict[str, Any] = {"train_data": DATA, "calibration_data": [IMAGES[:32]], "progress": False}
    with pytest.raises(Killed):
        lobo_fx.compile(program, [training], loss_fn=dying, **given)
    found = lobo_fx.compile(program, [training], loss_fn=cross_entropy, **given).module.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in found.items())


def test_data_to_calibrate_is_asked_for(program: Program) -> None:
    with pytest.raises(InvalidInput, match="quantization_aware_training needs calibration_data="):
        lobo_fx.compile(program, ["quantization_aware_training"], train_data=DATA, loss_fn=cross_entropy)
    assert copy.deepcopy(program.module) is not program.module


@pytest.mark.parametrize("ranges", ["followed", "learned"])
def test_what_an_earlier_pass_quantized_keeps_its_range(ranges: Literal["followed", "learned"]) -> None:
    """The convolution's output is quantized for the pool; the layer behind the pool is left to the training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 5)).eval()
    images, codes = torch.randn(16, 3, 8, 8), torch.ops.quantized_decomposed
    result = lobo_fx.compile(
        model,
        [
            QuantizeStatic(kernels="all", overrides={"4": "float"}),
            QuantizationAwareTraining(ranges=ranges, quantize={"kernels": "all"}, steps=3, learning_rate=1e-2),
        ],
        example_inputs=images[:2],
        calibration_data=[images],
        train_data=[(images, torch.zeros(16, dtype=torch.long))],
        loss_fn=nn.functional.cross_entropy,
        progress=False,
    )
    pairs = result.program.graph.find_nodes(op="call_function", target=codes.quantize_per_tensor.default)
    assert all(pair.args[0].target is not codes.dequantize_per_tensor.default for pair in pairs)
    (linear,) = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert "dequantize" in str(linear.args[1].target)
