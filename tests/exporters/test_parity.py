"""The comparison of a file with PyTorch: what passes, what does not, on both sides of the line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import fx, nn

import lobo_fx
from lobo_fx import ExportError, Program
from lobo_fx.exporters import parity
from lobo_fx.exporters.parity import check_parity, is_quantized, rounding_noise
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import QuantizeStatic

Array = npt.NDArray[Any]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


class Function(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def program_of(function: Callable[[torch.Tensor], Any], x: torch.Tensor = IMAGES) -> Program:
    return lobo_fx.trace(Function(function), x)


def arrays(program: Program) -> list[Array]:
    return [leaf.numpy().copy() for leaf in torch.utils._pytree.tree_leaves(program.run())]


def check(program: Program, found: list[Array]) -> float:
    return check_parity(program, program.example_inputs, found).error


# Float programs.


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_float_program_may_differ_by_a_thousandth_of_its_range(size: float, sign: int) -> None:
    program = program_of(lambda x: size * torch.tanh(x))
    found = arrays(program)
    largest = np.abs(found[0]).max()
    assert check(program, found) == 0
    index = np.unravel_index(np.abs(found[0]).argmin(), found[0].shape)
    exact = found[0][index]
    found[0][index] = exact + sign * 0.95e-3 * largest
    assert check(program, found) == pytest.approx(0.95e-3, rel=1e-3)
    found[0][index] = exact + sign * 1.05e-3 * largest
    with pytest.raises(ExportError, match=r"differ from PyTorch's by 1\.[01]e-03 of their range"):
        check(program, found)


def test_each_output_is_held_to_its_own_range() -> None:
    program = program_of(lambda x: (1000 * x, x / 1000))
    found = arrays(program)
    assert check(program, found) == 0
    found[1] *= 1.5
    with pytest.raises(ExportError, match="differ"):
        check(program, found)


def test_an_output_of_zeros_must_stay_one() -> None:
    program = program_of(lambda x: x * 0)
    found = arrays(program)
    assert check(program, found) == 0
    found[0][0, 0, 0, 0] = 0.01
    with pytest.raises(ExportError, match="differ"):
        check(program, found)


def test_shapes_and_numbers_of_outputs_must_agree() -> None:
    program = program_of(lambda x: (x, x.sum(1)))
    first, second = arrays(program)
    for found in ([first], [first, second, second], [second, first], [first, second[:, None]], [first[:3], second[:3]]):
        with pytest.raises(ExportError, match="shapes"):
            check(program, found)


def test_nan_only_where_pytorch_has_it() -> None:
    program = program_of(torch.tanh)
    found = arrays(program)
    found[0][0, 0, 0, 0] = math.nan
    with pytest.raises(ExportError, match=r"NaN.* where PyTorch does not"):
        check(program, found)


def masked(x: torch.Tensor) -> torch.Tensor:
    """As the scores of a causal language model are: minus infinity in places."""
    return x.masked_fill(x > 1.5, -math.inf)


def test_infinities_in_the_same_places_agree() -> None:
    program = program_of(masked)
    found = arrays(program)
    assert np.isinf(found[0]).any()
    assert check(program, found) == 0


@pytest.mark.parametrize("kind", ["wrong_beside", "finite_there", "infinite_elsewhere", "positive_there", "nan_there"])
def test_infinities_hide_no_difference(kind: str) -> None:
    program = program_of(masked)
    found = arrays(program)
    infinite = np.isinf(found[0])
    if kind == "wrong_beside":
        found[0][~infinite] += 3
    elif kind == "finite_there":
        found[0][infinite] = 0
    elif kind == "infinite_elsewhere":
        found[0][~infinite] = -math.inf
    elif kind == "positive_there":
        found[0][infinite] = math.inf
    else:
        found[0][infinite] = math.nan
    said = "outputs differ from PyTorch's by" if kind == "wrong_beside" else "NaN or infinity where PyTorch does not"
    with pytest.raises(ExportError, match=said):
        check(program, found)


def test_nan_that_pytorch_has_too_hides_no_difference() -> None:
    program = program_of(lambda x: torch.log(x + 2))
    found = arrays(program)
    missing = np.isnan(found[0])
    assert missing.any()
    assert not missing.all()
    assert check(program, found) == 0
    found[0][~missing] = 7
    with pytest.raises(ExportError, match="outputs differ from PyTorch's by"):
        check(program, found)


@pytest.mark.parametrize(
    ("function", "change"),
    [
        (lambda x: (x * 10).to(torch.int64), 1),
        (lambda x: (x * 10).to(torch.int32), -3),
        (lambda x: x > 0, None),
    ],
    ids=["int64", "int32", "bool"],
)
def test_whole_numbers_must_be_the_same(function: Callable[[torch.Tensor], Any], change: int | None) -> None:
    program = program_of(function)
    found = arrays(program)
    assert check(program, found) == 0
    found[0] = ~found[0] if change is None else found[0] + np.asarray(change, found[0].dtype)
    with pytest.raises(ExportError, match="outputs differ from PyTorch's by"):
        check(program, found)


# Quantized programs.


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(x + self.body(x))


@pytest.fixture(scope="module")
def quantized() -> Program:
    """Some depth, so that a difference of rounding travels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    pass_ = QuantizeStatic(observer="min_max", kernels="all")
    result = lobo_fx.compile(model, [pass_], example_inputs=IMAGES, calibration_data=[IMAGES], progress=False)
    return result.program


@pytest.fixture(scope="module")
def noise_of_rounding(quantized: Program) -> float:
    return rounding_noise(quantized, quantized.example_inputs)


@pytest.fixture
def _noise_measured_once(quantized: Program, noise_of_rounding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a property of the program, as is tested below, and takes longer than all else that a comparison does."""

    def known(program: Program, *given: Any) -> float:
        assert program is quantized
        return noise_of_rounding

    monkeypatch.setattr(parity, "rounding_noise", known)


def activations(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) == QUANTIZE]


def rescaled(program: Program, index: int, factor: float) -> Program:
    """The program with one activation read at a wrong scale, as a faulty translation would."""
    wrong = program.clone()
    for user in list(activations(wrong)[index].users):
        user.args = (user.args[0], user.args[1] * factor, *user.args[2:])  # type: ignore[operator]
    wrong.module.recompile()
    return wrong


def shifted(program: Program, index: int) -> Program:
    """The program with one zero point off by one."""
    wrong = program.clone()
    for user in list(activations(wrong)[index].users):
        user.args = (*user.args[:2], user.args[2] + 1, *user.args[3:])  # type: ignore[operator]
    wrong.module.recompile()
    return wrong


def test_quantized_programs_are_known_by_their_operators(quantized: Program) -> None:
    assert is_quantized(quantized)
    assert not is_quantized(program_of(torch.round))


def test_rounding_noise_is_a_property_of_the_program(quantized: Program) -> None:
    inputs = quantized.example_inputs
    noise = rounding_noise(quantized, inputs)
    assert 30 < noise < 60
    assert rounding_noise(quantized, inputs) == noise
    assert rounding_noise(quantized.clone(), inputs) == noise


def test_rounding_noise_grows_with_what_values_are_moved_by(
    quantized: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for share in (0.0, 1e-3, 1e-2, 0.5):
        monkeypatch.setattr(parity, "STEP_SHARE", share)
        found.append(rounding_noise(quantized, quantized.example_inputs))
    assert found[0] == 60, "nothing moved: what a float program is held to"
    assert found[1] > found[2] > found[3]


def test_the_noise_of_few_outputs_is_the_worst_of_several_draws(
    quantized: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two elements, the noise of a single draw is below a tenth of its mean once in ten times."""
    few = lobo_fx.compile(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)),
        [QuantizeStatic(kernels="all")],
        example_inputs=IMAGES[:1],
        calibration_data=[IMAGES],
        progress=False,
    ).program
    for program, draws in ((few, parity.MOST_DRAWS), (quantized, 3)):  # of 2 and of 40 elements
        seen: list[float] = []

        def noted(*outputs: Any, seen: list[float] = seen) -> float:
            seen.append(signal_to_noise(*outputs))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(parity, "signal_to_noise", noted)
            found = rounding_noise(program, program.example_inputs)
        assert len(seen) == draws
        assert found == min(seen)


def test_rounding_noise_leaves_the_program_as_it_was(quantized: Program) -> None:
    before = arrays(quantized)
    code, modes = quantized.module.code, [module.training for module in quantized.module.modules()]
    rounding_noise(quantized, quantized.example_inputs)
    assert np.array_equal(arrays(quantized)[0], before[0])
    assert quantized.module.code == code
    assert [module.training for module in quantized.module.modules()] == modes


@pytest.mark.usefixtures("_noise_measured_once")
@pytest.mark.parametrize("seed", range(5))
def test_values_rounded_the_other_way_are_accepted(quantized: Program, seed: int) -> None:
    """A runtime that sums in another order: every value a few millionths off before it is rounded."""

    class OtherOrder(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().call_function(target, args, kwargs)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and str(target) != QUANTIZE:
                value = value * (1 + 3e-6 * torch.randn(value.shape, generator=generator))
            return value

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        moved = OtherOrder(quantized.module).run(IMAGES, enable_io_processing=False)
    (found,) = torch.utils._pytree.tree_leaves(moved)
    assert not torch.equal(found, quantized.run())
    check(quantized, [found.numpy()])


@pytest.mark.usefixtures("_noise_measured_once")
@pytest.mark.parametrize(
    ("index", "factor"),
    [(0, 0.95), (0, 1.05), (4, 0.95), (-1, 1.05), (-1, 2.0), (0, 0.0), (2, 0.75), (2, 1.25)],
)
def test_a_wrong_scale_is_caught(quantized: Program, index: int, factor: float) -> None:
    """Activation 2 is inside a residual block, whose shortcut dilutes what is wrong in it."""
    wrong = rescaled(quantized, index, factor)
    assert signal_to_noise(quantized.run(), wrong.run()) < 40
    with pytest.raises(ExportError, match="agree with PyTorch's to"):
        check(quantized, arrays(wrong))


def test_a_wrong_zero_point_is_caught(quantized: Program) -> None:
    with pytest.raises(ExportError, match="dB"):
        check(quantized, arrays(shifted(quantized, 0)))


def test_a_wrong_weight_scale_is_caught(quantized: Program) -> None:
    wrong = quantized.clone()
    name = next(name for name, _ in wrong.module.named_buffers() if name.endswith("weight_scale"))
    wrong.module.get_buffer(name)[0] *= 1.5
    with pytest.raises(ExportError, match="dB"):
        check(quantized, arrays(wrong))


@pytest.mark.usefixtures("_noise_measured_once")
def test_an_unrelated_output_is_caught(quantized: Program) -> None:
    (found,) = arrays(quantized)
    for wrong in (np.zeros_like(found), -found, found[::-1].copy(), np.full_like(found, found.mean())):
        with pytest.raises(ExportError, match="dB"):
            check(quantized, [wrong])


def test_exactly_equal_is_no_difference(quantized: Program) -> None:
    assert check(quantized, arrays(quantized)) == 0


# Parts, and what agrees badly.


class Head(nn.Module):
    """Boxes a thousand times as large as scores, joined or apart."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined, self.box, self.score = joined, nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: torch.Tensor) -> Any:
        both = (1000 * self.box(x), self.score(x))
        return torch.cat(both, 1) if self.joined else both


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("integer", [True, False])
def test_large_values_hide_no_wrong_small_ones(joined: bool, integer: bool) -> None:
    torch.manual_seed(0)
    program = lobo_fx.trace(Head(joined).eval(), IMAGES)
    if integer:
        pass_ = QuantizeStatic(kernels="all")
        program = lobo_fx.compile(program, [pass_], calibration_data=[IMAGES], progress=False).program
    found = arrays(program)
    assert check(program, found) == 0
    scores = found[0][:, 4:] if joined else found[1]
    before = [array.copy() for array in found]
    scores += 0.3 * scores[:, ::-1]
    whole = signal_to_noise(*([torch.from_numpy(array) for array in outputs] for outputs in (before, found)))
    assert whole > 55, "the twin: over all outputs, nothing is seen"
    words = r"dB in output(, score|_1); rounding alone" if integer else "differ from PyTorch's"
    with pytest.raises(ExportError, match=words):
        check(program, found)


def test_a_file_that_agrees_badly_is_said_so_loudly(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    result = lobo_fx.compile(model, example_inputs=IMAGES, progress=False)
    result.export(tmp_path / "good.onnx")
    assert not [note for note in result.report.notes if "WARNING" in note]
    parity_of = check_parity

    def badly(*given: Any) -> Any:
        return dataclasses.replace(parity_of(*given), decibels=4.2, part="output_1")

    monkeypatch.setattr("lobo_fx.exporters.onnx.exporter.check_parity", badly)
    words = r"WARNING: bad.onnx agrees with PyTorch to 4\.2 dB only, in output_1"
    with pytest.warns(UserWarning, match=words):
        result.export(tmp_path / "bad.onnx")
    for text in (str(result), result.report.to_markdown().replace("\\", ""), result.report.to_json()):
        assert "WARNING: bad.onnx agrees with PyTorch to 4.2 dB only, in output" in text
