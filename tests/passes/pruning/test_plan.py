"""Plans of a removal: printed, compared, saved, applied to another checkpoint, refused for another model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.layers import Layer
from torch import nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.passes import PruneChannels, PruningPlan

IMAGES = torch.randn(2, 3, 8, 8)


def network(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 5)
    ).eval()


def plan_of(model: nn.Module, **settings: Any) -> PruningPlan:
    program = lobo_fx.trace(model, IMAGES)
    return PruneChannels(**settings).plan_for(program, Context(program.signature))


def shapes(model: nn.Module, pruning: PruneChannels) -> dict[str, list[int]]:
    result = lobo_fx.compile(model, [pruning], example_inputs=IMAGES, progress=False)
    return {name: list(tensor.shape) for name, tensor in result.module.state_dict().items()}


def test_a_plan_says_what_stays_and_why_and_touches_nothing() -> None:
    model = network()
    plan = plan_of(model, ratio=0.5)
    first, second = plan.cuts
    assert (first.name, first.before, first.after, first.kind) == ("0.weight[0]", 16, 8, "channels")
    assert first.members == ("0.weight[0]", "0.bias[0]", "2.weight[1]")
    squares = {name: parameter.detach().square() for name, parameter in model.named_parameters()}
    energy = squares["0.weight"].sum((1, 2, 3)) + squares["0.bias"] + squares["2.weight"].sum((0, 2, 3))
    assert set(first.kept) == set(energy.topk(8).indices.tolist())
    assert (second.name, second.before, second.after) == ("2.weight[0]", 24, 16)  # 12, up to a multiple of 8
    read = squares["5.weight"].view(5, 24, 16).sum((0, 2))
    energy = squares["2.weight"].sum((1, 2, 3)) + squares["2.bias"] + read
    assert set(second.kept) == set(energy.topk(16).indices.tolist())
    assert "0.weight[0]" in str(plan)
    assert "l2" in str(plan)
    assert plan == plan_of(network(), ratio=0.5) != plan_of(network(), ratio=0.25)


def test_a_saved_plan_gives_another_checkpoint_the_same_structure(tmp_path: Path) -> None:
    plan = plan_of(network(), ratio=0.5)
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    other = network(seed=1)
    found = shapes(other, PruneChannels(plan=tmp_path / "plan.json"))
    assert found == shapes(network(), PruneChannels(0.5))
    result = lobo_fx.compile(other, [PruneChannels(plan=plan)], example_inputs=IMAGES, progress=False)
    kept = list(plan.cuts[0].kept)
    assert torch.equal(result.module.get_parameter("0.bias"), other.get_parameter("0.bias")[kept])


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: network(width=32), r"0\.weight\[0\] is 32 wide, not 16"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 5)),
            r"axis of 0\.weight\[0\] does not run through 2\.weight\[1\]",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3)), r"no free axis that starts at 0\.weight\[0\]"),
    ],
)
def test_another_model_is_refused_with_the_first_difference(model: Any, complaint: str) -> None:
    plan = plan_of(network(), ratio=0.5)
    with pytest.raises(lobo_fx.InvalidInput, match=complaint):
        shapes(model().eval(), PruneChannels(plan=plan))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"format": 2}', '{"format": 1, "cuts": 3}', '{"format": 1, "cuts": [{"name": "x"}]}']
)
def test_a_file_that_is_no_plan_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(lobo_fx.InvalidInput, match=r"plan\.json"):
        PruneChannels(plan=tmp_path / "plan.json")


@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"target": "macs"}, {"exclude": ["0"]}, {"steps": 2}])
def test_a_plan_goes_with_nothing_that_says_how_much(settings: dict[str, Any]) -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=f"leave out {next(iter(settings))}"):
        PruneChannels(plan=plan_of(network()), **settings)


@pytest.mark.parametrize("patterns", [("*", "0"), ("0", "*"), ("*", "[0]", "0"), ("?", "*")])
def test_the_most_specific_pattern_wins_whatever_the_order(patterns: tuple[str, ...]) -> None:
    ranked = ["0", "[0]", "?", "*"]
    shares = {"0": 0.25, "[0]": 0.5, "?": 0.75, "*": 0.875}
    winner = min(patterns, key=ranked.index)
    pruning = PruneChannels({pattern: shares[pattern] for pattern in patterns}, round_to=1)
    if {"?", "*"} == set(patterns):
        return  # neither has a letter: the one named first counts
    result = lobo_fx.compile(network(), [pruning], example_inputs=IMAGES, progress=False)
    assert len(result.module.get_parameter("0.bias")) == 16 * (1 - shares[winner])
    assert any("is overridden by" in note for note in result.report.notes)


def test_what_is_excluded_stays_whole() -> None:
    assert shapes(network(), PruneChannels(0.5, exclude=["0"]))["0.weight"] == [16, 3, 3, 3]
    assert shapes(network(), PruneChannels(0.5, exclude=["2.weight"]))["5.weight"] == [5, 384]
    with pytest.raises(lobo_fx.InvalidInput, match="exclude: 'convolution' matches no module or parameter"):
        shapes(network(), PruneChannels(0.5, exclude=["convolution"]))


def test_a_missed_target_says_what_would_hit_it() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=r"can't be hit .*; round_to=1 would hit it"):
        shapes(network(), PruneChannels(target="parameters", keep=0.9, round_to=8))


def test_a_plan_is_made_in_one_step() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match="a plan is made in one step"):
        plan_of(network(), ratio=0.5, steps=2)


def test_an_axis_that_would_vanish_or_is_cut_twice_is_no_plan(tmp_path: Path) -> None:
    plan = plan_of(network(), ratio=0.5)
    for cuts in ([dataclasses.replace(plan.cuts[0], kept=())], [plan.cuts[0], plan.cuts[0]]):
        PruningPlan(tuple(cuts)).save(tmp_path / "plan.json")
        with pytest.raises(lobo_fx.InvalidInput, match="is no pruning plan"):
            PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("number", [1.5, True, "2", float("inf")])
def test_a_plan_holds_whole_numbers_in_a_list(number: Any, tmp_path: Path) -> None:
    first = dataclasses.asdict(plan_of(network(), ratio=0.5).cuts[0])
    wrong: list[Any] = [[first | {"kept": [0, number]}], [first | {"before": number}], {}, ""]
    for cuts in wrong:
        (tmp_path / "plan.json").write_text(json.dumps({"format": 1, "cuts": cuts}))
        with pytest.raises(lobo_fx.InvalidInput, match=r"is no pruning plan \(ValueError: .*(whole numbers|no list)"):
            PruningPlan.load(tmp_path / "plan.json")


def test_an_exclusion_without_effect_is_noted() -> None:
    result = lobo_fx.compile(network(), [PruneChannels(0.5, exclude=["1"])], example_inputs=IMAGES, progress=False)
    assert any("'1' excludes nothing" in note for note in result.report.notes)


def test_a_plan_of_weights_that_are_computed_fits_when_they_are_refitted() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 5)).eval()
    rows = torch.randn(64, 6)
    program = lobo_fx.trace(model, rows[:2])
    plan = PruneChannels(0.5).plan_for(program, Context(program.signature, calibration_data=[rows]))
    settings: dict[str, Any] = {"example_inputs": rows[:2], "calibration_data": [rows], "progress": False}
    result = lobo_fx.compile(model, [PruneChannels(plan=plan)], **settings)
    assert list(result.module.get_parameter("2.weight").shape) == [5, 8]


def test_heads_and_their_dimensions_are_two_axes_of_one_plan() -> None:
    torch.manual_seed(0)
    model = Layer(16, 4, 2).eval()
    rows = torch.randn(2, 3, 16)
    program = lobo_fx.trace(model, rows)
    plan = PruneChannels({"attention.*": 0.5}, kinds=["heads", "head_dim"], round_to=1).plan_for(
        program, Context(program.signature)
    )
    assert {(cut.kind, cut.before, cut.after) for cut in plan.cuts} == {("heads", 4, 2), ("head_dim", 4, 2)}
    assert len({cut.name for cut in plan.cuts}) == 2
    result = lobo_fx.compile(model, [PruneChannels(plan=plan)], example_inputs=rows, progress=False)
    assert result.module.get_parameter("attention.1.out.weight").shape == (16, 4)
