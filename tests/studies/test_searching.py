"""`lobo_fx.search`: what it finds, what it refuses before any work, and how it ends and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneWeights
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import resolve
from lobo_fx.result import Result
from lobo_fx.studies.front import Front, FrontPoint, undominated
from lobo_fx.studies.objectives import Measuring, chosen_objectives
from lobo_fx.studies.space import read_space
from lobo_fx.studies.storage import open_study

SPACE = """\
passes:
  - optional: fold_bn
  - prune_weights: {amount: {from: 0.1, to: 0.9}, criterion: {choose: [l1, l2]}}
"""
MEASURED, EXPORTED = Measuring.__call__, Result.export_original
INPUTS = torch.ones(2, 4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@dataclasses.dataclass(frozen=True)
class Troubled(Pass):
    """Fails as its setting says."""

    trouble: str = "none"

    def run(self, program: Program, context: Context) -> Program:
        if self.trouble == "refuses":
            raise InvalidInput("this can't be reached")
        if self.trouble == "breaks":
            raise KeyError("a bug")
        if self.trouble == "interrupted":
            with contextlib.suppress(KeyboardInterrupt):  # as a training does, which then ends early
                signal.raise_signal(signal.SIGINT)
        return program


@pytest.fixture(autouse=True)
def _troubled() -> Iterator[None]:
    PASSES.register("troubled", Troubled)
    yield
    PASSES.unregister("troubled")


@pytest.fixture(autouse=True)
def _nothing_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export and latency have tests of their own; here the non-zero weights stand for both."""

    def measured(self: Measuring, result: Result) -> dict[str, float]:
        first, last = result.report.rows[0], result.report.rows[-1]
        kept = last.nonzero / first.nonzero
        return {"decibels": min(150.0, last.snr), "latency": kept, "size": kept, "memory": kept}

    monkeypatch.setattr(Measuring, "__call__", measured)
    monkeypatch.setattr(Result, "export_original", lambda *arguments: None)


def search(space: str = SPACE, trials: int = 6, **settings: Any) -> Front:
    given = {"example_inputs": INPUTS} | settings
    return lobo_fx.search(given.pop("model", None) or model(), space, trials=trials, progress=False, **given)


def drawn(storage: Path | None, **settings: Any) -> list[dict[str, Any]]:
    search(storage=storage, **settings)
    return [trial.params for trial in open_study("search", storage, ["maximize", "minimize"]).trials]


# --- what is found ---------------------------------------------------------------------------------------


def test_the_front_holds_what_no_other_trial_beats_and_recipes_that_compile(tmp_path: Path) -> None:
    front = search(trials=8)
    assert (front.trials, front.refused, front.errors, front.objectives) == (8, {}, {}, ("decibels", "latency"))
    losses = [(point.measured["decibels"], point.measured["latency"]) for point in front]
    assert 1 < len(front) <= 8
    assert losses == sorted(losses, reverse=True)
    front.save(tmp_path)
    for point in front.points[:2]:
        chosen = resolve(tmp_path / point.file)
        assert chosen == point.passes
        assert chosen[-1] == PruneWeights(
            point.choices["prune_weights.amount"], point.choices["prune_weights.criterion"]
        )
        again = lobo_fx.compile(model(), chosen, example_inputs=INPUTS, progress=False)
        assert again.report.rows[-1].snr == pytest.approx(point.measured["decibels"])
    saved = json.loads((tmp_path / "front.json").read_text())
    assert [entry["file"] for entry in saved["points"]] == [point.file for point in front]
    assert list(saved["objectives"]) == ["decibels", "latency"]
    assert "| choices | trial | decibels | latency |" in (tmp_path / "front.md").read_text()
    assert front.sheet.columns == ("trial", "decibels", "latency", "choices")
    assert "8 trials: 8 measured, 0 refused, 0 failed" in str(front)


def test_points_that_another_one_beats_are_left_out() -> None:
    figures = [(10.0, 0.5), (9.0, 0.5), (8.0, 0.4), (8.0, 0.4), (11.0, 0.9), (7.0, 0.6)]
    points = [FrontPoint(n, {"score": s, "latency": t}, {}, "") for n, (s, t) in enumerate(figures)]
    assert [point.trial for point in undominated(points, ("score", "latency"))] == [4, 0, 2]
    assert [point.trial for point in undominated(points, ("latency",))] == [2]
    assert [point.trial for point in undominated(points, ("score",))] == [4]


def test_the_loss_is_the_score_where_there_is_one() -> None:
    assert chosen_objectives(None, True) == ("score", "latency")
    assert chosen_objectives(None, False) == ("decibels", "latency")
    front = search(objectives=["latency"], trials=3)
    assert front.objectives == ("latency",)
    assert len(front) == 1


def test_trials_are_exported_and_measured_in_turn_with_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measuring, "__call__", MEASURED)
    monkeypatch.setattr(Result, "export_original", EXPORTED)
    monkeypatch.setattr("lobo_fx.measures.latency.peak_memory", lambda *arguments: (1_000_000, 2_000_000))
    space = "passes:\n  - one_of: [quantize_weights, prune_weights]\n"
    names = ["size", "latency", "memory", "decibels"]
    front = search(space, trials=1, objectives=names, rounds=2, evaluate=lambda module: 0.5)
    (point,) = front
    assert point.measured.keys() == {*names, "score"}
    assert point.measured["score"] == 0.5
    assert point.measured["memory"] == 1
    assert 0.2 < point.measured["size"] < 1.5
    assert point.measured["latency"] > 0


# --- draws -----------------------------------------------------------------------------------------------


def test_draws_depend_on_the_seed_and_not_on_where_a_study_was_broken_off(tmp_path: Path) -> None:
    unbroken = drawn(tmp_path / "one", trials=4)
    drawn(tmp_path / "two", trials=2)
    assert drawn(tmp_path / "two", trials=4) == unbroken
    assert drawn(tmp_path / "three", trials=4, seed=1) != unbroken
    assert len({str(choices) for choices in unbroken}) == 4


# --- trials that fail ------------------------------------------------------------------------------------

TROUBLED = "passes:\n  - prune_weights\n  - troubled: {trouble: {choose: [none, refuses, breaks]}}\n"


def test_trials_that_are_refused_or_fail_end_nothing_and_are_told() -> None:
    front = search(TROUBLED, trials=12)
    assert front.trials == 12
    assert len(front.refused) > 0
    assert set(front.refused.values()) == {"this can't be reached"}
    assert len(front.errors) > 0
    assert all(reason.endswith("KeyError: 'a bug'") for reason in front.errors.values())
    assert [point.choices for point in front] == [{"troubled.trouble": "none"}]
    assert f"{len(front.refused)} refused, {len(front.errors)} failed" in front.summary[0]


def test_a_study_without_any_measured_trial_says_why() -> None:
    with pytest.raises(InvalidInput, match=r"no trial of the study 'search' could be measured; .*can't be reached"):
        search("passes:\n  - troubled: {trouble: refuses}\n  - prune_weights: {amount: {from: 0.1, to: 0.2}}\n", 2)


def test_a_recipe_without_passes_is_refused() -> None:
    front = search("passes:\n  - optional: prune_weights\n", trials=6)
    assert set(front.refused.values()) == {"the recipe names no pass: it is the original"}


# --- Ctrl-C and going on ---------------------------------------------------------------------------------


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_puts_the_trial_back_even_where_a_pass_ends_early_at_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    space = "passes:\n  - prune_weights: {amount: {from: 0.1, to: 0.2}}\n  - troubled: {trouble: interrupted}\n"
    before = signal.getsignal(signal.SIGINT)
    front = search(space, trials=2, storage=path)
    assert front.is_interrupted
    assert (front.trials, len(front)) == (0, 0)
    assert signal.getsignal(signal.SIGINT) is before
    states = [trial.state.name for trial in open_study("search", path, ["maximize", "minimize"]).trials]
    assert states == ["FAIL", "WAITING"]


def test_a_study_goes_on_with_the_same_things_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"storage": tmp_path / "study.journal", "trials": 1}
    search(**given)
    assert search(**given | {"trials": 2}).trials == 2
    other = model()
    with torch.no_grad():
        other[0].weight[0, 0] += 1  # type: ignore[index]
    with pytest.raises(InvalidInput, match="is of another weights"):
        search(**given, model=other)
    with pytest.raises(InvalidInput, match=r"is of another space: .*0\.9.* there, .*0\.8.* here"):
        search(SPACE.replace("0.9", "0.8"), **given)
    with pytest.raises(InvalidInput, match="is of another calibration data"):
        search(**given, calibration_data=[INPUTS])
    with pytest.raises(InvalidInput, match=r"is of another score: 'none' there, '.*<lambda>, lower is better' here"):
        search(**given, evaluate=lambda _: 1.0, higher_is_better=False, objectives=["decibels", "latency"])
    assert search(**given, study="another", calibration_data=[INPUTS]).trials == 1


def test_a_score_that_is_not_finite_is_text_in_json(tmp_path: Path) -> None:
    front = search(trials=1)
    (point,) = front.points
    spoiled = dataclasses.replace(point, measured={**point.measured, "score": -math.inf})
    dataclasses.replace(front, points=[spoiled]).save(tmp_path)
    text = (tmp_path / "front.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    assert '"score": "-inf"' in text


# --- refused before any work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        ("passes:\n  - one_of: [fold_bn, quantize_static]\n", {}, "quantize_static needs calibration_data="),
        (
            "passes:\n  - prune_channels: {ratio: {from: 0.1, to: 0.5}, exclude: [nothing.*]}\n",
            {},
            "nothing",
        ),
        (SPACE, {"objectives": ["speed"]}, "no objective is called 'speed'"),
        (SPACE, {"objectives": ["size", "size"]}, "'size' is given twice"),
        (SPACE, {"objectives": ["score"]}, "'score' needs evaluate="),
        (SPACE, {"trials": 0}, "trials is 0"),
        (SPACE, {"lease": -1}, "lease is -1"),
        (SPACE, {"timeout": "long"}, "timeout is 'long'"),
        (SPACE, {"rounds": 0}, "rounds is 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_trial(
    space: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "study.journal"
    with pytest.raises(InvalidInput, match=message):
        search(space, storage=path, **settings)
    assert not path.exists() or not open_study("search", path, ["maximize", "minimize"]).trials


def test_a_space_may_be_read_before() -> None:
    assert search(read_space(SPACE), trials=1).trials == 1  # type: ignore[arg-type]
