"""Plans of goals: saved, compared, printed, applied to another checkpoint, refused for another model."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.contracts.context import Context
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.passes import FitGoal, GoalPlan, PruneChannels, PruningPlan, QuantizeStatic
from lobo_fx.testing import check_pass

DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0, width: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 24, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 36, 5)).eval()


@functools.cache
def traced(seed: int = 0) -> Program:
    return lobo_fx.trace(network(seed), DATA[:2])


def pruning(model: nn.Module | None = None, **settings: Any) -> PruningPlan:
    program = traced().clone() if model is None else lobo_fx.trace(model, DATA[:2])
    program = QuantizeStatic().simplify(program, Context(program.signature))[0]  # batch norms are folded first
    return PruneChannels(**{"ratio": 0.5, "round_to": 1, **settings}).plan_for(program, Context(program.signature))


def plan(integers: tuple[str, ...] | None = ("conv2d", "conv2d_1"), **settings: Any) -> GoalPlan:
    return GoalPlan(
        pruning(**settings), integers, "onnxruntime 1", {"latency of the original's": 0.25, "decibels": 20.5}
    )


def applied(model: nn.Module | Program, given: GoalPlan | Path | str) -> Any:
    inputs = DATA[:2] if isinstance(model, nn.Module) else None
    passes = [FitGoal(plan=given)]
    return lobo_fx.compile(model, passes, example_inputs=inputs, calibration_data=[DATA], progress=False)


def operators(result: Any) -> list[str]:
    return [str(node.target) for node in result.program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("integers", [None, (), ("conv2d", "linear")])
def test_what_was_saved_is_read_as_it_was(integers: tuple[str, ...] | None, tmp_path: Path) -> None:
    made = plan(integers)
    made.save(tmp_path / "plan.json")
    found = GoalPlan.load(tmp_path / "plan.json")
    assert found == made
    assert found != dataclasses.replace(made, integers=("conv2d_1",))
    assert found != dataclasses.replace(made, pruning=PruningPlan(made.pruning.cuts[:1]))
    more = dataclasses.replace(made, ranks={"7.weight": 2}, weights="int4", quantizer=QuantizeStatic("mse"))
    more.save(tmp_path / "more.json")
    assert GoalPlan.load(tmp_path / "more.json") == more != made
    assert json.loads((tmp_path / "plan.json").read_text())["integers"] == (None if integers is None else [*integers])


def test_it_prints_what_is_expected_and_what_is_cut() -> None:
    text = str(plan())
    for part in ("latency of the original's", "0.25", "20.5", "operators as integers", "2", "0.weight[0]", "16", "8"):
        assert part in text
    assert "none" in str(plan(None))


def test_a_float_plan_prunes_and_refits_and_stays_float() -> None:
    result = check_pass(FitGoal(plan=plan(None)), network(), DATA[:2], calibration_data=[DATA], export=True)
    assert result.module.get_parameter("0.weight").shape == (8, 3, 3, 3)
    assert result.module.get_parameter("3.weight").shape == (12, 8, 3, 3)
    assert not any("quantize" in operator for operator in operators(result))
    passes: list[Any] = ["fold_batch_norm", PruneChannels(plan=pruning())]
    plain = lobo_fx.compile(traced(), passes, calibration_data=[DATA], progress=False)
    torch.testing.assert_close(result.module(DATA), plain.module(DATA), rtol=1e-5, atol=1e-5)


def test_the_operators_named_run_as_integers_and_no_others() -> None:
    result = check_pass(FitGoal(plan=plan(("conv2d_1",))), network(), DATA[:2], calibration_data=[DATA], export=True)
    graph = result.program.graph
    first, second = graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert "quantize" not in str(first.args[0].target)
    assert "dequantize" in str(second.args[0].target)


def test_another_checkpoint_gets_the_same_structure_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(*args: Any) -> Any:
        raise AssertionError("it searched")

    monkeypatch.setattr("lobo_fx.passes.goal.fit_goal.GoalSearch", searched)
    plan().save(tmp_path / "plan.json")
    results = [applied(traced(seed), tmp_path / "plan.json") for seed in (0, 1)]
    shapes = [{name: t.shape for name, t in result.module.state_dict().items()} for result in results]
    assert shapes[0] == shapes[1]
    assert operators(results[0]) == operators(results[1])
    assert not torch.equal(results[0].module(DATA), results[1].module(DATA))
    assert results[0].front == []


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (lambda: network(width=32), r"the plan does not fit this model: 0\.weight\[0\] is 32 wide, not 16"),
        (lambda: nn.Sequential(nn.Conv2d(3, 5, 3)), r"it has no free axis that starts at 0\.weight\[0\]"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 5)),
            r"the axis of 0\.weight\[0\] does not run through 3\.weight\[1\]",
        ),
    ],
)
def test_another_model_is_refused_with_the_first_difference(model: Any, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        applied(model().eval(), plan())


def test_an_operator_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="it has no operator 'conv2d_7' to run as integers"):
        applied(traced(), plan(("conv2d", "conv2d_7")))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "plan"),
        ("[]", "plan"),
        ("{}", "no plan of a goal of format 1"),
        ('{"format": 2, "integers": null}', "no plan of a goal of format 1; GoalPlan.save writes one"),
        ('{"format": 1, "cuts": []}', "no plan of a goal of format 1"),
        ('{"format": 1, "integers": null}', r"no plan of a goal \(KeyError"),
        ('{"format": 1, "integers": null, "cuts": {}}', r"no plan of a goal \(ValueError: cuts are no list"),
        (
            f'{{"format": 1, "integers": null, "cuts": [], "expected": {{"latency": 1{"0" * 400}}}, "runtime": "x"}}',
            r"no plan of a goal \(OverflowError",
        ),
        ('{"format": 1, "integers": 3, "cuts": [], "expected": {}, "runtime": "x"}', r"no plan of a goal \(TypeError"),
        (
            '{"format": 1, "integers": [], "cuts": [{}], "expected": {}, "runtime": "x"}',
            r"no plan of a goal \(KeyError",
        ),
        (
            '{"format": 1, "integers": [], "cuts": [], "expected": {"a": "b"}, "runtime": "x"}',
            r"no plan of a goal \(ValueError",
        ),
        ('{"format": 1, "integers": [], "cuts": [], "expected": [], "runtime": "x"}', r"goal \(AttributeError"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_before_any_work(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InvalidInput, match=complaint) as caught:
        FitGoal(plan=tmp_path / "plan.json")
    assert "plan.json" in str(caught.value)


def test_a_plan_of_a_pruning_is_no_plan_of_a_goal(tmp_path: Path) -> None:
    pruning().save(tmp_path / "plan.json")
    with pytest.raises(InvalidInput, match="is no plan of a goal of format 1"):
        GoalPlan.load(tmp_path / "plan.json")
    with pytest.raises(InvalidInput, match=r"other\.json"):
        GoalPlan.load(tmp_path / "other.json")


def test_a_plan_of_a_goal_is_no_plan_of_a_pruning(tmp_path: Path) -> None:
    saved = plan()
    saved.save(tmp_path / "plan.json")
    with pytest.raises(InvalidInput, match="is the plan of a goal, which is more than widths: FitGoal"):
        PruneChannels(plan=tmp_path / "plan.json")
    assert FitGoal(plan=tmp_path / "plan.json").given_plan == saved


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"latency": 0.5}, "plan= says what to do; leave out latency"),
        ({"moves": 3, "size": "1MB"}, "plan= says what to do; leave out size, moves"),
        ({"exclude": ["0"]}, "plan= says what to do; leave out exclude"),
    ],
)
def test_a_plan_goes_with_no_limits(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        FitGoal(plan=plan(), **settings)


def test_a_plan_is_a_plan_or_the_path_of_one() -> None:
    with pytest.raises(InvalidInput, match="plan is a int; expected a GoalPlan, or the path of one"):
        FitGoal(plan=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="plan is a PruningPlan; expected a GoalPlan"):
        FitGoal(plan=pruning())  # type: ignore[arg-type]
