"""The ranks that a layer may have, and the choice of one for each layer within a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lobo_fx.passes.low_rank.spectrum import Spectrum

__all__ = ["Option", "Shape", "best_within", "options"]

_ROUNDING = 1e-9
"""Relative tolerance of a budget: rounding may put a sum of costs above a budget that it equals."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of a weight as a matrix.

    Attributes:
        outputs: rows.
        inputs: columns.
    """

    outputs: int
    inputs: int

    @property
    def full(self) -> int:
        """The rank of any weight of this shape."""
        return min(self.outputs, self.inputs)

    @property
    def highest(self) -> int:
        """The highest rank at which two factors are smaller than the weight; 0 where none is."""
        return (self.outputs * self.inputs - 1) // (self.outputs + self.inputs)

    def share(self, rank: int) -> float:
        """The share of multiplications that stays at a rank; 1 at the full rank, where the weight stays whole."""
        if rank == self.full:
            return 1.0
        return rank * (self.outputs + self.inputs) / (self.outputs * self.inputs)


@dataclasses.dataclass(frozen=True)
class Option:
    """A rank that a layer may have.

    Attributes:
        rank: the rank; the full one leaves the layer as it is.
        cost: what the layer costs at this rank.
        error: share of the energy of the layer's outputs that is lost.
    """

    rank: int
    cost: float
    error: float


def options(shape: Shape, found: Spectrum, cost: float, step: int) -> list[Option]:
    """A layer's options, dearest first: the full rank, then all multiples of `step` that make it cheaper."""
    step = step if shape.full >= 2 * step else 1
    lower = range(shape.highest // step * step, 0, -step)
    errors = found.shares
    return [Option(rank, cost * shape.share(rank), float(errors[rank])) for rank in (shape.full, *lower)]


def best_within(choices: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """Chooses one option for each layer, so that the sum of errors is small and the sum of costs within a budget.

    Greedy: starts from the cheapest options and takes the step that saves most error for its cost, as long as one
    fits. The result is optimal for its cost (Fox, "Discrete Optimization Via Marginal Analysis", 1966), except
    for the last steps, which fill up the budget. If even the cheapest options cost more, these are returned.

    Args:
        choices: dearest first.
        budget: most that all may cost together.
    """
    chosen = {name: given[-1] for name, given in choices.items()}
    spare = budget * (1 + _ROUNDING) - math.fsum(one.cost for one in chosen.values())

    def step(name: str) -> tuple[float, Option] | None:
        """The best of a layer's dearer options that fit, with the error that it saves for its cost."""
        now = chosen[name]
        better = [one for one in choices[name] if 0 < one.cost - now.cost <= spare and one.error < now.error]
        gains = [((now.error - one.error) / (one.cost - now.cost), one) for one in better]
        return max(gains, key=lambda entry: entry[0], default=None)

    ahead = {name: found for name in choices if (found := step(name)) is not None}
    while ahead:
        name = max(ahead, key=lambda one: ahead[one][0])
        _, one = ahead.pop(name)
        cost = one.cost - chosen[name].cost
        if cost <= spare:
            chosen[name] = one
            spare -= cost
        if (found := step(name)) is not None:
            ahead[name] = found
    return chosen
