"""The front of candidates against every pair of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, cast

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx.contracts.candidates import Candidate, pareto
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.program import Program
from lobo_fx.passes import FineTune, PruneWeights

FEW = st.integers(1, 4)


def candidate(
    predicted: float, size: int, decibels: float, score: float | None = None, measured: float | None = None
) -> Candidate:
    return Candidate("x", None, "fit_goal", cast("Program", None), predicted, measured, size, decibels, score)


@given(st.lists(st.builds(candidate, FEW, FEW, FEW, st.none(), st.none() | FEW), max_size=8))
def test_the_front_is_what_no_other_one_beats_fastest_first(candidates: list[Candidate]) -> None:
    def is_beaten(one: Candidate) -> bool:
        mine = (one.latency, one.bytes, -one.decibels)
        others = [(c.latency, c.bytes, -c.decibels) for c in candidates]
        return any(t != mine and all(a <= b for a, b in zip(t, mine, strict=True)) for t in others)

    front = pareto(candidates)
    assert [c.latency for c in front] == sorted(c.latency for c in front)
    assert {id(c) for c in front} == {id(c) for c in candidates if not is_beaten(c)}


def test_what_was_measured_counts_before_what_was_predicted() -> None:
    assert candidate(0.5, 1, 20, measured=0.7).latency == 0.7
    assert candidate(0.5, 1, 20).latency == 0.5
    slow, fast = candidate(0.5, 1, 20, measured=0.9), candidate(0.8, 1, 20)
    assert pareto([slow, fast]) == [fast]


def test_scores_count_before_decibels() -> None:
    good: Any = candidate(0.5, 1, 10, score=0.9)
    bad: Any = candidate(0.5, 1, 30, score=0.8)
    assert pareto([bad, good]) == [good]


def test_candidates_without_a_score_are_compared_in_decibels_with_those_that_have_one() -> None:
    scored, plain = candidate(0.5, 1, 20, score=0.9), candidate(0.6, 1, 10)
    assert pareto([scored, plain]) == [scored]
    better = candidate(0.4, 1, 15)
    assert pareto([scored, better]) == [better, scored]


def test_what_the_score_judged_is_not_beaten_in_decibels_alone() -> None:
    scored, plain = candidate(0.5, 1, 20, score=0.0), candidate(0.4, 1, 30)
    assert pareto([scored, plain]) == [plain, scored]
    in_a_circle = [candidate(1, 1, 10, score=0.9), candidate(1, 1, 30, score=0.8), candidate(1, 1, 20)]
    assert pareto(in_a_circle) == [in_a_circle[0]]


@dataclasses.dataclass(frozen=True)
class Chooses(Pass):
    """Stands for a search: keeps two candidates, and carries the first one out."""

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def run(self, program: Program, context: Context) -> Program:
        for at, amount in enumerate((0.3, 0.6)):
            pass_ = PruneWeights(amount)
            made = Candidate(str(at), pass_, self.name, program.clone(), amount, None, 1, 9 * amount, chosen=at == 0)
            context.candidates.append(made)
        return PruneWeights(0.3).run(program, context)


def test_an_alternative_tells_nothing_of_passes_that_it_does_not_have() -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 6)
    result = lobo_fx.compile(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        [Chooses(), FineTune(epochs=1, learning_rate=1e-2)],
        example_inputs=rows[:2],
        train_data=[(rows, rows.argmax(1) % 3)],
        loss_fn=nn.functional.cross_entropy,
        progress=False,
    )
    assert any(note.startswith("fine_tune: ") for note in result.report.notes)
    for alternative in result.front:
        made = alternative.compile()
        assert [name for name, _ in made.passes] == ["prune_weights"]
        assert not any("fine_tune" in note for note in made.report.notes)
        assert not made.report.sheets
