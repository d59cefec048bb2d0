"""A sum of terms over widths of axes: what a network costs, each part by the few widths that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.call import Axes
from lobo_fx.axes.cost import count_positions, one_row_sizes, stored_tensors
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["Sum", "Term", "macs", "stored_bytes"]


@dataclasses.dataclass
class Term:
    """A part of a sum.

    Attributes:
        leaves: the axes that it depends on.
        value: of their widths.
        name: of the module that it is about.
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
    """Terms, and which of them a leaf has a part in.

    Args:
        leaves: whose widths are chosen.
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
        return [sum(term({**widths, leaf: width}) for term in self.of[leaf]) for width in options]


def macs(inference: Inference, leaves: Iterable[Axis]) -> Sum:
    """Multiply-accumulates of one row of the batch."""
    leaves, sizes = tuple(leaves), one_row_sizes(inference.program)
    chosen = set(leaves)

    def term(axes: tuple[Axis, ...]) -> Term:
        return Term(_within(axes, chosen), lambda widths: float(count_positions(axes, widths, sizes)))

    return Sum(leaves, map(term, inference.findings.products))


def stored_bytes(inference: Inference, leaves: Iterable[Axis], as_codes: bool) -> Sum:
    """Bytes of the tensors that the graph reads; with weights as 8-bit codes, of those with two or more dimensions."""
    leaves = tuple(leaves)
    chosen = set(leaves)
    terms = []
    for tensor in stored_tensors(inference):
        axes = inference.stored.get(id(tensor), ())
        is_code = as_codes and tensor.dim() > 1 and tensor.is_floating_point()
        each, whole = 1 if is_code else tensor.element_size(), tensor.numel()

        def value(widths: Mapping[Axis, int], axes: Axes = axes, each: int = each, whole: int = whole) -> float:
            return float(each * (count_positions(axes, widths) if axes else whole))

        terms.append(Term(_within(axes, chosen), value))
    return Sum(leaves, terms)


def _within(axes: Iterable[Axis], chosen: Collection[Axis]) -> tuple[Axis, ...]:
    """The leaves of axes that are chosen, each once."""
    return tuple(dict.fromkeys(leaf for axis in axes for leaf in axis.leaves() if leaf in chosen))
