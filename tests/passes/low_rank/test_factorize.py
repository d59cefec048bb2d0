"""`Factorize` against numpy's singular values, eager layers, and what later passes make of it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Result
from lobo_fx.graph.layers import layers
from lobo_fx.graph.masks import masks
from lobo_fx.graph.provenance import module_name
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import (
    Factorize,
    FineTune,
    PruneChannels,
    PruneWeights,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
)
from lobo_fx.testing import check_pass

PLAIN = "ranks were lowered by plain singular values"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs that lie mostly in a few directions, about a mean that is not zero."""
    return draw(rows, columns, seed=seed) * torch.logspace(0, -2, columns) @ draw(columns, columns, seed=7) + 1


def mlp(*widths: int) -> Any:
    steps = [step for a, b in itertools.pairwise(widths) for step in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*steps[:-1]).eval()


def lowered(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank by numpy's singular values."""
    left, values, right = np.linalg.svd(weight.detach().double().flatten(1).numpy(), full_matrices=False)
    return torch.tensor((left[:, :rank] * values[:rank]) @ right[:rank]).float().view(weight.shape)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def notes(result: Result) -> list[str]:
    return [str(note) for note in result.report.notes]


def snr(model: nn.Module, result: Result, x: torch.Tensor) -> float:
    with torch.no_grad():
        return signal_to_noise(model(x), result.module(x))


# --- what two layers compute -------------------------------------------------------------------------------


def test_a_linear_layer_becomes_two_with_the_largest_singular_values() -> None:
    model, x = mlp(48, 32, 4), draw(5, 48)
    result = check_pass(Factorize({"0": 0.25}), model, x, export=True)
    assert shapes(result.module) == {
        **{"0.bias": (32,), "0.down.weight": (8, 48), "0.up.weight": (32, 8)},
        **{"2.weight": (4, 32), "2.bias": (4,)},
    }
    assert any(PLAIN in note for note in notes(result))
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.copy_(lowered(weight, 8))
        np.testing.assert_allclose(result.module(x), model(x), atol=1e-5)
        model[0].weight.copy_(lowered(weight, 9))
        assert not np.allclose(result.module(x), model(x), atol=1e-3)
    first, second, _ = layers(result.program.graph)
    assert module_name(first.node) == module_name(second.node) == "0"
    assert result.report.rows[-1].macs == 8 * 80 + 128


def test_a_model_that_is_one_layer_and_frozen_weights() -> None:
    model = nn.Linear(32, 32, bias=False).requires_grad_(False).eval()
    result = check_pass(Factorize(), model, draw(3, 32))
    assert shapes(result.module) == {"down.weight": (8, 32), "up.weight": (32, 8)}
    assert not any(parameter.requires_grad for parameter in result.module.parameters())


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(16, 24, 1), (2, 16, 5, 6)),
    "stride and padding": (lambda: nn.Conv2d(16, 24, 1, stride=(2, 1), padding=(1, 2)), (2, 16, 5, 6)),
    "dilation": (lambda: nn.Conv2d(16, 24, 1, dilation=3, bias=False), (2, 16, 5, 6)),
    "same": (lambda: nn.Conv2d(16, 24, 1, padding="same"), (2, 16, 5, 6)),
    "valid": (lambda: nn.Conv1d(16, 24, 1, padding="valid"), (2, 16, 9)),
    "one dimension": (lambda: nn.Conv1d(16, 24, 1, stride=3, padding=1), (2, 16, 9)),
    "three dimensions": (lambda: nn.Conv3d(16, 24, 1, stride=2, padding=1), (2, 16, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_of_one_place_becomes_two(name: str) -> None:
    build, size = CONVOLUTIONS[name]
    model, x = nn.Sequential(build()).eval(), draw(*size)
    result = check_pass(Factorize(0.5, round_to=1), model, x, export=name in ("stride and padding", "same"))
    ones = (1,) * (len(size) - 2)
    assert shapes(result.module)["0.down.weight"] == (8, 16, *ones)
    assert shapes(result.module)["0.up.weight"] == (24, 8, *ones)
    weight = model[0].get_parameter("weight")
    with torch.no_grad():
        weight.copy_(lowered(weight, 8))
        np.testing.assert_allclose(result.module(x), model(x), atol=1e-5)


class Swapped(nn.Module):
    """GPT-2's layers: weights stored as inputs × outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(32, 48))
        self.other = nn.ParameterDict({"inner": nn.Parameter(draw(48, 32, seed=1))})
        self.bias = nn.Parameter(draw(48, seed=2))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x, self.weight).relu() @ self.other["inner"]


@pytest.mark.parametrize("data", [None, [skewed(200, 32)]])
def test_a_weight_stored_as_inputs_by_outputs(data: Any) -> None:
    model, x = Swapped().eval(), skewed(4, 32, seed=1)
    result = check_pass(Factorize(0.375), model, x, calibration_data=data, export=True)
    found = shapes(result.module)
    assert data is None or found.pop("other.bias") == (32,)  # which the fit made
    assert found == {
        **{"bias": (48,), "down.weight": (16, 32), "up.weight": (48, 16)},
        **{"other.inner_down": (16, 48), "other.inner_up": (32, 16)},
    }
    if data is not None:
        assert snr(model, result, skewed(100, 32, seed=3)) > 10
        return
    with torch.no_grad():
        for weight in (model.weight, model.other["inner"]):
            weight.copy_(lowered(weight, 16))
    np.testing.assert_allclose(result.module(x).detach(), model(x).detach(), rtol=1e-4, atol=1e-3)


# --- what is left alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1.0, 0.5])
def test_a_rank_that_makes_nothing_smaller_leaves_the_layer_exactly_as_it_is(rank: float) -> None:
    model, x = mlp(32, 32, 32), draw(4, 32)
    result = check_pass(Factorize(rank), model, x, calibration_data=[draw(64, 32)])
    assert torch.equal(result.module(x), model(x))
    assert shapes(result.module) == shapes(model)
    assert any(f"two layers of rank {int(32 * rank)} are no smaller than one of 32 by 32" in n for n in notes(result))
    assert shapes(check_pass(Factorize(0.45), model, x).module) == shapes(model)  # rounded to 16
    assert shapes(check_pass(Factorize(0.45, round_to=1), model, x).module)["0.down.weight"] == (14, 32)


class Odd(nn.Module):
    """Layers that can't be two."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Conv2d(32, 32, 3, padding=1)
        self.groups = nn.Conv2d(32, 32, 1, groups=4)
        self.turned = nn.ConvTranspose2d(32, 32, 1)
        self.table = nn.Embedding(64, 32)
        self.experts = nn.Parameter(draw(3, 32, 32))
        self.scale = nn.Linear(1, 32 * 32)
        self.fits = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> Any:
        x = self.turned(self.groups(self.window(x))).mean((2, 3)) + self.table(tokens)
        x = torch.einsum("gbi,gio->gbo", x.expand(3, -1, -1), self.experts).sum(0)
        x = F.linear(x, self.scale(x[:1, :1]).view(32, 32))
        return self.fits(x) @ self.table.weight.repeat(1, 2).T[:, :5] + F.linear(x, self.table.weight).sum(1, True)


def test_what_can_not_be_two_is_noted_with_the_reason() -> None:
    model, x = Odd().eval(), (draw(3, 32, 4, 4), torch.tensor([1, 2, 3]))
    result = check_pass(Factorize(0.25), model, x)
    after, before = shapes(result.module), shapes(model)
    assert set(before) - set(after) == {"fits.weight"}
    found = notes(result)
    for parameter, reason in {
        "window.weight": "more than one place",
        "groups.weight": "its convolution has 4 groups",
        "turned.weight": "it belongs to a transposed convolution",
        "experts": "it belongs to a product with a matrix per group",
        "table.weight": "it is read otherwise too",
        "scale.weight": "two layers of rank 1 are no smaller than one of 1024 by 1",
    }.items():
        assert any(f"'{parameter}'" in note and reason in note for note in found), (parameter, found)
    assert not any("'fits.weight'" in note for note in found)


# --- shared and masked weights -----------------------------------------------------------------------------


class Shared(nn.Module):
    """Two layers with one weight, under two names, and biases of their own; turned round the second time if asked."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.turned = nn.Linear(32, 32), nn.Linear(32, 32), turned
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        return F.linear(x, self.second.weight.t(), self.second.bias) if self.turned else self.second(x)


@pytest.mark.parametrize("data", [None, [skewed(200, 32)]])
def test_a_shared_weight_is_factorized_once(data: Any) -> None:
    model, x = Shared().eval(), skewed(4, 32, seed=1)
    result = check_pass(Factorize(), model, x, calibration_data=data, export=True)
    assert shapes(result.module) == {
        **{"first.bias": (32,), "second.bias": (32,)},
        **{"first.down.weight": (8, 32), "first.up.weight": (32, 8)},
    }
    turned = check_pass(Factorize(), Shared(turned=True).eval(), x)
    assert any("it is read otherwise too" in note for note in notes(turned))
    assert "first.weight" in shapes(turned.module)


def test_masks_of_other_layers_stay_and_those_of_factorized_ones_go() -> None:
    model, x, data = mlp(32, 64, 64, 8), skewed(4, 32, seed=1), [skewed(300, 32)]
    settings: Any = {"example_inputs": x, "calibration_data": data, "progress": False}
    steps = [PruneWeights(0.5), Factorize({"2": 0.25})]
    result = lobo_fx.compile(model, steps, **settings)
    assert masks(result.program).keys() == {"0.weight", "4.weight"}
    alone = lobo_fx.compile(model, steps[:1], **settings).module.state_dict()
    for name in ("0.weight", "4.weight"):
        assert torch.equal(result.module.state_dict()[name], alone[name])
    assert any("'2.weight' loses its mask" in note for note in notes(result))
    assert not any(name.endswith("mask") for name in result.module.state_dict())
    assert result.report.rows[-1].snr > 3


# --- how much ----------------------------------------------------------------------------------------------


def test_the_most_specific_pattern_counts() -> None:
    model, x = nn.ModuleDict({"a": mlp(32, 64, 64), "b": mlp(64, 64, 32)}), draw(4, 32)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks["b"](self.blocks["a"](x))  # type: ignore[no-any-return]

    result = check_pass(Factorize({"blocks.*": 0.125, "blocks.a.*": 0.25, "blocks.b.2": 0.5}), Net().eval(), x)
    found = shapes(result.module)
    assert found["blocks.a.0.down.weight"] == (8, 32)
    assert found["blocks.a.2.down.weight"] == (16, 64)
    assert found["blocks.b.0.down.weight"] == (8, 64)
    assert found["blocks.b.2.down.weight"] == (16, 64)
    assert "'blocks.*' is overridden by 'blocks.a.*', which is more specific, on 2 layers" in notes(result)
    without = shapes(check_pass(Factorize(0.125, exclude=["blocks.a.?", "blocks.b.2.weight"]), Net().eval(), x).module)
    assert [name for name in without if "down" in name] == ["blocks.b.0.down.weight"]
    with pytest.raises(InvalidInput, match=r"'blocks.c.\*' matches no module"):
        check_pass(Factorize({"blocks.c.*": 0.25}), Net().eval(), x)
    with pytest.raises(InvalidInput, match=r"'\*.1' matches no module with a weight that could be two"):
        check_pass(Factorize({"*.1": 0.25}), Net().eval(), x)
    with pytest.raises(InvalidInput, match=r"exclude: 'blocks\.c' matches no module or parameter"):
        check_pass(Factorize(exclude=["blocks.c"]), Net().eval(), x)


@pytest.mark.parametrize(
    ("target", "keep", "data"),
    [
        ("macs", 0.7, None),
        ("macs", 0.4, [skewed(300, 64)]),
        ("parameters", 0.5, None),
        ("file_size", 0.5, [skewed(300, 64)]),
        pytest.param("macs", 0.4, None, marks=pytest.mark.slow),
        pytest.param("file_size", 0.5, None, marks=pytest.mark.slow),
        pytest.param("macs", 0.7, [skewed(300, 64)], marks=pytest.mark.slow),
        pytest.param("parameters", 0.5, [skewed(300, 64)], marks=pytest.mark.slow),
    ],
)
def test_a_target_is_hit(target: str, keep: float, data: Any) -> None:
    model, x = mlp(64, 256, 64, 128, 64), skewed(4, 64, seed=1)
    result = check_pass(Factorize(target=target, keep=keep, round_to=1), model, x, calibration_data=data)
    before, after = result.report.rows[0], result.report.rows[-1]
    counts = {name: ("macs" if name == "macs" else "parameters") for name in ("macs", "parameters", "file_size")}
    assert getattr(after, counts[target]) / getattr(before, counts[target]) == pytest.approx(keep, rel=0.02)


def test_a_target_takes_from_where_least_is_lost() -> None:
    """Of two layers alike, one has a weight of rank 4: it alone is lowered, and nothing is lost."""
    model, x = mlp(64, 64, 64), draw(4, 64)
    with torch.no_grad():
        model[2].weight.copy_(lowered(model[2].weight, 4))
    result = check_pass(Factorize(target="macs", keep=0.63), model, x)
    assert [name for name in shapes(result.module) if "down" in name] == ["2.down.weight"]
    assert result.report.rows[-1].snr > 100
    assert any("'0.weight' is left alone: it loses most for what it would save" in note for note in notes(result))


def test_a_target_that_can_not_be_hit_is_refused_with_the_nearest() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 1)).eval(), draw(2, 3, 6, 6)
    whole, least = 64 * 27 + 64 * 64, 64 * 27 + 8 * 128
    with pytest.raises(InvalidInput, match=rf"can't be hit with round_to=8: .* {least / whole:.3f}, since"):
        check_pass(Factorize(target="macs", keep=0.1), model, x)
    check_pass(Factorize(target="macs", keep=least / whole), model, x)
    with pytest.raises(InvalidInput, match=r"layers that can be two have 0.703 of them; round_to=1 would hit it"):
        check_pass(Factorize(target="macs", keep=0.56), model, x)
    check_pass(Factorize(target="macs", keep=0.56, round_to=1), model, x)


@pytest.mark.parametrize("weighted", [True, False])
def test_decibels_choose_the_lowest_rank_by_hand(weighted: bool) -> None:
    model, x, rows = mlp(40, 40), skewed(4, 40), skewed(4000, 40, seed=1)
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(0, -1, 40))
    data = [rows] if weighted else None
    result = check_pass(Factorize(decibels=12, round_to=1, compensation="none"), model, x, calibration_data=data)
    seen = rows[[row for row in range(4000) if row % (4 if row < 64 else 8) != 1]] if weighted else torch.eye(40)
    inputs: Any = (seen - seen.mean(0) if weighted else seen).double().numpy()
    values: Any = np.linalg.svd(inputs @ model[0].weight.detach().double().numpy().T, compute_uv=False) ** 2
    tails = 10 * np.log10(values.sum() / np.array([values[rank:].sum() for rank in range(40)]))
    expected = int((tails >= 12).argmax())
    assert abs(shapes(result.module)["0.down.weight"][0] - expected) <= weighted  # shrinking may turn the scale
    assert 1 < expected < 20


# --- calibration data --------------------------------------------------------------------------------------


def centred(rows: torch.Tensor) -> Any:
    return (rows - rows.mean(0)).detach().double().numpy()


def seen(rows: torch.Tensor) -> torch.Tensor:
    """The rows that a fit sees: all but every fourth, of those after the first 64 all but every eighth."""
    return rows[[row for row in range(len(rows)) if row % (4 if row < 64 else 8) != 1]]


def least_error(x: torch.Tensor, y: torch.Tensor, rank: int) -> float:
    """Of any affine map of this rank from `x` to `y` (reduced-rank regression by numpy)."""
    inputs, outputs = centred(x), centred(y)
    fitted = inputs @ np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    values = np.linalg.svd(fitted, compute_uv=False)
    return float(((outputs - fitted) ** 2).sum() + (values[rank:] ** 2).sum())


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().double().square().sum())


def test_the_first_layer_is_at_the_optimum_of_its_rank_and_the_next_at_that_of_its_own_inputs() -> None:
    model, rows, fresh = mlp(32, 48, 24), skewed(1000, 32), skewed(500, 32, seed=5)
    passed = Factorize({"0": 0.125, "2": 0.25}, round_to=2)
    result = check_pass(passed, model, rows[:4], calibration_data=list(torch.split(rows, 250)))
    made = result.module
    state, fit = made.state_dict(), seen(rows)
    first = F.linear(F.linear(fit, state["0.down.weight"]), state["0.up.weight"], state["0.bias"])
    assert error(first, model[0](fit)) < 1.05 * least_error(fit, model[0](fit), 4)
    wanted = model(fit)
    assert error(made(fit), wanted) < 1.05 * least_error(first.relu(), wanted, 6)
    # not at that of the original's inputs, which it does not have
    blind = lowered_by(model[2].weight, model[0](fit).relu(), 6)
    shift = (wanted - F.linear(first.relu(), blind)).mean(0)
    assert error(F.linear(first.relu(), blind, shift), wanted) > 1.05 * error(made(fit), wanted)
    plain = check_pass(dataclasses.replace(passed, compensation="none"), model, rows[:4])
    assert snr(model, result, fresh) > snr(model, plain, fresh) + 5


def lowered_by(weight: torch.Tensor, rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest weight of a rank for these inputs, by numpy."""
    inputs = centred(rows)
    left, _, _ = np.linalg.svd(weight.detach().double().numpy() @ inputs.T, full_matrices=False)
    return torch.tensor(left[:, :rank] @ left[:, :rank].T).float() @ weight.detach()


def test_batch_norms_and_residual_sums_are_fitted_too() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.last(self.norm(self.conv(x)).relu())

    model = nn.Sequential(nn.Conv2d(3, 32, 3), Block(), Block(), nn.Flatten(), nn.Linear(32 * 16, 10))
    rows = skewed(256, 108).view(256, 3, 6, 6)
    model(rows)  # which sets the statistics of the norms
    model.eval()
    settings: Any = {"example_inputs": rows[:2], "progress": False}
    found = [
        lobo_fx.compile(
            model, [Factorize(0.25, compensation=method)], calibration_data=list(torch.split(rows, 64)), **settings
        )
        for method in ("none", "reconstruct")
    ]
    plain, refitted = (snr(model, result, skewed(64, 108, seed=9).view(64, 3, 6, 6)) for result in found)
    assert refitted > plain + 1


def test_few_rows_do_no_harm_and_a_single_one_fits_nothing() -> None:
    model, x = mlp(64, 64, 64, 32), draw(4, 64)
    plain = check_pass(Factorize(), model, x, calibration_data=[draw(1, 64)])
    assert any("no row of calibration data can be held out" in note for note in notes(plain))
    fresh = draw(500, 64, seed=2)
    few = check_pass(Factorize(), model, x, calibration_data=[draw(8, 64, seed=1)])
    assert snr(model, few, fresh) > snr(model, plain, fresh) - 0.5


# --- what comes after --------------------------------------------------------------------------------------


def test_the_rank_is_an_axis_that_can_be_pruned() -> None:
    steps = [Factorize(0.375), PruneChannels(0.3, kinds=["hidden"])]
    result = lobo_fx.compile(mlp(64, 64, 64), steps, example_inputs=skewed(6, 64), progress=False)
    assert shapes(result.module) == {
        **{"0.down.weight": (16, 64), "0.up.weight": (48, 16), "0.bias": (48,)},
        **{"2.down.weight": (16, 48), "2.up.weight": (64, 16), "2.bias": (64,)},
    }


AFTER: dict[str, Any] = {
    "weights": QuantizeWeights("int8"),
    "static": QuantizeStatic(kernels="all"),
    "dynamic": QuantizeDynamic(),
}


@pytest.mark.parametrize("name", ["weights", "static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_it_can_be_quantized_afterwards_and_exported(name: str, tmp_path: Path) -> None:
    model, data = mlp(64, 128, 64, 16), skewed(200, 64)
    settings: Any = {"example_inputs": data[:3], "calibration_data": [data], "progress": False}
    result = lobo_fx.compile(model, [Factorize(0.25), AFTER[name]], **settings)
    assert any("down" in name for name in shapes(result.module))
    factorized, quantized = (row.snr for row in result.report.rows[1:])
    assert quantized > factorized - 1
    result.export(tmp_path / "model.onnx")


def test_it_can_be_trained_saved_and_run_on_other_batches(tmp_path: Path) -> None:
    model, data = mlp(32, 64, 4), draw(128, 32)
    labelled = [(rows, rows[:, :4].argmax(1)) for rows in torch.split(data, 32)]
    result = lobo_fx.compile(
        model,
        [Factorize(0.25), FineTune(epochs=8, learning_rate=3e-2)],
        example_inputs=data[:3],
        train_data=labelled,
        loss_fn=F.cross_entropy,
        progress=False,
    )
    assert shapes(result.module)["0.down.weight"] == (8, 32)

    def loss(module: nn.Module) -> float:
        return float(F.cross_entropy(module(data), data[:, :4].argmax(1)).detach())

    assert loss(result.module) < 0.9 * loss(model)
    result.save(tmp_path / "saved")
    again = lobo_fx.load(tmp_path / "saved")
    assert again.module.state_dict().keys() == result.module.state_dict().keys()
    for rows in (1, 7, 128):
        assert torch.equal(again.module(data[:rows]), result.module(data[:rows]))


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"rank is 0; it must be in \(0, 1\]"),
        ({"rank": {"a": 1.5}}, r"rank is 1.5; it must be in \(0, 1\]"),
        ({"rank": "half"}, "rank is 'half'"),
        ({"rank": {}}, "rank maps patterns of module names to shares; it names none"),
        ({"decibels": -3}, "decibels is -3; it must be above 0"),
        ({"rank": 0.5, "decibels": 20}, "rank and decibels each say how much stays; give one of them"),
        ({"target": "latency"}, "target is 'latency'; it must be one of None, macs, parameters, file_size"),
        ({"target": "macs", "keep": 0}, "keep is 0; it must be in"),
        ({"keep": 0.5}, "keep says how much of a target stays; give target= too"),
        ({"exclude": "head"}, "exclude is 'head'; it must be a list"),
        ({"round_to": 0}, "round_to is 0; it must be a whole number of at least 1"),
        ({"compensation": "all"}, "compensation is 'all'; it must be one of auto, none"),
    ],
)
def test_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Factorize(**settings)


def test_a_compensation_by_name_needs_data() -> None:
    with pytest.raises(InvalidInput, match="needs calibration_data="):
        lobo_fx.compile(mlp(32, 32), [Factorize(compensation="bias")], example_inputs=draw(2, 32), progress=False)
