"""How wide each axis stays: by a share, by patterns of names, or so that a target is hit."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.cost import COSTS
from lobo_fx.axes.members import Member
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.layers import LOOKUPS, weight_uses
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import is_call
from lobo_fx.passes.pruning.widths import Widths, best_positions, likeness, specificity

__all__ = ["SCOPES", "TARGET_TOLERANCE", "Candidates", "Patterns", "Search", "Target", "makers"]

SCOPES = ("axis", "global", "isomorphic")
TARGET_TOLERANCE = 0.02
_BISECTIONS = 24  # to 6e-8 of the ratio, finer than one position of any axis
_MOST_TRIED = 1000
"""Widths tried to hit a target."""
Chosen = TypeVar("Chosen", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The axes that may be cut.

    Attributes:
        members: what each runs through.
        scores: importance of its positions; the least important go first.
    """

    members: Mapping[Axis, Sequence[Member]]
    scores: Mapping[Axis, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Target:
    """A target of pruning.

    Attributes:
        of: the cost that is counted, one of `COSTS`.
        keep: the share of this cost that is to stay.
    """

    of: str
    keep: float

    def is_hit(self, share: float) -> bool:
        """Whether a share that stays is near enough."""
        return abs(share - self.keep) <= TARGET_TOLERANCE * self.keep


@dataclasses.dataclass(frozen=True)
class Search:
    """Chooses widths.

    Attributes:
        scope: which axes are ranked together, one of `SCOPES`.
        round_to: widths are multiples of this, where the axis is at least twice as wide.
        minimum: the least width of an axis.
    """

    scope: str
    round_to: int
    minimum: int

    def widths(self, shares: Mapping[Axis, float]) -> Widths:
        """How many positions of each leaf stay, given the share to remove."""
        return {leaf: self.width(leaf.size, share) for leaf, share in shares.items()}

    def width(self, size: int, share: float) -> int:
        """How many of `size` positions stay, given the share to remove."""
        if not share:
            return size
        stay = size * (1 - share)
        if size >= 2 * self.round_to:
            stay = max(self.round_to, self.round_to * math.floor(stay / self.round_to + 0.5))
        return min(size, max(self.minimum, 1, round(stay)))

    def shares(self, candidates: Candidates, ratio: float) -> dict[Axis, float]:
        """The share to remove from each leaf, so that `ratio` of all positions that are ranked together go.

        Scores of leaves that are ranked together are divided by each leaf's mean first: a layer of small weights is
        not less important than one of large weights.
        """
        scores = candidates.scores
        if self.scope == "axis":
            return dict.fromkeys(scores, ratio)
        ranked: dict[object, list[Axis]] = defaultdict(list)
        for leaf in scores:
            ranked["all" if self.scope == "global" else likeness(candidates.members[leaf])].append(leaf)
        shares: dict[Axis, float] = {}
        for leaves in ranked.values():
            scaled = {leaf: scores[leaf] / scores[leaf].mean().clamp_min(1e-300) for leaf in leaves}
            every = torch.cat(list(scaled.values()))
            threshold = every.quantile(ratio) if ratio else every.new_tensor(-math.inf)
            # Of positions with exactly the threshold's score, the same share goes everywhere.
            below, ties = (every < threshold).sum(), (every == threshold).sum()
            part = ((ratio * len(every) - below) / ties.clamp_min(1)).clamp(0, 1)
            shares |= {
                leaf: float((score < threshold).double().mean() + part * (score == threshold).double().mean())
                for leaf, score in scaled.items()
            }
        return shares

    def hit(self, candidates: Candidates, inference: Inference, target: Target) -> tuple[Widths, float]:
        """The widths whose cost comes nearest to the target, and the share that they keep.

        First, one ratio for all axes is bisected. As all axes then step to their next widths at once, the best widths
        found are improved by a best-first search, which moves one axis at a time.

        Raises:
            InvalidInput: the program has none of what the target counts.
        """
        cost = COSTS[target.of]
        whole = cost(inference, {})
        if not whole:
            raise InvalidInput(f"target={target.of!r}: the model has none, so no share of it can be kept")
        best: tuple[float, float, Widths] = (math.inf, 1.0, {})

        def try_out(widths: Widths) -> float:
            """The share that these widths keep; updates `best` if it is nearer to the target."""
            nonlocal best
            share = cost(inference, best_positions(candidates.scores, widths)) / whole
            best = min(best, (abs(share - target.keep), share, widths), key=lambda entry: entry[0])
            return share

        low, high = 0.0, 1.0
        try_out(self.widths(self.shares(candidates, high)))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_wide = try_out(self.widths(self.shares(candidates, middle))) > target.keep
            low, high = (middle, high) if too_wide else (low, middle)
        frontier, seen = [best], {tuple(best[2].values())}
        while frontier and best[0] > TARGET_TOLERANCE * target.keep / 2 and len(seen) < _MOST_TRIED:
            _, _, widths = frontier.pop(min(range(len(frontier)), key=lambda at: frontier[at][0]))
            for moved in self._neighbours(widths):
                if tuple(moved.values()) not in seen:
                    seen.add(tuple(moved.values()))
                    share = try_out(moved)
                    frontier.append((abs(share - target.keep), share, moved))
        return best[2], best[1]

    def _neighbours(self, widths: Widths) -> Iterator[Widths]:
        """The same widths with one axis a step wider or narrower."""
        for leaf, change in itertools.product(widths, (-1, 1)):
            unit = self.round_to if leaf.size >= 2 * self.round_to else 1
            width = widths[leaf] + change * unit
            if max(self.minimum, unit) <= width <= leaf.size:
                yield widths | {leaf: width}

    def setting_that_hits(self, candidates: Candidates, inference: Inference, target: Target) -> str:
        """The first setting, as `name=value`, that hits a target which this search misses; empty where none does."""
        others = (("round_to", 1), ("minimum", 1), *(("scope", scope) for scope in SCOPES))
        for name, value in others:
            changed = dataclasses.replace(self, **{name: value})  # type: ignore[arg-type]
            if changed != self and target.is_hit(changed.hit(candidates, inference, target)[1]):
                return f"{name}={value!r}"
        return ""


class Patterns(Generic[Chosen]):
    """Assigns patterns of module names to the things that modules belong to; the most specific match counts.

    Attributes:
        chosen: the pattern that counts for each thing.
        overridden: how often a less specific pattern matched too, by that pattern and the one that counts.
    """

    def __init__(self, patterns: Iterable[str], modules: Mapping[Chosen, Iterable[str]], wanted: str) -> None:
        """Matches patterns with names of modules.

        Args:
            patterns: patterns of module names.
            modules: the names of each thing that a pattern may count for.
            wanted: what those modules have, for the error message.

        Raises:
            InvalidInput: a pattern matches no module.
        """
        patterns = list(patterns)
        self.chosen: dict[Chosen, str] = {}
        self.overridden: Counter[tuple[str, str]] = Counter()
        matched: set[str] = set()
        for one, names in modules.items():
            matching = sorted((p for p in patterns if fnmatch.filter(names, p)), key=specificity, reverse=True)
            matched.update(matching)
            if matching:
                self.chosen[one] = matching[0]
                self.overridden.update((other, matching[0]) for other in matching[1:])
        for pattern in patterns:
            if pattern not in matched:
                near = suggestion(pattern, {name for names in modules.values() for name in names})
                raise InvalidInput(f"'{pattern}' matches no module with {wanted}; {near}")

    def note_overridden(self, context: Context, what: str) -> None:
        """Notes which patterns are overridden by more specific ones."""
        for (pattern, winner), count in self.overridden.items():
            context.note(f"'{pattern}' is overridden by '{winner}', which is more specific, on {count} {what}")


def makers(free: Mapping[Axis, Sequence[Member]], graph: fx.Graph) -> dict[Axis, set[str]]:
    """The modules whose output width each axis is."""
    outputs: dict[str, set[int]] = defaultdict(set)
    for node in graph.nodes:
        for use in weight_uses(node):
            outputs[str(use.read.target)].add(use.output_dim)
        table = weight_node(node.args[0]) if is_call(node, *LOOKUPS) else None
        if table is not None:
            outputs[str(table.target)].add(1)
    return {
        leaf: {m.name.rpartition(".")[0] for m in found if m.dim in outputs.get(m.name, (0,))}
        for leaf, found in free.items()
    }
