"""Finds a learning rate on the data at hand: by short trainings, extrapolated to the whole training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from lobo_fx.errors import InvalidInput

__all__ = ["JUDGES", "RATES", "Found", "best_rate", "length_of_trials"]

RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_SHORTEST, _LONGEST = 8, 40
_LONGER, _AGAIN = 3, 4
"""How many times as long the second trials are, and how many rates have one."""
_POWERS = dict(zip(RATES, (0.01, 0.05, 0.14, 0.28, 0.34, 0.35), strict=True))
"""The power of the number of steps that the loss falls by at each rate, over 500 and 2,000 steps of two networks for
glyphs, half of every width removed and refitted."""
_STEEPEST = 0.8
"""The most that two trials are believed: what a high rate loses at first comes back fast, and then no more."""
_AS_GOOD = 1.1
"""If losses after short trials differ by less than this factor, the higher rate counts as the better one."""
_SHARE = 0.4
"""Share of the training's steps that finding its rate may cost, unless that makes trials shorter than the shortest."""
JUDGES = 6
"""Number of batches that a trial is judged by."""

Trial = Callable[[float, int], float]
"""Trains at a rate for a number of steps, puts everything back, and gives the loss at the end."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A rate, and how it was found."""

    rate: float
    reason: str


def length_of_trials(steps: int) -> int:
    """How many steps a first trial has where the training to come has `steps`."""
    return max(_SHORTEST, min(_LONGEST, round(_SHARE * steps / (len(RATES) + _LONGER * _AGAIN))))


def best_rate(trial: Trial, steps: int) -> Found:
    """The rate that would end a training of `steps` with the lowest loss.

    Each trial goes through its whole schedule, so that a high rate has settled when it is judged. Still, the best rate
    of short trainings is too low for long ones: a network that was refitted is near an optimum, and high rates first
    lose what they win back later (Wu et al. 2018, "Understanding short-horizon bias in stochastic meta-optimization",
    arXiv:1803.02021). So the highest rate that is about as good as the best and the next higher ones are tried for
    longer, and a power law (Hestness et al. 2017, arXiv:1712.00409) tells where each would end. Its power is the mean
    of that through both losses, which are noisy, and of what was measured for such a rate elsewhere.

    Raises:
        InvalidInput: no trial ended with a finite loss.
    """
    short = length_of_trials(steps)
    first = {rate: _finite(trial(rate, short)) for rate in RATES}
    best = _best(first)
    reason = f"best of {len(RATES)} trials of {short} steps"
    long = min(_LONGER * short, steps)
    if long < 2 * short:  # the training is hardly longer than the first trials
        return Found(best, reason)
    as_good = max(rate for rate in RATES if first[rate] <= max(first[best], _AS_GOOD * first[best]))
    again = RATES[RATES.index(as_good) :][:_AGAIN]
    second = {rate: _finite(trial(rate, long)) for rate in again}
    reason += f" and {len(again)} of {long}"
    if all(math.isinf(loss) for loss in second.values()):
        lower = {rate: loss for rate, loss in first.items() if rate < as_good}
        return Found(_best(lower), f"{reason}, which diverged")
    expected = {rate: _expected(rate, first[rate], second[rate], long / short, steps / long) for rate in again}
    return Found(_best(expected), reason)


def _best(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    best = min(losses, key=lambda rate: losses[rate], default=math.inf)
    if math.isinf(losses.get(best, math.inf)):
        raise InvalidInput(
            "the loss is NaN or infinite at every learning rate tried: check the data, loss_fn and weights"
        )
    return best


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _expected(rate: float, first: float, second: float, longer: float, rest: float) -> float:
    """The loss after `rest` times as many steps, where it went from `first` to `second` in `longer` times as many.

    Losses that are not positive follow no power law.
    """
    if not 0 < second < math.inf:
        return second
    seen = math.log(first / second) / math.log(longer) if second < first < math.inf else 0.0
    return float(second * rest ** -((min(seen, _STEEPEST) + _POWERS[rate]) / 2))
