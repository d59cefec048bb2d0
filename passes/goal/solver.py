"""Finds widths that lose least within a budget: bisects a price for the cost, and takes each axis' best at that price.

At a price λ (a Lagrange multiplier), every axis takes the width with the least loss + λ·cost, the others fixed, until
none changes. The cost falls as the price rises. The rest of the budget is filled by the widenings that gain most and,
where axes are few, by pairs of which one is widened and the other narrowed. Of several limits, each has a weight in the
cost, which rises if the limit is the one that binds.

Source: Everett, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum Allocation of Resources", 1963.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from lobo_fx.axes import Axis
from lobo_fx.passes.goal.terms import Budget, Sum
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["Losses", "Options", "cheapest", "fill", "solve", "sum_of"]

Options = Mapping[Axis, Sequence[int]]
"""By leaf, the widths that it may have, in rising order; the last is its size."""
Losses = Mapping[Axis, Mapping[int, float]]
"""By leaf and width, the loss of that width alone."""

_SWEEPS = 20
_BISECTIONS = 40
_FEW = 12
"""Most axes among which pairs are exchanged: of more there are too many pairs, and filling leaves less."""
_STARTS = 3
"""Of several reweighings, the best from which pairs are exchanged."""
_REWEIGHINGS = 8
"""Rounds in which limits that are full become dearer, and those with room cheaper."""


def sum_of(losses: Losses, widths: Widths) -> float:
    """The loss of all widths together, each as if alone."""
    return sum(losses[leaf][width] for leaf, width in widths.items())


def solve(budget: Budget, losses: Losses, options: Options) -> Widths:
    """Widths within a budget, at the least sum of losses that prices find.

    If nothing fits, the cheapest widths.
    """
    widest = {leaf: found[-1] for leaf, found in options.items()}
    count = len(budget.limits)
    weights, found = [1.0 / count] * count, list[Widths]()
    if budget.fits(widest):
        return widest
    for _ in range(_REWEIGHINGS):
        least = cheapest(budget.weighted(weights), options)
        if budget.fits(least) or count == 1:
            break
        weights = _reweighed(weights, budget.shares(least))
    if not budget.fits(least):
        return least
    for _ in range(_REWEIGHINGS if count > 1 else 1):
        found.append(_priced(budget, weights, losses, options, least))
        weights = _reweighed(weights, budget.shares(found[-1]))
    filled = sorted((fill(budget, losses, options, widths) for widths in found), key=lambda w: sum_of(losses, w))
    exchanged = (_exchanged(budget, losses, options, widths) for widths in filled[:_STARTS])
    return min(exchanged, key=lambda widths: sum_of(losses, widths))


def _reweighed(weights: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Weights of limits of which these shares are taken: the fuller, the dearer."""
    raised = [weight * share**2 for weight, share in zip(weights, shares, strict=True)]
    return [weight / sum(raised) for weight in raised]


def cheapest(cost: Sum, options: Options) -> Widths:
    """The cheapest widths, which may not be the narrowest: two layers of a lower rank may cost more than one."""
    narrowest = {leaf: found[0] for leaf, found in options.items()}
    free: Losses = {leaf: dict.fromkeys(found, 0.0) for leaf, found in options.items()}
    return _settled(_Parts(cost, options), free, 1.0, narrowest)


def _priced(budget: Budget, weights: Sequence[float], losses: Losses, options: Options, least: Widths) -> Widths:
    """Widths at the lowest price of the weighted limits at which all of them hold; `least` where no price is enough."""
    cost = budget.weighted(weights)
    widest = {leaf: found[-1] for leaf, found in options.items()}
    parts = _Parts(cost, options)
    scale = sum(max(found.values()) for found in losses.values()) / cost(widest)
    low, high, best = 1e-9 * scale, 1e6 * scale, least
    for _ in range(_BISECTIONS):
        price = math.sqrt(low * high)
        found = min(
            (_settled(parts, losses, price, start) for start in (widest, best)),
            key=lambda widths: sum_of(losses, widths) + price * cost(widths),
        )
        if budget.fits(found):
            best, high = found, price
        else:
            low = price
    return best


def fill(budget: Budget, losses: Losses, options: Options, widths: Widths) -> Widths:
    """Widens axes as long as the budget has room, first those that gain most for what they cost."""
    widths = dict(widths)
    left = [most - cost(widths) for cost, most in budget.limits]
    while True:
        best: tuple[float, Axis, int, list[float]] | None = None
        for leaf, found in options.items():
            wider = next((width for width in found if width > widths[leaf]), None)
            if wider is None:
                continue
            steps = [cost.along(leaf, (widths[leaf], wider), widths) for cost, _ in budget.limits]
            added = [after - before for before, after in steps]
            if all(more <= room for more, room in zip(added, left, strict=True)):
                share = sum(more / most for more, (_, most) in zip(added, budget.limits, strict=True))
                worth = (losses[leaf][widths[leaf]] - losses[leaf][wider]) / max(share, 1e-12)
                if best is None or worth > best[0]:
                    best = worth, leaf, wider, added
        if best is None:
            return widths
        widths[best[1]] = best[2]
        left = [room - more for room, more in zip(left, best[3], strict=True)]


def _exchanged(budget: Budget, losses: Losses, options: Options, widths: Widths) -> Widths:
    """Widens one axis and narrows another so that the budget holds, as long as some pair of axes lowers the loss.

    Prices find only widths on the convex hull of losses over costs; where steps are large, much lies between.
    """
    able = [leaf for leaf, found in options.items() if len(found) > 1]
    if len(able) > _FEW:
        return widths
    for _ in range(_SWEEPS):
        gains = {
            leaf: {width: losses[leaf][widths[leaf]] - losses[leaf][width] for width in options[leaf]} for leaf in able
        }
        pairs = [
            (gains[wider][high] + gains[narrower][low], {wider: high, narrower: low})
            for wider, narrower in itertools.permutations(able, 2)
            for high, low in itertools.product(options[wider], options[narrower])
            if high > widths[wider] and low < widths[narrower]
        ]
        pairs = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: -pair[0])
        better = next((moved for _, pair in pairs if budget.fits(moved := widths | pair)), None)
        if better is None:
            break
        widths = fill(budget, losses, options, better)
    return widths


class _Parts:
    """The part of a cost that depends on one leaf, for each of its widths: the same at every price.

    Args:
        cost: cost of widths.
        options: the widths that leaves may have.
    """

    def __init__(self, cost: Sum, options: Options) -> None:
        self.cost, self.options = cost, options
        self.others = {leaf: list({other: None for term in cost.of[leaf] for other in term.leaves}) for leaf in options}
        self.known: dict[tuple[Axis, tuple[int, ...]], list[float]] = {}

    def along(self, leaf: Axis, widths: Widths) -> list[float]:
        """The part at each of a leaf's widths, the others as they are."""
        key = leaf, tuple(widths[other] for other in self.others[leaf] if other is not leaf)
        if key not in self.known:
            self.known[key] = self.cost.along(leaf, self.options[leaf], widths)
        return self.known[key]


def _settled(parts: _Parts, losses: Losses, price: float, start: Widths) -> Widths:
    """Every axis at its best, given the others, at a price."""
    widths = dict(start)
    for _ in range(_SWEEPS):
        moved = False
        for leaf, found in parts.options.items():
            costs = parts.along(leaf, widths)
            totals = [losses[leaf][width] + price * part for width, part in zip(found, costs, strict=True)]
            width = found[min(range(len(found)), key=totals.__getitem__)]
            moved |= width != widths[leaf]
            widths[leaf] = width
        if not moved:
            break
    return widths
