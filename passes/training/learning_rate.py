"""A learning rate from the data at hand: short trainings, each a small copy of the one to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from lobo_fx.errors import InvalidInput

__all__ = ["JUDGES", "RATES", "apart", "best_rate", "length_of_trials"]

RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_SHORTEST, _LONGEST = 8, 40
_SHARE = 0.25
"""Of the training to come, what finding its rate may cost, where that leaves trials of the shortest length."""
JUDGES = 6
"""Batches that no trial trains on."""

T = TypeVar("T")


def length_of_trials(steps: int) -> int:
    """How many steps a trial has where the training to come has `steps`."""
    return max(_SHORTEST, min(_LONGEST, round(_SHARE * steps / len(RATES))))


def apart(batches: Iterable[T]) -> tuple[list[T], list[T]]:
    """The batches that trials train on, and those after them that judge: a quarter where there are few."""
    read = list(batches)
    judges = read[-min(JUDGES, max(1, len(read) // 4)) :]
    return read[: -len(judges)] or read, judges


def best_rate(trial: Callable[[float], float]) -> float:
    """The rate of the short training that ends with the lowest loss on batches that it did not see.

    Each goes through its whole schedule, so that a high rate has settled when it is judged. Range tests, which raise
    the rate with every step until the loss rises, were tried first: one noisy batch at a tiny rate misled them.

    Args:
        trial: trains at a rate, puts everything back and gives the loss that it ended with.

    Raises:
        InvalidInput: no trial ended with a finite loss.
    """
    losses = {rate: loss if math.isfinite(loss := trial(rate)) else math.inf for rate in RATES}
    best = min(losses, key=lambda rate: losses[rate])
    if math.isinf(losses[best]):
        raise InvalidInput(
            "the loss is NaN or infinite at every learning rate tried: check the data, loss_fn and weights"
        )
    return best
