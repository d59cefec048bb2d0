"""`Correction`: what is predicted, set right by what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobo_fx.passes.goal.correction import Correction


def test_nothing_measured_changes_nothing() -> None:
    assert Correction()(0.3) == 0.3
    assert Correction().inverse(0.3) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize(("adds", "far"), [(False, 0.02 * 1.5), (True, 0.02 + 0.2)])
def test_beyond_what_was_measured_the_error_is_that_of_the_nearest(adds: bool, far: float) -> None:
    correction = Correction(adds)
    correction.learn(0.4, 0.6)
    assert correction(0.02) == pytest.approx(far)
    correction.learn(0.8, 0.8)
    assert correction(0.02) == pytest.approx(far)
    assert correction(1.6) == pytest.approx(1.6)
    assert 0.6 < correction(0.6) < 0.8


def test_copies_learn_apart() -> None:
    first = Correction()
    first.learn(0.5, 1.0)
    second = first.copy()
    second.learn(0.1, 0.1)
    assert first(0.1) == pytest.approx(0.2)
    assert second(0.1) == pytest.approx(0.1)


@given(
    st.booleans(),
    st.lists(
        st.tuples(st.floats(0.05, 1), st.floats(0.5, 1.5)), min_size=1, max_size=4, unique_by=lambda pair: pair[0]
    ),
    st.floats(0.05, 1.5),
)
def test_the_inverse_is_what_gives_a_value(adds: bool, pairs: list[tuple[float, float]], value: float) -> None:
    correction = Correction(adds)
    last = 0.0
    for predicted, factor in sorted(pairs):  # rising, as costs do
        last = max(last * 1.01, predicted * factor)
        correction.learn(predicted, last)
    predicted = correction.inverse(value)
    if 1.01 * value / 16 < predicted < 0.99 * value * 16 and all(abs(predicted - at) > 1e-3 for at, _ in pairs):
        assert correction(predicted) == pytest.approx(value, rel=1e-2)
