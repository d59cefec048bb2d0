"""Importance criteria for structured pruning: how much a channel, head or group matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lobo_fx.axes.algebra import Axis
from lobo_fx.axes.members import Member

Elementwise = Callable[[torch.Tensor], torch.Tensor]
"""From a parameter to a score of each of its elements; a position's importance is their sum."""

ELEMENTWISE: dict[str, Elementwise] = {
    "l1": lambda weight: weight.abs(),
    "l2": lambda weight: weight.square(),
}


def importance(
    leaf: Axis, members: Sequence[Member], criterion: str | Elementwise, generator: torch.Generator
) -> torch.Tensor:
    """Scores the positions of a leaf over everything they run through; the lowest matter least.

    Args:
        leaf: whose positions to score.
        members: the parameters it runs through.
        criterion: `l1`, `l2`, `random`, or a function that scores each element of a parameter.
        generator: for `random`.

    Returns:
        Shape [leaf.size].
    """
    if criterion == "random":
        return torch.rand(leaf.size, generator=generator)
    score = ELEMENTWISE[criterion] if isinstance(criterion, str) else criterion
    result = torch.zeros(leaf.size, dtype=torch.float64)
    for member in members:
        result += member.along(leaf, score)
    return result
