"""The repair on a noise that is known: single losses times what nobody told it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from lobo_fx.axes import Axis
from lobo_fx.passes.goal.repair import Repair
from lobo_fx.passes.goal.solver import Losses, Options, solve
from lobo_fx.passes.goal.terms import Budget, Sum, Term
from lobo_fx.passes.pruning.widths import Widths

SIZE, UNIT = 64, 8


class Truth:
    """Axes of equal cost; what each really loses is its loss times a factor of its own."""

    def __init__(self, seed: int, axes: int = 8) -> None:
        random = np.random.default_rng(seed)
        self.leaves = [Axis(SIZE) for _ in range(axes)]
        self.factors = dict(zip(self.leaves, random.lognormal(0, 1.2, axes).tolist(), strict=True))
        self.options: Options = {leaf: list(range(UNIT, SIZE + 1, UNIT)) for leaf in self.leaves}
        self.losses: Losses = {
            leaf: {width: 0.1 * (1 - width / SIZE) ** 2 for width in range(SIZE + 1)} for leaf in self.leaves
        }
        self.cost = Sum(
            self.leaves,
            [Term((leaf,), lambda w, leaf=leaf: w[leaf] / (SIZE * axes)) for leaf in self.leaves],  # type: ignore[misc]
        )
        self.asked: list[Widths] = []

    def noise(self, widths: Widths) -> float:
        self.asked.append(dict(widths))
        total: float = sum(self.factors[leaf] * self.losses[leaf][width] for leaf, width in widths.items())
        return 1e-6 + total

    @property
    def optimum(self) -> float:
        """The least noise within half of the cost, by the solver that knows the factors."""
        losses = {
            leaf: {width: self.factors[leaf] * loss for width, loss in self.losses[leaf].items()}
            for leaf in self.leaves
        }
        return self.noise(solve(Budget.of(self.cost, 0.5), losses, self.options))

    def repair(self, measure: Callable[[Widths], float] | None = None, seed: int = 0) -> Repair:
        return Repair(Budget.of(self.cost, 0.5), self.losses, self.options, measure or self.noise, seed)

    @property
    def start(self) -> Widths:
        return solve(Budget.of(self.cost, 0.5), self.losses, self.options)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_a_few_candidates_get_near_what_is_best(seed: int) -> None:
    truth = Truth(seed)
    optimum, first = truth.optimum, truth.noise(truth.start)
    truth.asked.clear()
    best = truth.repair(seed=seed).run([truth.start], 40)
    assert len(truth.asked) == 41
    assert len({tuple(widths.values()) for widths in truth.asked}) == 41
    assert all(truth.cost(widths) <= 0.5 for widths in truth.asked)
    found = truth.noise(best)
    assert found == min(map(truth.noise, list(truth.asked)))
    assert found - optimum < 0.3 * (first - optimum)


@pytest.mark.parametrize("moves", [0, 1, 5])
def test_the_best_is_never_worse_than_any_start(moves: int) -> None:
    truth = Truth(9)
    random = np.random.default_rng(1)
    starts = [truth.start]
    while len(starts) < 6:
        widths = {leaf: int(random.choice(list(truth.options[leaf]))) for leaf in truth.leaves}
        if truth.cost(widths) <= 0.5:
            starts.append(widths)
    best = truth.repair().run(starts, moves)
    assert len(truth.asked) <= 6 + moves
    assert truth.noise(best) <= min(map(truth.noise, starts))


def test_no_candidate_is_begun_after_the_deadline_but_the_first() -> None:
    truth = Truth(0)
    starts = [truth.start, dict.fromkeys(truth.leaves, UNIT)]
    assert truth.repair().run(starts, 40, until=time.monotonic() - 1) == truth.start
    assert len(truth.asked) == 1
    truth.asked.clear()

    def slow(widths: Widths) -> float:
        time.sleep(0.02)
        return truth.noise(widths)

    truth.repair(slow).run([truth.start], 10_000, until=time.monotonic() + 0.2)
    assert 1 <= len(truth.asked) <= 12


def test_it_ends_where_every_choice_was_tried() -> None:
    truth = Truth(0, axes=2)
    best = truth.repair().run([truth.start], 10_000)
    assert len(truth.asked) < 64
    within = [
        {truth.leaves[0]: a, truth.leaves[1]: b}
        for a in range(UNIT, SIZE + 1, UNIT)
        for b in range(UNIT, SIZE + 1, UNIT)
        if a + b <= SIZE
    ]
    assert truth.noise(best) == pytest.approx(min(map(truth.noise, within)), rel=1e-12)


def test_what_was_measured_says_by_what_losses_are_to_be_multiplied() -> None:
    truth = Truth(2, axes=4)
    truth.factors = dict(zip(truth.leaves, (1.0, 1.0, 1.0, 10.0), strict=True))
    repair = truth.repair()
    for narrow in truth.leaves:
        for width in (8, 24, 40):
            repair.run([{leaf: width if leaf is narrow else 56 for leaf in truth.leaves}], 0)
    learned = repair.learned()
    ratios = {leaf: learned[leaf][8] / truth.losses[leaf][8] for leaf in truth.leaves}
    *same, much = (ratios[leaf] for leaf in truth.leaves)
    assert same == pytest.approx([same[0]] * 3, rel=1e-6)
    assert same[0] < 0.5 * much


def test_a_noise_of_nothing_or_without_end_is_no_hindrance() -> None:
    truth = Truth(0)
    values = iter([np.inf, 0.3, np.inf, *[0.2] * 50])
    best = truth.repair(lambda widths: next(values)).run([truth.start], 8)
    assert truth.cost(best) <= 0.5
    nothing = truth.repair(lambda widths: 0.0)
    assert truth.cost(nothing.run([truth.start], 5)) <= 0.5
    assert nothing.learned() == truth.losses
    whole = Repair(Budget.of(truth.cost), truth.losses, truth.options, lambda widths: 0.0)
    assert whole.run([solve(Budget.of(truth.cost), truth.losses, truth.options)], 5) == dict.fromkeys(
        truth.leaves, SIZE
    )
    assert whole.learned() == truth.losses


def test_the_same_seed_gives_the_same_candidates() -> None:
    runs = []
    for seed in (1, 1, 2):
        truth = Truth(5)
        truth.repair(seed=seed).run([truth.start], 8)
        runs.append([tuple(widths.values()) for widths in truth.asked])
    assert runs[0] == runs[1] != runs[2]
