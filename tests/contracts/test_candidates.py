"""The front of candidates against every pair of them."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from lobo_fx.contracts.candidates import Candidate, pareto
from lobo_fx.graph.program import Program

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
