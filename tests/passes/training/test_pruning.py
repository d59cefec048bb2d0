"""Passes that make a network narrower around training: students, cuts in steps, penalties on what will go."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

import lobo_fx
from lobo_fx.axes import Inference
from lobo_fx.axes.kept import kept_indices
from lobo_fx.axes.members import members, parameters
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import as_inputs
from lobo_fx.graph.masks import masks
from lobo_fx.graph.program import Program
from lobo_fx.passes import (
    EqualizeLayers,
    FineTune,
    FitGoal,
    IterativePrune,
    PruneChannels,
    PruneWeights,
    QuantizationAwareTraining,
    SmoothActivations,
    SparseTraining,
    Student,
)
from lobo_fx.passes.goal import fit_goal
from lobo_fx.passes.training import iterative_prune
from lobo_fx.passes.training.iterative_prune import cut_state
from lobo_fx.passes.training.loop import train
from lobo_fx.passes.training.sparse_training import _Sparse
from lobo_fx.result import Result

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
DATA = [(part, (part.mean((1, 2, 3)) > 0).long()) for part in IMAGES.split(4)]  # type: ignore[no-untyped-call]
RATE: dict[str, Any] = {"learning_rate": 1e-2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ).eval()


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(network(), IMAGES[:2])


def compiled(program: Program, *passes: Any, **settings: Any) -> Result:
    given: dict[str, Any] = {"train_data": DATA, "loss_fn": cross_entropy} | settings
    return lobo_fx.compile(program, list(passes), progress=False, **given)


def shapes(result: Result) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in result.module.state_dict().items()}


# --- students ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0.5, 0.25, 0.1, 1.0])
def test_a_student_is_narrower_on_every_free_axis(program: Program, width: float) -> None:
    found = shapes(compiled(program, Student(width=width)))
    first, second, third = (max(1, round(size * width)) for size in (12, 16, 8))
    assert found["0.weight"] == [first, 3, 3, 3]
    assert found["1.running_mean"] == [first]
    assert found["3.weight"] == [second, first, 3, 3]
    assert found["7.weight"] == [third, second]
    assert found["9.weight"] == [4, third]  # inputs and outputs stay


def test_a_student_has_the_share_of_parameters_that_was_asked_for() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 5)).eval()
    before = sum(p.numel() for p in wide.parameters())
    for share in (0.5, 0.1):
        result = lobo_fx.compile(wide, [Student(parameters=share)], example_inputs=torch.randn(2, 20), progress=False)
        assert abs(sum(p.numel() for p in result.module.parameters()) / before - share) < 0.02


def test_a_student_starts_with_the_channels_that_matter_most(program: Program) -> None:
    kept = compiled(program, Student(width=0.5)).module.state_dict()
    weight = program.module.state_dict()["0.weight"]
    rows = [[torch.equal(mine, theirs) for theirs in weight].index(True) for mine in kept["0.weight"]]
    assert rows == sorted(set(rows))
    assert len(rows) == 6


class Many(nn.Module):
    """Every kind of layer and norm that has a start of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.group = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 6)
        self.layer = nn.LayerNorm(6)
        self.token = nn.Parameter(torch.randn(500, 6) * 3 + 7)
        self.tied = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.tied.weight
        with torch.no_grad():
            for parameter in (self.norm.weight, self.norm.bias, self.layer.weight, self.group.bias):
                parameter.fill_(5.0)
            self.norm.running_mean.fill_(3.0)  # type: ignore[union-attr]
            self.norm.running_var.fill_(9.0)  # type: ignore[union-attr]
            self.linear.weight.mul_(100)
            self.conv.bias.fill_(50)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.group(self.norm(self.conv(x))).mean((2, 3))
        return self.again(self.tied(self.layer(self.linear(hidden)))) + self.token.mean(0)  # type: ignore[no-any-return]


def test_fresh_weights_are_drawn_as_their_layers_would() -> None:
    def fresh(seed: int) -> nn.Module:
        return lobo_fx.compile(
            Many().eval(),
            [Student(width=1.0, start="fresh")],
            example_inputs=torch.randn(2, 4, 6, 6),
            seed=seed,
            progress=False,
        ).module

    made = fresh(0)
    values = made.state_dict()
    bounds = {"conv": 1 / math.sqrt(2 * 9), "linear": 1 / math.sqrt(8), "tied": 1 / math.sqrt(6)}
    for name, bound in bounds.items():
        weight = values[f"{name}.weight"]
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.8 * bound  # of 36 values or more
        assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)
    for name in ("conv", "linear"):
        assert values[f"{name}.bias"].abs().max() <= bounds[name]
    for name in ("norm", "group", "layer"):
        assert torch.equal(values[f"{name}.weight"], torch.ones_like(values[f"{name}.weight"]))
        assert torch.equal(values[f"{name}.bias"], torch.zeros_like(values[f"{name}.bias"]))
    assert torch.equal(values["norm.running_mean"], torch.zeros(8))
    assert torch.equal(values["norm.running_var"], torch.ones(8))
    assert float(values["token"].mean()) == pytest.approx(7, abs=0.4)
    assert float(values["token"].std()) == pytest.approx(3, abs=0.3)
    assert values["tied.weight"].data_ptr() == values["again.weight"].data_ptr()
    assert all(torch.equal(values[name], value) for name, value in fresh(0).state_dict().items())
    assert not torch.equal(values["linear.weight"], fresh(1).state_dict()["linear.weight"])


class Fixed(nn.Module):
    """What training does not change: a kernel, positions, a norm's scale; beside layers with starts of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur", torch.ones(3, 1, 3, 3) / 9)
        self.positions = nn.Parameter(torch.ones(3, 6, 6), requires_grad=False)
        self.norm = nn.BatchNorm2d(3)
        self.norm.weight.requires_grad_(False).fill_(5.0)
        self.up = nn.ConvTranspose2d(3, 64, 3)
        self.lstm, self.gru = nn.LSTM(64, 4), nn.GRU(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(functional.conv2d(x, self.blur, groups=3) + self.positions)  # type: ignore[arg-type]
        return self.gru(self.lstm(self.up(hidden).mean(-1).permute(2, 0, 1))[0])[0]  # type: ignore[no-any-return]


def test_what_is_not_trained_is_not_drawn_anew() -> None:
    model = Fixed().eval()
    for parameter in model.parameters():
        parameter.detach().mul_(3)
    start = model.state_dict()
    values = lobo_fx.compile(
        model, [Student(width=1.0, start="fresh")], example_inputs=torch.randn(2, 3, 8, 8), progress=False
    ).module.state_dict()
    for name in ("blur", "positions", "norm.weight"):
        assert torch.equal(values[name], start[name])
    for name, value in values.items():  # PyTorch's own bounds
        if name.startswith(("up", "lstm", "gru")):
            bound = 1 / math.sqrt(64 * 9) if name.startswith("up") else 0.5
            assert 0.7 * bound < value.abs().max() <= bound


# --- in steps ---------------------------------------------------------------------------------------------


CUTS = {
    "ratio": PruneChannels(0.5, round_to=4, compensation="none"),
    "by name": PruneChannels({"0": 0.75, "7": 0.5}, round_to=1, compensation="none"),
}


@pytest.mark.parametrize(
    ("cut", "path"),
    [
        pytest.param(CUTS[cut], path, id=f"{cut}-{path}", marks=pytest.mark.slow if is_slow else ())
        for is_slow, cuts in (
            (False, {"ratio": "linear", "by name": "cubic"}),
            (True, {"ratio": "cubic", "by name": "linear"}),
        )
        for cut, path in cuts.items()
    ],
)
def test_steps_end_with_the_widths_of_one_cut(program: Program, cut: PruneChannels, path: Any) -> None:
    result = compiled(program, IterativePrune(cut, cuts=3, path=path, **RATE))
    assert shapes(result) == shapes(compiled(program, cut))
    assert [sheet.title for sheet in result.report.sheets] == [f"iterative_prune cut {n} of 3" for n in (1, 2, 3)]


def test_steps_reach_a_target(program: Program) -> None:
    cut = PruneChannels(target="parameters", keep=0.5, round_to=1, compensation="none")
    once, more = (compiled(program, way) for way in (cut, IterativePrune(cut, cuts=3, **RATE)))
    sizes = [sum(p.numel() for p in found.module.parameters()) for found in (once, more)]
    assert abs(sizes[0] - sizes[1]) <= 0.05 * sizes[0]


def test_the_cubic_path_removes_much_at_first(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    trained = train

    def noted(objective: Any, *arguments: Any, **settings: Any) -> Any:
        widths.append(objective.module.get_parameter("3.weight").shape[0])
        return trained(objective, *arguments, **settings)

    monkeypatch.setattr(iterative_prune, "train", noted)
    cut = PruneChannels(0.5, round_to=1, compensation="none")
    for path, expected in {"linear": [14, 12, 10, 8], "cubic": [11, 9, 8, 8]}.items():
        widths.clear()
        compiled(program, IterativePrune(cut, cuts=4, path=path, **RATE))  # type: ignore[arg-type]
        shares = [n / 4 if path == "linear" else 1 - (1 - n / 4) ** 3 for n in (1, 2, 3, 4)]
        assert all(abs(width - 16 * (1 - share / 2)) <= 1 for width, share in zip(widths, shares, strict=True))
        assert widths == expected


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_moments_are_cut_as_their_parameters_are(
    program: Program, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    kept: list[Any] = []
    loops: list[Any] = []
    trained = train

    def noted(objective: Any, settings: Any, context: Any, candidate: Any, state: Any, *rest: Any) -> Any:
        given.append(copy.deepcopy(dict(state)))
        kept.append(kept_indices(objective.module))
        loops.append(trained(objective, settings, context, candidate, state, *rest))
        loops[-1].left = copy.deepcopy(loops[-1].optimizer_moments())
        return loops[-1]

    monkeypatch.setattr(iterative_prune, "train", noted)
    cut = PruneChannels(0.5, round_to=1, compensation="none")
    compiled(program, IterativePrune(cut, cuts=2, optimizer=optimizer, **RATE))
    assert given[0] == {}
    original = program.module.state_dict()
    checked = 0
    for name, entries in loops[0].left.items():
        plain = name.removeprefix("module.")
        for key, value in entries.items():
            found = given[1][name][key]
            if not isinstance(value, torch.Tensor) or not value.dim():
                assert found == value
                continue
            expected = value
            for dim, size in enumerate(original[plain].shape):
                if dim >= value.dim() or value.shape[dim] == 1:
                    continue
                before = kept[0].get(plain, {}).get(dim, list(range(size)))
                after = kept[1].get(plain, {}).get(dim, list(range(size)))
                expected = expected.index_select(dim, torch.tensor([before.index(index) for index in after]))
            assert torch.equal(found, expected), (name, key)
            checked += found.shape != value.shape
    assert checked >= 6


def test_cutting_a_state_leaves_numbers_and_whole_parameters_alone() -> None:
    value = torch.arange(24.0).view(4, 6)
    state: dict[str, dict[str, Any]] = {
        "a": {"step": torch.tensor(3.0), "moment": value, "times": 2},
        "b": {"moment": torch.ones(3)},
    }
    found = cut_state(state, {"a": {0: [0, 2, 5, 7]}}, {"a": {0: [2, 7], 1: [1, 3]}})
    assert torch.equal(found["a"]["moment"], value[[1, 3]][:, [1, 3]])
    assert found["a"]["step"] is state["a"]["step"]
    assert found["a"]["times"] == 2
    assert found["b"]["moment"] is state["b"]["moment"]


def test_one_learning_rate_is_found_for_all_cuts(program: Program) -> None:
    result = compiled(program, IterativePrune(PruneWeights(0.5), cuts=3))
    said = [note.reason for note in result.report.notes if "batches in" in note.reason]
    rates, reasons = zip(*(re.findall(r"learning rate (\S+), ([a-z ]+)", line)[0] for line in said), strict=True)
    assert [reason.startswith("best of") for reason in reasons] == [True, False, False]
    assert reasons[1:] == ("as found at first",) * 2
    assert len(set(rates)) == 1


def test_single_weights_go_in_steps_and_stay_zero(program: Program) -> None:
    result = compiled(program, IterativePrune(PruneWeights(0.6), cuts=3, weight_decay=0.1, **RATE))
    once = compiled(program, PruneWeights(0.6))
    for name in masks(once.program):
        value = result.module.state_dict()[name]
        zeros = [int((found == 0).sum()) for found in (value, once.module.state_dict()[name])]
        assert zeros[0] == zeros[1]
    assert masks(result.program).keys() == masks(once.program).keys()
    pattern = compiled(program, IterativePrune(PruneWeights(pattern="2:4"), cuts=2, **RATE))
    groups = pattern.module.state_dict()["7.weight"].view(-1, 4)
    assert ((groups == 0).sum(1) == 2).all()


def test_every_cut_towards_a_pattern_removes_some(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[set[int]] = []
    trained = train

    def noted(objective: Any, *arguments: Any, **settings: Any) -> Any:
        kept.append(set((objective.module.get_parameter("7.weight").view(-1, 8) != 0).sum(1).tolist()))
        return trained(objective, *arguments, **settings)

    monkeypatch.setattr(iterative_prune, "train", noted)
    result = compiled(program, IterativePrune(PruneWeights(pattern="2:8"), cuts=4, path="linear", **RATE))
    assert kept == [{6}, {5}, {3}, {2}]
    assert set((result.module.get_parameter("7.weight").view(-1, 8) != 0).sum(1).tolist()) == {2}


@pytest.mark.parametrize(("keep", "round_to"), [(0.2, 1), (0.7, 8)])
def test_a_target_is_checked_as_a_whole_and_before_any_training(keep: float, round_to: int) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    cut = PruneChannels(target="parameters", keep=keep, round_to=round_to)
    inputs, calls = torch.randn(8, 20), []

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(outputs, labels)

    def found() -> float:
        result = lobo_fx.compile(
            wide,
            [IterativePrune(cut, cuts=6, **RATE)],
            example_inputs=inputs,
            train_data=[(inputs, torch.arange(8) % 5)],
            loss_fn=loss_fn,
            progress=False,
        )
        return sum(p.numel() for p in result.module.parameters()) / sum(p.numel() for p in wide.parameters())

    if round_to == 1:  # a part of the way that six cuts make can't be hit with 20 channels; the whole can
        assert found() == pytest.approx(keep, rel=0.02)
    else:
        with pytest.raises(InvalidInput, match=r"keep=0\.7 of the parameters can't be hit with round_to=8"):
            found()
        assert not calls


def test_a_killed_pruning_goes_on_in_its_step(program: Program, tmp_path: Path) -> None:
    pruning: dict[str, Any] = {"prune": PruneChannels(0.5, round_to=1, compensation="none"), "cuts": 3} | RATE
    whole = compiled(program, IterativePrune(**pruning)).module.state_dict()
    calls = itertools.count()

    def dying(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == 6:  # in the second of three times four steps
            raise KeyError
        return cross_entropy(outputs, labels)

    with pytest.raises(InvalidInput, match="loss_fn failed"):
        compiled(program, IterativePrune(checkpoint_dir=tmp_path, **pruning), loss_fn=dying)
    steps: list[int] = []

    def counted(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        return cross_entropy(outputs, labels)

    found = compiled(program, IterativePrune(checkpoint_dir=tmp_path, **pruning), loss_fn=counted).module.state_dict()
    assert all(torch.equal(whole[name], value) for name, value in found.items())
    assert len(steps) == 8


def test_a_plan_has_no_way_to_go_in_steps(program: Program) -> None:
    plan = PruneChannels(0.5).plan_for(program, Context(program.signature))
    with pytest.raises(InvalidInput, match="plan"):
        compiled(program, IterativePrune(PruneChannels(plan=plan), cuts=2, epochs=10**9, **RATE))


# --- penalties --------------------------------------------------------------------------------------------


def norms(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """By axis of `network`, the squares that belong to each of its positions, written out."""
    square = {name: value.double().square() for name, value in weights.items()}
    yield (
        "0",
        square["0.weight"].sum((1, 2, 3))
        + square["0.bias"]
        + square["1.weight"]
        + square["1.bias"]
        + square["3.weight"].sum((0, 2, 3)),
    )
    yield "3", square["3.weight"].sum((1, 2, 3)) + square["3.bias"] + square["7.weight"].sum(0)
    yield "7", square["7.weight"].sum(1) + square["7.bias"] + square["9.weight"].sum(0)


def penalty(program: Program, kind: Any, cut: PruneChannels, share: float, strength: float) -> tuple[float, float]:
    """What the objective adds to the loss, at the start and once all weights are halved."""
    inference = Inference(program).run()
    context = Context(program.signature, loss_fn=cross_entropy, original=program)
    removal = cut.removal(inference, context)
    gone = {leaf: ~kept for leaf, kept in removal.items()} if kind == "growing" else None
    groups = {leaf: parameters(found) for leaf, found in members(inference).items()}
    settings = SparseTraining(cut, penalty=kind, strength=strength)
    objective = _Sparse(program.module, groups, gone, settings, context)
    objective.begin_step(share)
    found = []
    for _ in range(2):
        loss = cross_entropy(program.module(DATA[0][0]), DATA[0][1])
        found.append(float((objective(as_inputs(DATA[0][0]), DATA[0][1]) - loss).detach()))
        with torch.no_grad():
            for parameter in program.module.parameters():
                parameter.mul_(0.5)
    return found[0], found[1]


def test_the_penalty_is_a_sum_over_groups(program: Program) -> None:
    cut = PruneChannels(0.5, round_to=1, compensation="none")
    start, half = penalty(program.clone(), "group_lasso", cut, 0.3, 0.7)
    assert start == pytest.approx(0.7, rel=1e-4)
    assert half == pytest.approx(0.7 / 2, rel=1e-4)
    start, half = penalty(program.clone(), "growing", cut, 0.3, 0.7)
    assert start == pytest.approx(0.3 * 0.7, rel=1e-4)
    assert half == pytest.approx(0.3 * 0.7 / 4, rel=1e-4)


@pytest.mark.parametrize("kind", ["group_lasso", "growing"])
def test_the_penalty_against_sums_written_out(program: Program, kind: Any) -> None:
    cut = PruneChannels(0.5, round_to=1, compensation="none")
    inference = Inference(program).run()
    context = Context(program.signature, loss_fn=cross_entropy, original=program)
    gone = {leaf: ~kept for leaf, kept in cut.removal(inference, context).items()}
    groups = {leaf: parameters(found) for leaf, found in members(inference).items()}
    objective = _Sparse(
        program.module, groups, gone if kind == "growing" else None, SparseTraining(cut, penalty=kind), context
    )
    by_layer = {next(m.name for m in found if m.dim == 0).split(".")[0]: leaf for leaf, found in groups.items()}
    total = 0.0
    for layer, squares in norms(program.module.state_dict()):
        if kind == "growing":
            total += float(squares[gone[by_layer[layer]]].sum())
        else:
            total += float(squares.sqrt().sum())
    assert float(objective._size().detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", ["group_lasso", "growing"])
def test_what_will_go_shrinks_and_costs_little(program: Program, kind: Any) -> None:
    cut = PruneChannels(0.5, round_to=1, compensation="none")
    training = SparseTraining(cut, penalty=kind, epochs=12, strength=3.0, **RATE)
    result = compiled(program, training)
    context = Context(program.signature, original=program)
    removal = cut.removal(Inference(result.program).run(), context)
    found = dict(norms(result.module.state_dict()))
    begun = dict(norms(program.module.state_dict()))
    for kept in removal.values():  # the three axes have different sizes
        squares, start = next((found[name], begun[name]) for name in found if len(found[name]) == len(kept))
        shrunk = float(squares[~kept].sum() / start[~kept].sum())
        stayed = float(squares[kept].sum() / start[kept].sum())
        assert shrunk < (0.5 if kind == "growing" else 0.8)
        assert shrunk < stayed * (0.5 if kind == "growing" else 1.0)
    assert shapes(result) == {name: list(value.shape) for name, value in program.module.state_dict().items()}
    after = compiled(program, training, cut)
    assert after.report.rows[-1].parameters < result.report.rows[-1].parameters


def test_patience_counts_from_the_best_score_of_a_sparse_training(program: Program) -> None:
    scores = iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    training = SparseTraining(epochs=5, patience=2, learning_rate=1e-3)
    result = compiled(program, training, evaluate=lambda module: next(scores, 0.0))
    assert "Stopped early" not in "".join(note.reason for note in result.report.notes)


def test_an_interrupted_pruning_cuts_to_the_end_and_goes_on_later(program: Program, tmp_path: Path) -> None:
    pruning: dict[str, Any] = {"prune": PruneChannels(0.5), "cuts": 3, "epochs": 2, "learning_rate": 1e-2}
    whole = compiled(program, IterativePrune(**pruning))
    calls = itertools.count()

    def interrupted(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if next(calls) == len(DATA) + 1:  # in the second epoch behind the first cut
            raise KeyboardInterrupt
        return cross_entropy(outputs, labels)

    stopped = compiled(program, IterativePrune(checkpoint_dir=tmp_path, **pruning), loss_fn=interrupted)
    assert shapes(stopped) == shapes(whole)
    assert next(calls) == len(DATA) + 2  # nothing was trained after it
    assert "cuts 2 to 3 were made without training" in "".join(note.reason for note in stopped.report.notes)
    again = compiled(program, IterativePrune(checkpoint_dir=tmp_path, **pruning)).module.state_dict()
    assert all(torch.equal(again[name], value) for name, value in whole.module.state_dict().items())


def test_weights_that_are_folded_are_cut_in_steps_to_the_same_widths() -> None:
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(6, 64, bias=False)), nn.ReLU(), nn.Linear(64, 5))
    data = [(torch.randn(32, 6, generator=torch.Generator().manual_seed(at)), torch.zeros(32).long()) for at in (0, 1)]
    result = lobo_fx.compile(
        nn.Sequential(*layers).eval(),
        [IterativePrune(PruneChannels(0.5), cuts=4, epochs=1, learning_rate=1e-4)],
        example_inputs=data[0][0][:2],
        calibration_data=[rows for rows, _ in data],
        train_data=data,
        loss_fn=cross_entropy,
        progress=False,
    )
    assert result.module.get_parameter("2.weight").shape == (5, 32)


class FrontEnd(nn.Module):
    """A spectrum by stored matrices, whose axis between them has no parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("basis", torch.rand(16, 8))
        self.register_buffer("bands", torch.rand(6, 16))
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = functional.linear(x, self.basis).square()  # type: ignore[arg-type]
        return self.second(self.first(functional.linear(spectrum, self.bands)).relu())  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize("kind", ["group_lasso", "growing"])
def test_axes_of_buffers_alone_have_no_penalty(kind: Any) -> None:
    program = trace(FrontEnd().eval(), torch.randn(2, 8))
    sparse = SparseTraining(PruneChannels(0.5), kind, epochs=1, **RATE)
    after = compiled(program, sparse, train_data=[(torch.randn(4, 8), torch.arange(4) % 2)]).module.state_dict()
    for name, value in program.module.state_dict().items():
        assert torch.equal(after[name], value) == (name in ("basis", "bands"))


# --- weights that were pruned before ----------------------------------------------------------------------


class Normed(nn.Module):
    """A norm before a linear layer, for factors to move between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.up(self.norm(x)).relu()
        return functional.linear(hidden, self.down.weight, self.down.bias)


TUNE = FineTune(epochs=2, learning_rate=1e-2)
AWARE: dict[str, Any] = {"quantize": {"kernels": "all"}, **RATE}


@pytest.mark.parametrize(
    "after",
    [
        [EqualizeLayers(), TUNE],
        [SmoothActivations(), TUNE],
        [SparseTraining(epochs=2, **RATE), TUNE],
        [SparseTraining(penalty="group_lasso", epochs=2, strength=5.0, **RATE)],
        [QuantizationAwareTraining(epochs=2, **AWARE)],
        [QuantizationAwareTraining(epochs=2, ranges="learned", accumulate=3, optimizer="sgd", **AWARE)],
    ],
    ids=["equalized", "smoothed", "growing", "lasso", "quantized", "learned"],
)
def test_weights_that_were_pruned_stay_zero_in_later_training(after: list[Any]) -> None:
    inputs = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
    data = [(rows, (rows[:, 0] > 0).long()) for rows in inputs.split(8)]  # type: ignore[no-untyped-call]
    model = trace(Normed().eval(), inputs[:2])
    result = compiled(model, PruneWeights(0.5), *after, train_data=data, calibration_data=data)
    pruned = compiled(model, PruneWeights(0.5), train_data=None, loss_fn=None).module.state_dict()
    found = result.module.state_dict()
    for name in ("up.weight", "down.weight"):
        assert (found[name][pruned[name] == 0] == 0).all()
        assert not torch.equal(found[name].float(), pruned[name])


def test_a_goal_says_that_zeros_are_not_kept(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_goal, "GoalSearch", lambda start, *_: SimpleNamespace(run=lambda: start))
    chosen = PruneWeights(0.5), FitGoal(decibels=10, moves=0, seconds=0, precision="float")
    notes = compiled(program, *chosen, calibration_data=DATA).report.notes
    assert any("no longer kept at zero: prune weights after the goal" in str(note) for note in notes)
