"""A learning rate from the data at hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from lobo_fx.graph.inputs import Inputs
from lobo_fx.passes.training.objective import Objective, trainable

__all__ = ["STEPS", "find_learning_rate"]

STEPS = 60
_LOWEST, _HIGHEST = 1e-6, 0.3
_SMOOTHING = 0.85
_DIVERGED = 3.0
_MARGIN = 4.0
"""The rate taken is so many times below the one at which the loss was lowest: near that one it is about to rise."""


def find_learning_rate(
    objective: Objective,
    make: Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer],
    batches: Iterable[tuple[Inputs, Any]],
) -> float | None:
    """The learning rate of a range test: it rises with every step until the loss does.

    The weights, the statistics and the modes are put back afterwards.

    Args:
        objective: in training mode.
        make: an optimizer of parameters and a rate.
        batches: inputs and labels; `STEPS` of them are read, again from the start where there are fewer.

    Returns:
        A rate; None where the loss never went down, so that the test says nothing.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3.
    """
    before = copy.deepcopy(objective.state_dict())
    optimizer = make(trainable(objective).values(), _LOWEST)
    seen: list[tuple[float, float]] = []
    average = 0.0
    for step, (inputs, labels) in enumerate(batches):
        if step == STEPS:
            break
        rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (STEPS - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = objective(inputs, labels)
        average = _SMOOTHING * average + (1 - _SMOOTHING) * float(loss.detach())
        smooth = average / (1 - _SMOOTHING ** (step + 1))
        if not math.isfinite(smooth) or (seen and smooth > _DIVERGED * min(value for _, value in seen)):
            break
        seen.append((rate, smooth))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    objective.load_state_dict(before)
    if not seen or min(value for _, value in seen) >= seen[0][1]:
        return None
    return min(seen, key=lambda pair: pair[1])[0] / _MARGIN
