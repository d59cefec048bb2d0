"""The Gram matrix XᵀX of a weight's inputs: it tells how much a change of the weight changes the layer's outputs."""

from __future__ import annotations

import dataclasses
import functools

import torch

from lobo_fx.passes.fitting.linear_problem import Moments

__all__ = ["Gram", "RowsOrSums"]


@dataclasses.dataclass(frozen=True)
class Gram:
    """AᵀA + λ·I for each group, as the rows A where these are few, else as sums.

    Attributes:
        values: (groups, rows, columns), or the sums (groups, columns, columns).
        is_sum: whether `values` are sums.
        count: how many rows of inputs there were.
        ridge: λ, (groups,).
    """

    values: torch.Tensor
    is_sum: bool
    count: int
    ridge: torch.Tensor

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> Gram:
        """From all rows of inputs, (groups, rows, columns)."""
        found = RowsOrSums()
        found.add(rows)
        return found.gram

    @classmethod
    def of_moments(cls, moments: Moments, centred: bool = False) -> Gram:
        """From gathered inputs; less their mean if `centred`, since a bias makes up for the mean."""
        mean = moments.mean_x if centred else torch.zeros_like(moments.x)  # (groups, columns)
        if moments.rows:
            values = torch.cat([x for x, _ in moments.rows], 1) - mean.unsqueeze(1)
        else:
            values = moments.xx - moments.count * mean.unsqueeze(2) * mean.unsqueeze(1)
        return cls(values, not moments.rows, moments.count, torch.zeros(len(values), dtype=torch.double))

    @functools.cached_property
    def energy(self) -> torch.Tensor:
        """The diagonal without λ, (groups, columns)."""
        return self.values.diagonal(dim1=1, dim2=2) if self.is_sum else self.values.square().sum(1)

    @property
    def sums(self) -> torch.Tensor:
        """AᵀA, (groups, columns, columns)."""
        return self.values if self.is_sum else self.values.mT @ self.values

    def __add__(self, other: Gram) -> Gram:
        """Over the rows of both."""
        count, ridge = self.count + other.count, self.ridge + other.ridge
        if self.is_sum or other.is_sum or count >= self.values.shape[2]:
            return Gram(self.sums + other.sums, True, count, ridge)
        return Gram(torch.cat([self.values, other.values], 1), False, count, ridge)

    def over(self, factor: torch.Tensor) -> Gram:
        """The Gram matrix of inputs divided by a factor for each column; call it before a ridge is added."""
        values = self.values / factor
        return dataclasses.replace(self, values=values / factor.unsqueeze(1) if self.is_sum else values)

    def shrunk(self) -> Gram:
        """Shrinks towards a multiple of the identity, the more the fewer rows there were.

        Otherwise, rounding fitted to four rows would be worse than rounding to nearest on all other rows.

        Source: Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", 2010: OAS,
            without its terms that vanish with many columns.
        """
        # The share of the identity is 1 where the eigenvalues are as even as noise would make them, and goes to 0 as
        # rows grow or a few directions stand out.
        columns = self.values.shape[2]
        trace = self.energy.sum(1)
        smaller = self.values if self.is_sum else self.values @ self.values.mT  # XXᵀ has the squares of XᵀX
        square, squared_trace = smaller.square().sum((1, 2)), trace.square()
        share = (square + squared_trace) / ((self.count + 1) * (square - squared_trace / columns))
        share = share.nan_to_num(1.0).clamp(0, 1)
        kept = (1 - share if self.is_sum else (1 - share).sqrt()).view(-1, 1, 1)
        return dataclasses.replace(self, values=kept * self.values, ridge=self.ridge + share * trace / columns)


class RowsOrSums:
    """Gathers input rows: keeps them while they are fewer than columns, then keeps the sums of their products.

    Args:
        most: keep at most this many rows, drawn at random, and never sums; None uses all rows.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.moments = Moments()
        self.kept = torch.zeros(())
        self.priority = torch.zeros(0)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a random priority for each of `count` new rows; returns indices to keep, and their priorities."""
        priority = torch.rand(count, generator=generator)
        chosen = priority.topk(min(count, self.most or count), sorted=False).indices
        return chosen, priority[chosen]

    def add(self, rows: torch.Tensor, priority: torch.Tensor | None = None) -> None:
        """Adds rows, (groups, rows, columns)."""
        if self.most is None:
            self.moments.add(rows, rows[..., :0])
            return
        assert priority is not None
        rows = torch.cat([self.kept, rows.double()], 1) if len(self.priority) else rows.double()
        priority = torch.cat([self.priority, priority])
        best = priority.topk(min(self.most, len(priority)), sorted=False).indices
        self.kept, self.priority = rows[:, best], priority[best]

    @property
    def gram(self) -> Gram:
        """The Gram matrix of the added rows."""
        return self.gram_of(centred=False)

    def gram_of(self, centred: bool) -> Gram:
        """The Gram matrix of the added rows, less their mean if `centred`."""
        if self.most is None:
            return Gram.of_moments(self.moments, centred)
        rows = self.kept - self.kept.mean(1, keepdim=True) if centred else self.kept
        return Gram(rows, False, len(self.priority), torch.zeros(len(rows), dtype=torch.double))
