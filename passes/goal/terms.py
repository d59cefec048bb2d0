"""The cost of a network as a sum of terms, each a function of few widths; and limits of such sums."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.call import Axes
from lobo_fx.axes.cost import count_positions, one_row_sizes, stored_tensors
from lobo_fx.axes.removal import size_with
from lobo_fx.passes.goal.ranks import RankAxis
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["Budget", "Sum", "Term", "constant", "macs", "stored_bytes"]

_ROUNDING = 1e-9
"""Relative tolerance of limits: rounding may put a sum of many shares of a whole above the whole."""


@dataclasses.dataclass
class Term:
    """A part of a sum.

    Attributes:
        leaves: the axes that it depends on.
        value: gives the term from their widths.
        name: name of the module that it is about.
    """

    leaves: tuple[Axis, ...]
    value: Callable[[Mapping[Axis, int]], float]
    name: str = ""

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, widths: Mapping[Axis, int]) -> float:
        key = tuple(widths[leaf] for leaf in self.leaves)
        if key not in self._known:
            self._known[key] = self.value(widths)
        return self._known[key]


class Sum:
    """A sum of terms, which knows the terms that depend on each leaf.

    Args:
        leaves: the leaves whose widths are chosen.
        terms: parts of the sum.
    """

    def __init__(self, leaves: Iterable[Axis], terms: Iterable[Term]) -> None:
        self.leaves, self.terms = tuple(leaves), tuple(terms)
        self.of: dict[Axis, list[Term]] = {leaf: [] for leaf in self.leaves}
        for term in self.terms:
            for leaf in term.leaves:
                self.of[leaf].append(term)

    def __call__(self, widths: Widths) -> float:
        """The whole sum."""
        return sum(term(widths) for term in self.terms)

    def scaled(self, factor: float) -> Sum:
        """The same sum times a factor."""
        return Sum(self.leaves, [Term(t.leaves, lambda w, t=t: factor * t(w), t.name) for t in self.terms])  # type: ignore[misc]

    def __add__(self, other: Sum) -> Sum:
        """Both sums, over the same leaves."""
        return Sum(self.leaves, [*self.terms, *other.terms])

    def along(self, leaf: Axis, options: Iterable[int], widths: Widths) -> list[float]:
        """The part that depends on one leaf, for each of its widths, the others as they are."""
        found, changed = [], dict(widths)
        for changed[leaf] in options:
            found.append(sum(term(changed) for term in self.of[leaf]))
        return found


@dataclasses.dataclass(frozen=True)
class Budget:
    """Sums over the same leaves, each with the most that it may be; all of these limits hold at once.

    Attributes:
        limits: a sum and its limit each.
    """

    limits: tuple[tuple[Sum, float], ...]

    @classmethod
    def of(cls, cost: Sum, most: float = 1.0) -> Budget:
        """A budget of one limit."""
        return cls(((cost, most),))

    def fits(self, widths: Widths) -> bool:
        """Whether every limit holds."""
        return all(share <= 1 + _ROUNDING for share in self.shares(widths))

    def shares(self, widths: Widths) -> list[float]:
        """How much of each limit is taken."""
        return [cost(widths) / max(most, sys.float_info.min) for cost, most in self.limits]

    def weighted(self, weights: Sequence[float]) -> Sum:
        """The shares as one sum, each with a weight."""
        scaled = [
            c.scaled(w / max(most, sys.float_info.min)) for w, (c, most) in zip(weights, self.limits, strict=True)
        ]
        return functools.reduce(operator.add, scaled)


def macs(inference: Inference, leaves: Iterable[Axis]) -> Sum:
    """Multiply-accumulates of one row of the batch."""
    leaves, sizes = tuple(leaves), one_row_sizes(inference.program)
    chosen = set(leaves)

    def term(axes: tuple[Axis, ...]) -> Term:
        return Term(_within(axes, chosen), lambda widths: float(count_positions(axes, widths, sizes)))

    return Sum(leaves, map(term, inference.findings.products))


def stored_bytes(
    inference: Inference, leaves: Iterable[Axis], bits: float | None = None, ranks: Iterable[RankAxis] = ()
) -> Sum:
    """Bytes of the tensors that the graph reads.

    Args:
        inference: axes of the program.
        leaves: the leaves whose widths are chosen.
        bits: bits that a weight takes as a code, if tensors of two or more dimensions are codes; else None.
        ranks: rank axes of layers that may become two.
    """
    leaves = tuple(leaves)
    chosen = set(leaves)
    lowered = {id(rank.candidate.weight): rank for rank in ranks}
    terms = []
    for tensor in stored_tensors(inference):
        axes, rank = inference.stored.get(id(tensor), ()), lowered.get(id(tensor))
        is_code = tensor.dim() > 1 and tensor.is_floating_point()
        each = bits / 8 if bits is not None and is_code else tensor.element_size()
        whole = tensor.numel()

        def value(
            widths: Mapping[Axis, int],
            axes: Axes = axes,
            each: float = each,
            whole: int = whole,
            rank: RankAxis | None = rank,
        ) -> float:
            low = None if rank is None else rank.lowered(widths)
            if rank is not None and low is not None:
                return float(each * low * (size_with(rank.outputs, widths) + size_with(rank.inputs, widths)))
            return float(each * (count_positions(axes, widths) if axes else whole))

        terms.append(Term((*_within(axes, chosen), *([rank.leaf] if rank is not None else [])), value))
    return Sum(leaves, terms)


def constant(leaves: Iterable[Axis], value: float) -> Sum:
    """A sum that no width changes."""
    return Sum(leaves, [Term((), lambda widths: value)])


def _within(axes: Iterable[Axis], chosen: Collection[Axis]) -> tuple[Axis, ...]:
    """The leaves of axes that are chosen, each once."""
    return tuple(dict.fromkeys(leaf for axis in axes for leaf in axis.leaves() if leaf in chosen))
