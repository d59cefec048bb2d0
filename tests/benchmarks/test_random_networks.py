"""Random networks: a share of them each time it is run, and that the harness sees what is wrong."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import random_networks as harness
import torch
from network_generator import RandomNet, WideNet

from lobo_fx import Pass, Program, Promise, passes
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.registry import snake_case

SHARE = int(os.environ.get("LOBO_FX_RANDOM_NETWORKS", "40"))


@pytest.mark.slow
def test_a_share_of_the_random_networks(tmp_path: Path) -> None:
    """`LOBO_FX_RANDOM_STATE=FILE` goes on where the run before ended; `LOBO_FX_RANDOM_NETWORKS` says how many more."""
    state = Path(os.environ.get("LOBO_FX_RANDOM_STATE", tmp_path / "state.jsonl"))
    ran = harness.go_on(state, until=10_000, seconds=float("inf"), limit=SHARE)
    failed = [f"{outcome.number}: {outcome.reason}" for outcome in ran if outcome.outcome == harness.FAILED]
    assert not failed, "\n".join(failed)


def test_every_pass_that_needs_no_training_is_drawn() -> None:
    kinds = [kind for name in passes.__all__ if isinstance(kind := getattr(passes, name), type)]
    kinds = [kind for kind in kinds if issubclass(kind, Pass) and ".training." not in kind.__module__]
    assert harness.DRAWS.keys() == {snake_case(kind.__name__) for kind in kinds}


def test_a_number_is_always_the_same_network_and_another_is_another() -> None:
    first, again, other = (harness.make_case(number) for number in (7, 7, 8))
    assert first.network.kinds == again.network.kinds
    assert first.passes == again.passes
    torch.testing.assert_close(first.inputs, again.inputs, rtol=0, atol=0)
    state = again.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.network.state_dict().items())
    assert (first.network.kinds, first.passes) != (other.network.kinds, other.passes)


def test_networks_take_every_step() -> None:
    named = {name for kind in (RandomNet, WideNet) for name in vars(kind) if not name.startswith("_")}
    helpers = {"forward", "take", "own", "some_width", "conv", "activation", "features", "stored", "inputs", "flip"}
    assert helpers < named
    missing = named - helpers
    for seed in range(60):
        if missing:
            taken = set(WideNet(seed).kinds)
            assert not taken & helpers
            missing -= taken
    assert not missing


@dataclasses.dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing, as it promises."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        return program


@dataclasses.dataclass(frozen=True)
class Raises(Pass):
    """Raises what it is given."""

    error: Exception

    def run(self, program: Program, context: Context) -> Program:
        raise self.error


def case_of(number: int, *chosen: Pass) -> harness.Case:
    return dataclasses.replace(harness.make_case(number), passes=chosen, saved=False)


SMALL = next(number for number in range(100) if len(harness.make_case(number).network.kinds) <= 3)


@pytest.mark.parametrize(
    ("error", "outcome"), [(InvalidInput("not for me"), harness.REFUSED), (KeyError("gone"), harness.FAILED)]
)
def test_our_own_refusal_is_none_of_the_failures(
    error: Exception, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(SMALL, Raises(error))
    monkeypatch.setattr(harness, "make_case", lambda number: case)
    found = harness.run_one(SMALL)
    assert found.outcome == outcome
    assert str(error) in found.reason
    assert found.number == SMALL
    assert found.kinds == case.network.kinds


def test_a_wrong_number_on_rows_that_the_compiler_did_not_see_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(SMALL, Nothing())
    good = harness.check(case, SMALL)
    harness.compare_with_eager(case, good, case.inputs)
    with torch.no_grad():
        for parameter in good.module.parameters():
            parameter.add_(0.01)
    with pytest.raises(harness.WrongNumber, match="eager PyTorch differs by"):
        harness.compare_with_eager(case, good, case.inputs)


@pytest.mark.parametrize(
    ("expected", "found", "words"),
    [
        ({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)}, r"in shape: \[\(2, 3\)\], \[\(2, 4\)\]"),
        ({"a": torch.ones(2)}, (torch.ones(2),), "in shape"),
        (torch.ones(2), torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.ones(2), torch.ones(2) + 1e-3, "by 1.0e-03 of the range on 2 rows"),
    ],
)
def test_what_is_held_against_what(expected: Any, found: Any, words: str) -> None:
    with pytest.raises(harness.WrongNumber, match=words):
        harness.hold(expected, found, 1e-4, "they differ")
    harness.hold(expected, expected, 1e-4, "they differ")


def test_only_the_outputs_that_are_named() -> None:
    outputs = {"logits": 1, "states": (2, 3)}
    assert harness.only(outputs, None) is outputs
    assert harness.only(outputs, ["logits"]) == {"logits": 1}
    assert harness.only(outputs, ["states.1"]) == {"states": (None, 3)}
    assert harness.only(outputs, ["states", "logits"]) == outputs
    assert harness.only(outputs, ["stat"]) is None


def test_a_run_goes_on_where_it_was_and_runs_failures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def run_all(numbers: list[int], seconds: float) -> list[harness.Outcome]:
        asked.append(numbers)
        broken = harness.FAILED if len(asked) == 1 else harness.OK
        return [harness.Outcome(n, broken if n == 2 else harness.OK, 0.5, ["linear"], []) for n in numbers]

    monkeypatch.setattr(harness, "run_all", run_all)
    state = tmp_path / "made" / "state.jsonl"
    assert len(harness.go_on(state, until=6, seconds=9, limit=4)) == 4
    with state.open("a") as file:
        file.write('{"number": 4, "outc')  # cut off
    harness.go_on(state, until=6, seconds=9)
    assert harness.read_state(state)[2].outcome == harness.FAILED
    harness.go_on(state, until=6, seconds=9, again=True)
    assert asked == [[0, 1, 2, 3], [4, 5], [2]]
    outcomes = harness.read_state(state)
    assert sorted(outcomes) == [0, 1, 2, 3, 4, 5]
    assert harness.summary(list(outcomes.values())).startswith("6 networks in 3 s of CPU time: 6 ok, 0 refused")


def test_a_network_that_kills_its_process_is_a_failure_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "work", os._exit)  # which is called with no number, and dies of it
    outcomes = list(harness.run_all([3, 4], seconds=60))
    assert [(outcome.number, outcome.outcome) for outcome in outcomes] == [(3, harness.FAILED), (4, harness.FAILED)]
    assert outcomes[0].reason.startswith("the process died with 1 ")
    assert list(harness.run_all([5], seconds=-1)) == []
