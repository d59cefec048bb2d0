"""A learning rate from the data at hand: short trainings, each a small copy of the one to come."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.passes.training.objective import Objective, trainable

__all__ = ["RATES", "find_learning_rate", "length_of_trials"]

RATES = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_SHORTEST, _LONGEST = 8, 40
_SHARE = 0.25
"""Of the training to come, what finding its rate may cost, where that leaves trials of the shortest length."""
_JUDGES = 6
"""Batches that no trial trains on."""

Batch = tuple[Inputs, Any]


def length_of_trials(steps: int) -> int:
    """How many steps a trial has where the training to come has `steps`."""
    return max(_SHORTEST, min(_LONGEST, round(_SHARE * steps / len(RATES))))


def find_learning_rate(
    objective: Objective,
    make: Callable[[float], tuple[torch.optim.Optimizer, LRScheduler]],
    batches: Iterable[Batch],
    steps: int,
) -> tuple[float, dict[float, float]]:
    """The rate of the short training that ends with the lowest loss on batches that it did not see.

    Each goes through its whole schedule, so that a high rate has settled when it is judged. Weights, statistics and
    modes are put back. Range tests, which raise the rate with every step until the loss rises, were tried first: one
    noisy batch at a tiny rate misled them.

    Args:
        objective: in training mode.
        make: an optimizer with its schedule, from a rate.
        batches: inputs and labels; the first are trained on, those after them judge.
        steps: length of a trial; the same batches come again where there are fewer.

    Returns:
        The rate, and by rate the loss that its trial ended with.

    Raises:
        InvalidInput: no trial ended with a finite loss.
    """
    read = list(itertools.islice(batches, steps + _JUDGES))
    judges = read[-min(_JUDGES, max(1, len(read) // 4)) :]
    seen = read[: -len(judges)] or read
    before = copy.deepcopy(objective.state_dict())
    losses: dict[float, float] = {}
    for rate in RATES:
        try:
            losses[rate] = _trial(objective, *make(rate), seen, steps, judges)
        finally:  # an interrupted trial is no training
            objective.load_state_dict(before)
    best = min(losses, key=lambda rate: losses[rate])
    if math.isinf(losses[best]):
        raise InvalidInput(
            "the loss is NaN or infinite at every learning rate tried: check the data, loss_fn and weights"
        )
    return best, losses


def _trial(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    batches: Sequence[Batch],
    steps: int,
    judges: Sequence[Batch],
) -> float:
    """The mean loss on batches that were not seen; infinite where training diverged. All trials draw alike."""
    torch.manual_seed(0)
    for inputs, labels in itertools.islice(itertools.cycle(batches), steps):
        optimizer.zero_grad()  # before all else: where a trial diverges, no gradient may be left for training
        loss = objective(inputs, labels)
        if not math.isfinite(float(loss.detach())):
            return math.inf
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable(objective).values(), 1.0)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    with torch.no_grad():  # in training mode, as the losses above: what is frozen stays so
        mean = sum(float(objective(inputs, labels)) for inputs, labels in judges) / len(judges)
    return mean if math.isfinite(mean) else math.inf
