"""Compensation against numpy: least squares, statistics, and networks whose lost channels others can stand in for."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import layers
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes.fitting import linear_problem, side_by_side
from lobo_fx.passes.fitting.held_out import HeldOut
from lobo_fx.passes.fitting.linear_problem import Moments, count_rows, input_rows, matrix_of, output_rows, put_matrix
from lobo_fx.passes.pruning import layer_fitting
from lobo_fx.passes.pruning.attention_bases import Bases
from lobo_fx.passes.pruning.compensation import METHODS, chosen, compensate

Array = npt.NDArray[np.float64]
RIDGE = layer_fitting.RIDGES[0]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small layers gain nothing from threads, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit is taken whole, by the first ridge."""
    errors = itertools.count(-1, -1)
    monkeypatch.setattr(HeldOut, "approach", lambda self, start, end: (end, 1.0, next(errors)))
    monkeypatch.setattr(layer_fitting, "RIDGES", (RIDGE,))
    monkeypatch.setattr(layer_fitting, "_GROWS", -1.0)


def draw(*shape: int, seed: int = 0, **settings: Any) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **settings)


@functools.cache
def traced(net: nn.Module, *size: int) -> Program:
    """Once for all that is tried with one network; its weights are those that the network has by then."""
    return trace(net.eval(), (torch.zeros(2, *size),))


def prune(net: nn.Module, images: torch.Tensor, ratio: Mapping[str, float], method: str, batches: int = 4) -> nn.Module:
    """The network with channels removed and refitted to `images`."""
    pruning = passes.PruneChannels(ratio, round_to=1, compensation=method)
    data = list(images.chunk(batches))
    return lobo_fx.compile(traced(net, *images.shape[1:]), [pruning], calibration_data=data, progress=False).module


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().double().numpy() for name, tensor in module.state_dict().items()}


def forward(module: nn.Module, images: torch.Tensor) -> Array:
    with torch.no_grad():
        output: Array = module(images).double().numpy()
    return output


def error(net: nn.Module, pruned: nn.Module, images: torch.Tensor) -> float:
    """Energy of the difference over energy of the output about its mean."""
    before, after = forward(net.eval(), images), forward(pruned, images)
    return float(((after - before) ** 2).sum() / ((before - before.mean(0)) ** 2).sum())


# --- least squares ---------------------------------------------------------------------------------------


def seen(rows: Any) -> Any:
    """The rows that a fit sees: all but every fourth, of those after the first 64 all but every eighth."""
    return rows[[row for row in range(len(rows)) if row % (4 if row < 64 else 8) != 1]]


def ridge(x: Array, y: Array, start: Array) -> tuple[Array, Array]:
    """The same problem as rows of a plain least-squares problem, from a start whose outputs are scaled first."""
    given = (x - x.mean(0)) @ start.T
    start = ((given * y).sum(0) / (given**2).sum(0)).clip(0, 1)[:, None] * start
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    root = np.sqrt(RIDGE * (centred_x**2).sum(0).mean())
    left = np.vstack([centred_x, root * np.eye(x.shape[1])])
    right = np.vstack([centred_y, root * start.T])
    weight = np.linalg.lstsq(left, right, rcond=None)[0].T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("rows", [200, 7, 6])  # 6 are fewer than inputs
@pytest.mark.parametrize("groups", [1, 3])
def test_the_sums_solve_the_least_squares_of_all_rows(groups: int, rows: int) -> None:
    x, y = draw(groups, rows, 7, dtype=torch.double) + 2, draw(groups, rows, 4, seed=1, dtype=torch.double) - 1
    y = y + x[..., :4]
    start = draw(groups, 4, 7, seed=2, dtype=torch.double)
    moments = Moments()
    for part_x, part_y in zip(torch.split(x, 4, 1), torch.split(y, 4, 1), strict=True):
        moments.add(part_x, part_y)
    weight = moments.weight(start * moments.gain(start).unsqueeze(2), RIDGE)
    for group in range(groups):
        expected = ridge(x[group].numpy(), y[group].numpy(), start[group].numpy())
        np.testing.assert_allclose(weight[group], expected[0], atol=1e-9)
        np.testing.assert_allclose(moments.bias(weight)[group], expected[1], atol=1e-9)


def test_inputs_that_never_move_keep_their_weights() -> None:
    moments = Moments()
    moments.add(torch.ones(1, 50, 3, dtype=torch.double), draw(1, 50, 2, dtype=torch.double))
    start = draw(1, 2, 3, seed=1, dtype=torch.double)
    torch.testing.assert_close(moments.weight(start, RIDGE), start, rtol=0, atol=1e-3)


class Product(nn.Module):
    """A product with a stored matrix, as a function spells it."""

    def __init__(self, function: Callable[..., torch.Tensor], *sizes: int) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(draw(*sizes, seed=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (3, 6, 5)),
    "inputs x outputs": (lambda: Product(torch.matmul, 5, 4), (3, 6, 5)),
    "a matrix per group": (lambda: Product(torch.bmm, 3, 5, 4), (3, 6, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (2, 6, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 9, 8)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)), (2, 3, 9, 8)),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_the_weight_are_the_layers_outputs(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make().eval(), draw(*shape)
    program = trace(layer, (x,), dynamic_shapes=None)
    (found,) = layers(program.graph)
    output = layer(x).detach()
    chosen = torch.randperm(count_rows(found, output), generator=torch.Generator().manual_seed(0))[:20]
    assert found.read is not None
    weight = program.parameter(found.read)
    products = input_rows(found, x, weight.shape[2:], chosen) @ matrix_of(found, weight).mT
    bias = 0 if found.bias is None else program.parameter(found.bias).view(found.groups, 1, -1)
    torch.testing.assert_close((products + bias).detach(), output_rows(found, output, chosen), rtol=1e-5, atol=1e-5)
    before = weight.detach().clone()
    with torch.no_grad():
        put_matrix(found, weight, matrix_of(found, weight) * 2)
    torch.testing.assert_close(weight.detach(), 2 * before)


# --- networks whose lost channels others can stand in for ------------------------------------------------


class Dependent(nn.Module):
    """Hidden units of which the last half are sums of the first half."""

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 5)
        self.relu = nn.ReLU() if relu else nn.Identity()
        with torch.no_grad():
            mix = 0.1 * draw(8, 8)
            self.first.weight[8:] = mix @ self.first.weight[:8]
            self.first.bias[8:] = mix @ self.first.bias[:8] + 1

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.relu(self.first(x)))


def test_dependent_channels_are_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fitting, "RIDGES", (1e-9,))
    net, rows = Dependent(), draw(200, 6, seed=3)
    pruned = prune(net, rows, {"first": 0.5}, "reconstruct")
    assert arrays(pruned)["first.weight"].shape == (8, 6)
    np.testing.assert_allclose(forward(pruned, rows), forward(net, rows), atol=1e-4)


def test_independent_channels_are_not() -> None:
    torch.manual_seed(0)
    net, rows = Dependent(relu=True), draw(200, 6, seed=3)
    assert error(net, prune(net, rows, {"first": 0.5}, "reconstruct"), rows) > 1e-3


@pytest.mark.usefixtures("_whole")
def test_a_layer_after_removal_is_numpys_least_squares() -> None:
    net, rows = Dependent(relu=True), draw(300, 6, seed=3)
    pruned = prune(net, rows, {"first": 0.5}, "reconstruct")
    found, before = arrays(pruned), arrays(net)
    rows = seen(rows)
    hidden = np.maximum(rows.double().numpy() @ found["first.weight"].T + found["first.bias"], 0)
    weight, bias = ridge(hidden, forward(net, rows), before["second.weight"][:, _kept(net, pruned)])
    np.testing.assert_allclose(found["second.weight"], weight, atol=1e-4)
    np.testing.assert_allclose(found["second.bias"], bias, atol=1e-4)


def _kept(net: Dependent, pruned: nn.Module) -> list[int]:
    """Which hidden units stayed, by their rows: what made them was not changed by the fit."""
    rows, stayed = arrays(net)["first.weight"], arrays(pruned)["first.weight"]
    return [int(np.abs(rows - row).max(1).argmin()) for row in stayed]


@pytest.mark.usefixtures("_whole")
def test_bias_is_the_mean_of_what_was_removed() -> None:
    net, rows = Dependent(relu=True), draw(300, 6, seed=3)
    pruned = prune(net, rows, {"first": 0.5}, "bias")
    found, before = arrays(pruned), arrays(net)
    removed = sorted(set(range(16)) - set(_kept(net, pruned)))
    hidden = np.maximum(seen(rows).double().numpy() @ before["first.weight"].T + before["first.bias"], 0)
    expected = before["second.bias"] + before["second.weight"][:, removed] @ hidden[:, removed].mean(0)
    np.testing.assert_allclose(found["second.bias"], expected, atol=1e-5)
    np.testing.assert_allclose(found["second.weight"], np.delete(before["second.weight"], removed, axis=1), atol=1e-7)


@pytest.mark.usefixtures("_whole")
def test_a_layer_without_a_bias_gets_one() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5, bias=False))
    rows = draw(100, 6)
    pruned = prune(net, rows, {"0": 0.5}, "bias")
    assert arrays(pruned)["2.bias"].shape == (5,)
    np.testing.assert_allclose(forward(pruned, seen(rows)).mean(0), forward(net, seen(rows)).mean(0), atol=1e-5)


def test_what_is_not_refitted_is_named() -> None:
    class Net(nn.Module):
        """A weight that is also added up, one that depends on the input, and a linear layer over what was channels."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice = nn.Linear(6, 16), nn.Linear(16, 16)
            self.made, self.mixed, self.last = nn.Linear(6, 16 * 16), nn.Linear(6, 6), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.twice(self.first(x)).relu() + self.twice.weight.sum()
            weight = self.made(x.mean(0)).view(16, 16)
            mixed: torch.Tensor = self.mixed(F.linear(hidden, weight)[:, :, None] * x[:, None])
            return torch.as_tensor(self.last(mixed.mean(2)))

    rows = draw(100, 6)
    pruning = passes.PruneChannels(0.5, round_to=1, compensation="reconstruct")
    settings: dict[str, Any] = {"example_inputs": rows[:2], "calibration_data": [rows], "progress": False}
    notes = lobo_fx.compile(Net(), [pruning], **settings).report.notes
    for module, reason in {"twice": "its weight has other readers", "mixed": "rows of its input were removed"}.items():
        assert any(f"module '{module}" in note and f"not refitted: {reason}" in note for note in notes), notes
    assert not any("'first'" in note or "'last'" in note for note in notes if "refitted" in note)


# --- convolutions, norms and sums ------------------------------------------------------------------------


class Residual(nn.Module):
    """A stem, a residual block with a wide inside, a grouped convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = (x + self.outer(self.inner(x))).relu()
        return self.head(self.depthwise(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def untrained() -> Residual:
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture(scope="module")
def residual() -> Residual:
    """With statistics as training leaves them."""
    torch.manual_seed(0)
    net = Residual()
    net(draw(64, 3, 8, 8, seed=5))
    with torch.no_grad():
        for _ in range(40):
            net(draw(64, 3, 8, 8, seed=5) + 0.5)
    return net.eval()


IMAGES = draw(64, 3, 8, 8, seed=5) + 0.5


def inner_rows(net: nn.Module) -> Array:
    """What the norm inside the residual block sees of the rows that a fit sees: (rows, channels)."""
    stem = {name: torch.from_numpy(array).float() for name, array in arrays(net).items()}
    x = F.conv2d(seen(IMAGES), stem["stem.0.weight"], padding=1)
    mean, variance, scale, shift = (
        stem[f"stem.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = F.batch_norm(x, mean, variance, scale, shift)
    rows = F.conv2d(x.relu(), stem["inner.0.weight"], padding=1).double().numpy()
    return np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1])


@pytest.mark.parametrize("wrong", [False, True], ids=["of the data", "of other data"])
def test_a_norms_outputs_keep_their_moments(residual: Residual, wrong: bool) -> None:
    """Where statistics were those of the data they are again; else they differ from it as much as they did."""
    if wrong:
        residual = copy.deepcopy(residual)
        state = residual.state_dict()
        state["inner.1.running_mean"] += 0.3
        state["inner.1.running_var"] *= 0.5
    pruned = prune(residual, IMAGES, {"stem.0": 0.5}, "recalibrate")
    found, before = arrays(pruned), arrays(residual)
    assert not np.allclose(found["inner.1.running_var"], before["inner.1.running_var"], rtol=1e-2)
    outputs = []
    for net, state in ((residual, before), (pruned, found)):
        rows = inner_rows(net)
        outputs.append((rows - state["inner.1.running_mean"]) / np.sqrt(state["inner.1.running_var"] + 1e-5))
    np.testing.assert_allclose(outputs[1].mean(0), outputs[0].mean(0), atol=1e-4)
    np.testing.assert_allclose(outputs[1].std(0), outputs[0].std(0), rtol=1e-3)


@pytest.mark.parametrize(
    ("decibels", "taken"),
    [
        ((1, 1, 9, 20), "reconstruct"),
        ((9, 9, 9, 9), "none"),
        ((5, 6, 7, math.nan), "bias"),
        ((math.nan, math.nan, 5, 5), "bias"),
        ((math.nan, math.nan, math.nan, math.nan), "none"),
    ],
)
def test_a_method_is_taken_for_what_it_gains_and_never_without_a_number(
    decibels: tuple[float, ...], taken: str
) -> None:
    assert chosen(dict(zip(METHODS, decibels, strict=True))) == taken


def test_recalibration_changes_statistics_only(residual: Residual) -> None:
    pruned, plain = (prune(residual, IMAGES, {"inner.0": 0.5}, method) for method in ("recalibrate", "none"))
    changed = {name for name, array in arrays(pruned).items() if not np.allclose(array, arrays(plain)[name], rtol=1e-3)}
    assert changed
    assert all("running" in name for name in changed)


@pytest.mark.parametrize(
    "ratio",
    [{"inner.0": 0.5}, *(pytest.param(other, marks=pytest.mark.slow) for other in ({"stem.0": 0.25}, {"*": 0.3}))],
    ids=str,
)
def test_each_method_comes_nearer_to_the_original(residual: Residual, ratio: dict[str, float]) -> None:
    fresh = draw(200, 3, 8, 8, seed=6) + 0.5
    errors = [
        error(residual, prune(residual, IMAGES, ratio, method), fresh) for method in ("none", "bias", "reconstruct")
    ]
    assert errors[1] < errors[0]
    assert errors[2] < 0.85 * errors[1]


class Branch(nn.Module):
    """A lossy start, then a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.inner, self.outer = (
            nn.Linear(*size) for size in ((6, 16), (16, 6), (6, 9), (9, 6))
        )

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(self.first(x).relu())
        return x + self.outer(self.inner(x).relu())


@pytest.mark.usefixtures("_whole")
def test_the_last_layer_of_a_branch_corrects_the_sum() -> None:
    net, rows = Branch(), draw(300, 6, seed=3)
    found, before = arrays(prune(net, rows, {"first": 0.5}, "reconstruct")), arrays(net)
    rows = seen(rows)
    x = np.maximum(rows.double().numpy() @ found["first.weight"].T + found["first.bias"], 0)
    x = x @ found["second.weight"].T + found["second.bias"]
    hidden = np.maximum(x @ found["inner.weight"].T + found["inner.bias"], 0)
    weight, bias = ridge(hidden, forward(net, rows) - x, before["outer.weight"])
    np.testing.assert_allclose(found["outer.weight"], weight, atol=1e-4)
    np.testing.assert_allclose(found["outer.bias"], bias, atol=1e-4)


def test_the_number_of_batches_does_not_matter(residual: Residual) -> None:
    one, many = (arrays(prune(residual, IMAGES, {"inner.0": 0.5}, "reconstruct", count)) for count in (1, 8))
    for name, array in one.items():
        np.testing.assert_allclose(array, many[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_fitting_draws_rows_evenly_when_there_are_many(monkeypatch: pytest.MonkeyPatch, residual: Residual) -> None:
    monkeypatch.setattr(linear_problem, "_ROWS", 1500)
    few = error(residual, prune(residual, IMAGES, {"inner.0": 0.5}, "reconstruct"), IMAGES)
    plain = error(residual, prune(residual, IMAGES, {"inner.0": 0.5}, "none"), IMAGES)
    assert few < 0.5 * plain


def test_the_original_is_not_touched(residual: Residual) -> None:
    before = arrays(copy.deepcopy(residual))
    pruning = passes.PruneChannels({"*": 0.3}, round_to=1, compensation="reconstruct")
    lobo_fx.compile(residual, [pruning], example_inputs=IMAGES[:2], calibration_data=[IMAGES], progress=False)
    for name, array in arrays(residual).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("set", 3), ("set", 24), ("fresh", 8), ("other data", 3)),
        *(
            pytest.param(kind, count, marks=pytest.mark.slow)
            for kind, count in (("set", 8), ("fresh", 3), ("fresh", 24), ("other data", 8), ("other data", 24))
        ),
    ],
)
def test_few_rows_do_no_harm(residual: Residual, untrained: Residual, kind: str, count: int) -> None:
    """On fresh rows: no worse than plain removal, whatever the norms' statistics are, by more than a decibel."""
    net = untrained if kind == "fresh" else residual
    shift = 3.0 if kind == "other data" else 0.5
    rows, fresh = draw(count, 3, 8, 8, seed=8) + shift, draw(300, 3, 8, 8, seed=6) + shift
    found = {
        method: signal_to_noise(net(fresh), prune(net, rows, {"*": 0.3}, method, 1)(fresh))
        for method in ("none", "reconstruct")
    }
    assert found["reconstruct"] > found["none"] - 1


def test_one_batch_of_fixed_size_fits_nothing() -> None:
    rows = draw(6, 6)
    pruning = passes.PruneChannels({"0": 0.5}, round_to=1, compensation="reconstruct")
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    settings: dict[str, Any] = {"example_inputs": rows, "dynamic_shapes": None, "progress": False}
    result = lobo_fx.compile(net, [pruning], calibration_data=[rows], **settings)
    assert any("nothing was fitted: no row of calibration data can be held out" in note for note in result.report.notes)
    plain = lobo_fx.compile(net, [passes.PruneChannels({"0": 0.5}, round_to=1)], **settings)
    for name, array in arrays(plain.module).items():
        np.testing.assert_array_equal(array, arrays(result.module)[name])


def test_the_report_says_what_was_fitted(residual: Residual) -> None:
    pruning = passes.PruneChannels({"inner.0": 0.5}, round_to=1)
    report = lobo_fx.compile(traced(residual, 3, 8, 8), [pruning], calibration_data=[IMAGES], progress=False).report
    (remark,) = (note for note in report.notes if "refitted by reconstruct: dB on 16 of 64 rows" in note)
    assert all(f"{method} " in remark for method in ("none", "recalibrate", "bias", "reconstruct"))
    (sheet,) = report.sheets
    assert sheet.title == "refitting"
    assert {"inner.0", "inner.1", "head"} <= {row[0] for row in sheet.rows}
    assert all(0 <= share <= 1 for row in sheet.rows for share in row[2:])


# --- attention -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One head of eight dimensions, of which queries (with their bias) and values fill four, none along a dimension."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        narrow = [3 * draw(8, rank, seed=7 + rank) @ draw(rank, 12, seed=9) / rank for rank in (3, 8, 4)]
        layers = [nn.Linear(12, 24)] if fused else [nn.Linear(12, 8) for _ in range(3)]
        for layer, weight in zip(layers, [torch.cat(narrow)] if fused else narrow, strict=True):
            layer.weight.data = weight
        self.inputs = nn.ModuleList(layers)
        self.out = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> Any:
        parts = [layer(x) for layer in self.inputs]
        if len(parts) == 1:
            parts = list(parts[0].unflatten(-1, (3, 8)).unbind(-2))
        q, k, v = (part.unflatten(-1, (1, 8)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_need_half_of_their_dimensions_lose_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fitting, "RIDGES", (1e-9,))
    torch.manual_seed(0)
    net, tokens = Attention(fused), draw(40, 10, 12, seed=3)
    ratio = {"inputs.0": 0.5} if fused else {"inputs.0": 0.5, "inputs.2": 0.5}
    assert error(net, prune(net, tokens, ratio, "reconstruct"), tokens) < 1e-5
    monkeypatch.setattr(Bases, "of", lambda *given: [])
    assert error(net, prune(net, tokens, ratio, "reconstruct"), tokens) > 1e-2


def test_heads_that_need_all_of_their_dimensions_do(monkeypatch: pytest.MonkeyPatch) -> None:
    net, tokens = Attention(fused=False), draw(40, 10, 12, seed=3)
    net.inputs[0].weight.data = draw(8, 12, seed=4)
    found = [error(net, prune(net, tokens, {"inputs.0": 0.5}, "reconstruct"), tokens)]
    monkeypatch.setattr(Bases, "of", lambda *given: [])
    found.append(error(net, prune(net, tokens, {"inputs.0": 0.5}, "reconstruct"), tokens))
    assert 1e-5 < found[0] < found[1]


def test_coordinates_without_variance_blow_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fitting, "RIDGES", (1e-9,))
    net, tokens = Attention(fused=False), draw(40, 10, 12, seed=3)
    for layer in net.inputs:  # two directions that vary, four dimensions that stay, and means far from zero
        layer.weight.data, layer.bias.data = draw(8, 2, seed=5) @ draw(2, 12, seed=6), 5 + draw(8, seed=8)
    largest = max(float(layer(tokens).detach().abs().max()) for layer in net.inputs)
    pruned = prune(net, tokens, {"inputs.0": 0.5, "inputs.2": 0.5}, "reconstruct")
    state = pruned.state_dict()
    within = [F.linear(tokens, state[f"inputs.{n}.weight"], state[f"inputs.{n}.bias"]) for n in range(3)]
    assert max(float(value.abs().max()) for value in within) < 2 * largest
    assert error(net, pruned, tokens) < 1e-5


# --- weights that several layers share -------------------------------------------------------------------


class Recurring(nn.Module):
    """One residual block that runs several times (ALBERT's twelve layers)."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.rounds, self.up, self.down = rounds, nn.Linear(24, 96), nn.Linear(96, 24)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.rounds):
            x = self.norm(x + self.down(F.gelu(self.up(x))))
        return torch.as_tensor(self.head(x))


@pytest.mark.parametrize("rounds", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_shared_weights_are_refitted_to_all_their_readers(rounds: int) -> None:
    model, data, fresh = Recurring(rounds).eval(), [draw(400, 24, seed=1)], draw(200, 24, seed=2)
    found = {}
    for method in ("none", "bias", "reconstruct"):
        pruning = passes.PruneChannels({"up": 0.4}, round_to=1, compensation=method)
        result = lobo_fx.compile(traced(model, 24), [pruning], calibration_data=data, progress=False)
        assert not any("not refitted" in note for note in result.report.notes)
        found[method] = signal_to_noise(model(fresh), result.module(fresh))
    assert found["reconstruct"] > max(found["none"], found["bias"]) + 2


# --- memory ------------------------------------------------------------------------------------------------


class Counting:
    """A loader of single rows that counts how many of its batches are alive at once."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.alive = self.most = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for row in self.rows:
            batch = row[None].clone()
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(batch, self._gone)
            yield batch

    def _gone(self) -> None:
        self.alive -= 1


def test_one_batch_is_in_memory_at_a_time(residual: Residual, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations of all would take too much; what is fitted is the same. Twin: with room, all are kept."""
    original = traced(residual, 3, 8, 8)
    silent = Context(original.signature, show_progress=False)
    pruning = passes.PruneChannels({"inner.0": 0.5}, round_to=1, compensation="none")
    pruned = pruning.run(original.clone(), silent)
    found, most = [], []
    for room in (1 << 30, 0):
        monkeypatch.setattr(side_by_side, "_BYTES", room)
        data = Counting(IMAGES[:8])
        context = dataclasses.replace(silent, calibration_data=data)
        fitted = compensate(pruned.clone(), original, context, "reconstruct")
        assert fitted.remark.startswith("refitted by reconstruct")
        found.append(arrays(fitted.program.module))
        most.append(data.most)
    assert most[0] >= 8
    assert most[1] <= 3, "one, and those that the frames of the loader still name"
    assert all(np.array_equal(found[0][name], array) for name, array in found[1].items())
