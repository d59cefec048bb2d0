"""The rate that `FineTune` and its like take: of short trials, and of what longer ones would come to."""

from __future__ import annotations

import math

import pytest

from lobo_fx.errors import InvalidInput
from lobo_fx.passes.training.learning_rate import RATES, best_rate, length_of_trials

MEASURED = {1e-5: (0.0409, 0.0), 1e-4: (0.039, 0.03), 3e-4: (0.0507, 0.14), 1e-3: (0.0857, 0.31), 1e-2: (2.0, 0.3)}
"""By rate, the loss after 21 steps and the power that it falls by: a CNN for glyphs, half of every width removed."""


def measured(rate: float, steps: int) -> float:
    loss, power = MEASURED.get(rate, (0.5, 0.0))
    return float(loss * (steps / 21) ** -power)


def test_of_trainings_as_short_as_trials_the_best_is_taken() -> None:
    found = best_rate(lambda rate, steps: abs(math.log(rate / 1e-3)), 10)
    assert (found.rate, found.reason) == (1e-3, "best of 6 trials of 8 steps")


def test_a_long_training_takes_what_wins_in_the_end() -> None:
    assert min(RATES, key=lambda rate: measured(rate, length_of_trials(2000))) == 1e-4
    assert min(RATES, key=lambda rate: measured(rate, 2000)) == 1e-3
    found = best_rate(measured, 2000)
    assert found.rate == 1e-3
    assert found.reason == "best of 6 trials of 40 steps and 4 of 120"


def test_what_is_slower_now_and_steeper_is_faster_later() -> None:
    assert best_rate(lambda rate, steps: {1e-3: 2, 3e-3: 2.5}.get(rate, 9) * steps ** -(rate**0.2), 500).rate == 3e-3


def test_what_disturbs_a_refitted_network_at_first_is_taken_if_it_ends_lower() -> None:
    """LeNet-5 for glyphs, half of every width removed: losses after 13 and 39 steps, and of the second epoch."""
    trials = {
        1e-5: (0.0928, 0.0932),
        1e-4: (0.0965, 0.0964),
        3e-4: (0.1038, 0.1047),
        1e-3: (0.1490, 0.1341),
        3e-3: (0.3472, 0.1828),
        1e-2: (1.7894, 0.3275),
    }
    ends = {1e-5: 0.0912, 1e-4: 0.0814, 3e-4: 0.0743, 1e-3: 0.0698, 3e-3: 0.0777}
    found = best_rate(lambda rate, steps: trials[rate][steps > 20], 500)
    assert found.rate in (1e-3, 3e-3)
    assert ends[found.rate] < 0.9 * ends[1e-5]


def test_what_learns_nothing_is_not_taken_for_its_rate() -> None:
    # the highest of equal rates is tried again, those above diverge: nothing is better than it
    assert best_rate(lambda rate, steps: 1.0 if rate <= 3e-4 else math.inf, 500).rate == 3e-4
    assert best_rate(lambda rate, steps: 1.0 if rate <= 3e-4 else 2.0 + rate * steps, 500).rate == 3e-4


def test_what_diverges_later_is_not_taken() -> None:
    # 3e-4 is as good as the best at first, and the only one that is tried again
    losses = {1e-5: 1.2, 1e-4: 1.0, 3e-4: 1.05}

    def trial(rate: float, steps: int) -> float:
        return math.nan if rate == 3e-4 and steps > 40 else losses.get(rate, math.inf)

    found = best_rate(trial, 2000)
    assert (found.rate, found.reason) == (1e-4, "best of 6 trials of 40 steps and 4 of 120, which diverged")
    with pytest.raises(InvalidInput, match="NaN or infinite at every learning rate"):
        best_rate(lambda rate, steps: 1.0 if rate == 1e-5 and steps <= 40 else math.inf, 2000)


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_losses_that_are_not_positive_are_taken_as_they_are(sign: float) -> None:
    found = best_rate(lambda rate, steps: sign * (1 + (rate == 1e-3)) * steps - (rate == 1e-3), 500)
    assert found.rate == 1e-3


def test_no_finite_loss_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="NaN or infinite at every learning rate"):
        best_rate(lambda rate, steps: math.nan, 500)


@pytest.mark.parametrize(("steps", "length"), [(1, 8), (300, 8), (500, 11), (1800, 40), (10**6, 40)])
def test_trials_cost_a_share_of_the_training(steps: int, length: int) -> None:
    assert length_of_trials(steps) == length
    spent: list[int] = []

    def trial(rate: float, count: int) -> float:
        spent.append(count)
        return 1.0 if rate < 1e-3 else 2.0

    best_rate(trial, steps)
    assert sum(spent) <= max(0.41 * steps, 18 * 8)
