"""Improves widths by measured losses: candidates of the same cost are pruned, refitted and compared.

Losses of single axes mislead where much is removed, since refitted layers make up for others. Every measured candidate
updates a multiplier for each axis' loss. The next candidate is the best one by the updated model: the solution of the
whole problem if it is new, else the most promising move around the best so far.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from lobo_fx.axes import Axis, kind
from lobo_fx.passes.goal.solver import Losses, Options, fill, solve, sum_of
from lobo_fx.passes.goal.terms import Budget
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["Repair"]

_STIFF = 0.3
"""Ridge that draws a multiplier to that of its kind, against the squared relative errors of candidates."""
_STEPS = (1, 2, 4)
_CURIOUS = 0.1
"""Random spread of predictions, so that not always the same axes move."""


@dataclasses.dataclass
class Repair:
    """A search among widths of one budget.

    Attributes:
        budget: what widths may cost.
        losses: what each axis loses alone.
        options: the widths that axes may have.
        measure: gives the noise of a candidate as a loss that can be summed.
        seed: seed of random choices.
        tried: this loss by candidate.
    """

    budget: Budget
    losses: Losses
    options: Options
    measure: Callable[[Widths], float]
    seed: int = 0
    tried: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.leaves = list(self.options)

    def run(self, starts: Iterable[Widths], moves: int, until: float = math.inf) -> Widths:
        """The best of the starts and of further candidates.

        Args:
            starts: widths within the budget.
            moves: how many further candidates.
            until: time on the monotonic clock after which no candidate but the first is begun.
        """
        for widths in starts:
            if not self.tried or time.monotonic() < until:
                self._try(widths)
        for _ in range(moves):
            candidate = next(self._proposals(), None) if time.monotonic() < until else None
            if candidate is None:
                break
            self._try(candidate)
        return self.best

    @property
    def best(self) -> Widths:
        """The least noisy of all that were tried."""
        least, _ = min(self.tried.items(), key=lambda entry: entry[1])
        return dict(zip(self.leaves, least, strict=True))

    def _try(self, widths: Widths) -> None:
        key = tuple(widths[leaf] for leaf in self.leaves)
        if key not in self.tried:
            self.tried[key] = self.measure(widths)

    def _is_new(self, widths: Widths) -> bool:
        return tuple(widths[leaf] for leaf in self.leaves) not in self.tried

    def _proposals(self) -> Iterator[Widths]:
        learned = self.learned()
        solution = solve(self.budget, learned, self.options)
        if self._is_new(solution):
            yield solution
        # Around the best, and once that has no new neighbour, around the next.
        for key in sorted(self.tried, key=self.tried.__getitem__):
            start = dict(zip(self.leaves, key, strict=True))
            found = [
                (sum_of(learned, moved) * self.random.lognormvariate(0, _CURIOUS), at, moved)
                for at, moved in enumerate(self._moves(start, learned))
                if self._is_new(moved)
            ]
            yield from (moved for _, _, moved in sorted(found, key=lambda entry: entry[:2]))

    def _moves(self, start: Widths, learned: Losses) -> Iterator[Widths]:
        """An axis some steps wider and others, one after the other, as much narrower as the budget asks."""
        able = [leaf for leaf in self.leaves if len(self.options[leaf]) > 1]
        pairs = list(itertools.permutations(able, 2))
        for wider, narrower in self.random.sample(pairs, min(len(pairs), 400)):
            at = self.options[wider].index(start[wider]) + self.random.choice(_STEPS)
            if at >= len(self.options[wider]):
                continue
            others = [leaf for leaf in able if leaf not in (wider, narrower)]
            order = (narrower, *self.random.sample(others, len(others)))
            moved = self._narrowed(start | {wider: self.options[wider][at]}, order)
            if self.budget.fits(moved):
                yield fill(self.budget, learned, self.options, moved)

    def _narrowed(self, widths: Widths, order: Iterable[Axis]) -> Widths:
        """Axes in this order, a step at a time, as much narrower as the budget asks, if that is enough."""
        moved = dict(widths)
        for leaf in order:
            for width in reversed(self.options[leaf]):
                if self.budget.fits(moved):
                    return moved
                moved[leaf] = min(moved[leaf], width)
        return moved

    def learned(self) -> Losses:
        """The losses of all axes, each times a multiplier fitted to the candidates so far.

        The fit is least squares of relative errors; it draws multipliers to that of their kind, these to a common one.
        """
        factors = self._factors()
        return {
            leaf: {width: factors[leaf] * loss for width, loss in self.losses[leaf].items()} for leaf in self.leaves
        }

    def _factors(self) -> Mapping[Axis, float]:
        rows = [[self.losses[leaf][width] for leaf, width in zip(self.leaves, key, strict=True)] for key in self.tried]
        noises = torch.tensor(list(self.tried.values())).double()
        expected = torch.tensor(rows, dtype=torch.double)
        tells = (noises > 0) & noises.isfinite() & (expected.sum(1) > 0)
        if not bool(tells.any()):
            return dict.fromkeys(self.leaves, 1.0)
        parts = expected[tells] / noises[tells].unsqueeze(1)
        common = 1 / max(float(parts.sum(1).log().mean().exp()), 1e-12)
        kinds = sorted({kind(leaf) for leaf in self.leaves})
        member = torch.tensor([[float(kind(leaf) == name) for name in kinds] for leaf in self.leaves]).double()
        factors = torch.full((len(kinds),), common, dtype=torch.double)
        factors = member @ _ridge(parts @ member, factors)
        return dict(zip(self.leaves, _ridge(parts, factors).tolist(), strict=True))


def _ridge(parts: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """Multipliers m near a prior with parts·m near one; each from a tenth to ten times its prior."""
    scaled = parts * prior
    gram = scaled.mT @ scaled + _STIFF * torch.eye(len(prior), dtype=torch.double)
    moved: torch.Tensor = torch.linalg.solve(gram, scaled.mT @ (1 - scaled.sum(1)))
    return prior * (1 + moved).clamp(0.1, 10.0)
