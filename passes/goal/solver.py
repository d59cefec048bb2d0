"""Widths that lose least within a budget: a price for the cost, bisected, and each axis at its best at that price.

For a price λ every axis takes the width with the least loss + λ·cost, the others as they are, until none moves. The
cost falls as the price rises; what the last step leaves of the budget is filled by the widenings that gain most.

Source: Everett, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources", 1963.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lobo_fx.axes import Axis
from lobo_fx.passes.goal.terms import Sum
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["Losses", "Options", "solve"]

Options = Mapping[Axis, Sequence[int]]
"""By leaf, the widths that it may have, in rising order; the last is its size."""
Losses = Mapping[Axis, Mapping[int, float]]
"""By leaf and width, what it loses alone."""

_ROUNDING = 1e-9
"""A sum of many shares of one whole may be a little more than one."""
_SWEEPS = 20
_BISECTIONS = 40


def solve(cost: Sum, losses: Losses, options: Options, budget: float) -> Widths:
    """Widths whose cost is within a budget, at the least sum of losses that prices find.

    Where nothing fits, the narrowest.
    """
    narrowest = {leaf: found[0] for leaf, found in options.items()}
    widest = {leaf: found[-1] for leaf, found in options.items()}
    budget *= 1 + _ROUNDING
    if cost(widest) <= budget:
        return widest
    if cost(narrowest) >= budget:
        return narrowest
    scale = sum(max(found.values()) for found in losses.values()) / cost(widest)
    low, high, best = 1e-9 * scale, 1e6 * scale, narrowest
    for _ in range(_BISECTIONS):
        price = math.sqrt(low * high)
        found = min(
            (_settled(cost, losses, options, price, start) for start in (widest, best)),
            key=lambda widths: _loss(losses, widths) + price * cost(widths),
        )
        if cost(found) <= budget:
            best, high = found, price
        else:
            low = price
    return fill(cost, losses, options, budget, best)


def fill(cost: Sum, losses: Losses, options: Options, budget: float, widths: Widths) -> Widths:
    """Widens axes as long as the budget has room, first those that gain most for what they cost."""
    widths, spent = dict(widths), cost(widths)
    while True:
        best: tuple[float, Axis, int, float] | None = None
        for leaf, found in options.items():
            wider = [width for width in found if width > widths[leaf]]
            if not wider:
                continue
            before, after = cost.along(leaf, (widths[leaf], wider[0]), widths)
            gained = losses[leaf][widths[leaf]] - losses[leaf][wider[0]]
            if spent + after - before <= budget:
                worth = gained / max(after - before, 1e-12)
                if best is None or worth > best[0]:
                    best = worth, leaf, wider[0], after - before
        if best is None:
            return widths
        widths[best[1]] = best[2]
        spent += best[3]


def _settled(cost: Sum, losses: Losses, options: Options, price: float, start: Widths) -> Widths:
    """Every axis at its best, given the others, at a price."""
    widths = dict(start)
    for _ in range(_SWEEPS):
        moved = False
        for leaf, found in options.items():
            costs = cost.along(leaf, found, widths)
            totals = [losses[leaf][width] + price * part for width, part in zip(found, costs, strict=True)]
            width = found[min(range(len(found)), key=totals.__getitem__)]
            moved |= width != widths[leaf]
            widths[leaf] = width
        if not moved:
            break
    return widths


def _loss(losses: Losses, widths: Widths) -> float:
    return sum(losses[leaf][width] for leaf, width in widths.items())
