"""The solver against every choice of widths there is."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np

from lobo_fx.axes import Axis
from lobo_fx.passes.goal.solver import Losses, Options, cheapest, fill, solve
from lobo_fx.passes.goal.terms import Budget, Sum, Term
from lobo_fx.passes.pruning.widths import Widths


class Problem:
    """A chain of layers, each as costly as the widths of its two axes say, with convex losses."""

    def __init__(self, seed: int, axes: int = 3, widths: int = 16) -> None:
        random = np.random.default_rng(seed)
        self.leaves = [Axis(8 * widths) for _ in range(axes)]
        self.options: Options = {leaf: [8 * (at + 1) for at in range(widths)] for leaf in self.leaves}
        terms = []
        for a, b in itertools.pairwise(self.leaves):
            times, call = random.uniform(0.2, 2), random.uniform(0, 50)

            def product(w: Any, a: Axis = a, b: Axis = b, times: float = times, call: float = call) -> float:
                return float(call + times * w[a] * w[b])

            terms.append(Term((a, b), product))
        for leaf in self.leaves:
            own = random.uniform(1, 20)
            terms.append(Term((leaf,), lambda w, leaf=leaf, own=own: own * w[leaf]))  # type: ignore[misc]
        self.cost = Sum(self.leaves, terms)
        self.losses: Losses = {}
        for leaf in self.leaves:
            height, power = random.lognormal(0, 1.5), random.uniform(1, 3)
            shares = np.linspace(0, 1, leaf.size + 1)
            self.losses[leaf] = dict(enumerate((height * (1 - shares) ** power).tolist()))

    @property
    def whole(self) -> float:
        return self.cost({leaf: leaf.size for leaf in self.leaves})

    @property
    def narrowest(self) -> float:
        return self.cost({leaf: found[0] for leaf, found in self.options.items()})

    def loss(self, widths: Widths) -> float:
        return sum(self.losses[leaf][width] for leaf, width in widths.items())

    @functools.cached_property
    def choices(self) -> list[tuple[float, float]]:
        """Cost and loss of every choice there is."""
        found = (dict(zip(self.leaves, chosen, strict=True)) for chosen in itertools.product(*self.options.values()))
        return [(self.cost(widths), self.loss(widths)) for widths in found]

    def best(self, budget: float) -> float:
        """The least loss of all choices within a budget."""
        return min(loss for cost, loss in self.choices if cost <= budget)


def test_widths_are_near_the_best_of_all_and_within_the_budget() -> None:
    excess = []
    problems = [Problem(seed) for seed in range(5)]
    for problem, share in itertools.product(problems, (0.8, 0.5, 0.3, 0.15)):
        budget = share * problem.whole
        widths = solve(Budget.of(problem.cost, budget), problem.losses, problem.options)
        assert problem.cost(widths) <= budget
        assert all(widths[leaf] in problem.options[leaf] for leaf in problem.leaves)
        excess.append(problem.loss(widths) / problem.best(budget) - 1)
    assert max(excess) < 0.2
    assert float(np.mean(excess)) < 0.01
    assert float(np.median(excess)) < 0.002


def test_all_fits_and_nothing_fits() -> None:
    problem = Problem(0)
    widest = {leaf: leaf.size for leaf in problem.leaves}
    narrowest = dict.fromkeys(problem.leaves, 8)
    for budget in (problem.whole, 2 * problem.whole, math.inf):
        assert solve(Budget.of(problem.cost, budget), problem.losses, problem.options) == widest
    for budget in (0.0, problem.narrowest / 2, problem.narrowest):
        assert solve(Budget.of(problem.cost, budget), problem.losses, problem.options) == narrowest


def test_a_wider_budget_loses_no_more() -> None:
    problem = Problem(3)
    losses = [
        problem.loss(solve(Budget.of(problem.cost, share * problem.whole), problem.losses, problem.options))
        for share in np.linspace(0.1, 1, 19)
    ]
    assert all(later <= earlier * 1.05 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == 0


def test_losses_of_nothing_and_a_cost_that_widths_do_not_move_are_no_hindrance() -> None:
    problem = Problem(1)
    free: Losses = {leaf: dict.fromkeys(range(leaf.size + 1), 0.0) for leaf in problem.leaves}
    assert problem.cost(solve(Budget.of(problem.cost, problem.whole / 2), free, problem.options)) <= problem.whole / 2
    flat = Sum(problem.leaves, [Term((), lambda widths: 1.0)])
    assert solve(Budget.of(flat), problem.losses, problem.options) == {leaf: leaf.size for leaf in problem.leaves}


def test_what_is_left_of_a_budget_goes_to_what_gains_most_for_it() -> None:
    cheap, dear = Axis(4), Axis(4)
    cost = Sum([cheap, dear], [Term((cheap,), lambda w: float(w[cheap])), Term((dear,), lambda w: 10.0 * w[dear])])
    losses: Losses = {leaf: {1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0} for leaf in (cheap, dear)}
    options: Options = {leaf: [1, 2, 3, 4] for leaf in (cheap, dear)}
    assert fill(Budget.of(cost, 14.5), losses, options, {cheap: 1, dear: 1}) == {cheap: 4, dear: 1}
    assert fill(Budget.of(cost, 24), losses, options, {cheap: 1, dear: 1}) == {cheap: 4, dear: 2}
    assert fill(Budget.of(cost, 11), losses, options, {cheap: 1, dear: 1}) == {cheap: 1, dear: 1}


def test_what_prices_pass_over_is_found_by_exchanging() -> None:
    """Filling takes the small step, which gains most for its cost, and leaves no room for the large one."""
    small, large = Axis(2), Axis(2)
    cost = Sum([small, large], [Term((small,), lambda w: float(w[small])), Term((large,), lambda w: 10.0 * w[large])])
    losses: Losses = {small: {1: 2.0, 2: 0.0}, large: {1: 10.0, 2: 0.0}}
    options: Options = {leaf: [1, 2] for leaf in (small, large)}
    assert fill(Budget.of(cost, 21), losses, options, {small: 1, large: 1}) == {small: 2, large: 1}
    assert solve(Budget.of(cost, 21), losses, options) == {small: 1, large: 2}


def test_of_several_limits_each_holds_and_the_loss_is_near_the_best_of_all() -> None:
    excess = []
    for seed, first, second in itertools.product(range(2), (0.5, 0.3), (0.6, 0.25)):
        problem, other = Problem(seed, widths=8), Problem(seed + 100, widths=8)
        twins = dict(zip(problem.leaves, other.leaves, strict=True))

        def elsewhere(widths: Any, other: Problem = other, twins: dict[Axis, Axis] = twins) -> float:
            return other.cost({twins[leaf]: width for leaf, width in widths.items()})

        size = Sum(problem.leaves, [Term(tuple(problem.leaves), elsewhere)])
        limits = ((problem.cost, first * problem.whole), (size, second * other.whole))
        widths = solve(Budget(limits), problem.losses, problem.options)
        assert all(cost(widths) <= most for cost, most in limits)
        every = (dict(zip(problem.leaves, c, strict=True)) for c in itertools.product(*problem.options.values()))
        best = min(problem.loss(w) for w in every if all(cost(w) <= most for cost, most in limits))
        excess.append(problem.loss(widths) / best - 1)
    assert max(excess) < 0.25
    assert float(np.mean(excess)) < 0.04


def test_an_option_that_is_narrower_and_dearer_does_not_make_a_budget_too_small() -> None:
    width, rank = Axis(8), Axis(8)
    twice = Term((width, rank), lambda w: w[width] * (2.0 if w[rank] < 8 else 1.0))  # two layers in the place of one
    options: Options = {width: [2, 4, 8], rank: [1, 8]}
    losses: Losses = {width: {2: 3.0, 4: 1.0, 8: 0.0}, rank: {1: 0.5, 8: 0.0}}
    cost = Sum([width, rank], [twice])
    assert cheapest(cost, options) == {width: 2, rank: 8}
    assert solve(Budget.of(cost, 2.0), losses, options) == {width: 2, rank: 8}
    assert solve(Budget.of(cost, 4.0), losses, options) == {width: 4, rank: 8}
    assert solve(Budget.of(cost, 1.0), losses, options) == {width: 2, rank: 8}  # nothing fits


def test_of_two_limits_that_exclude_each_others_cheapest_the_width_that_holds_both_is_found() -> None:
    """A rank that is small takes longer than the whole layer, one that is large takes more bytes."""
    leaf = Axis(8)
    latency, size = {1: 1.2, 4: 0.9, 8: 1.0}, {1: 0.5, 4: 0.95, 8: 1.4}
    budget = Budget(tuple((Sum([leaf], [Term((leaf,), lambda w, of=of: of[w[leaf]])]), 1.0) for of in (latency, size)))  # type: ignore[misc]
    assert solve(budget, {leaf: {1: 3.0, 4: 1.0, 8: 0.0}}, {leaf: [1, 4, 8]}) == {leaf: 4}
