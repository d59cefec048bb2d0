"""Widths that the scopes of `PruneChannels` would choose (equal shares and others), cut as far as measured files need.

The cost of a file is predicted from earlier files of the same scope: along one line of widths that is more accurate
than a model of all widths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from lobo_fx.passes.goal.correction import NEAR, Correction, tolerated
from lobo_fx.passes.goal.costs import Precision
from lobo_fx.passes.goal.programs import Programs
from lobo_fx.passes.pruning.search import SCOPES, Candidates, Search
from lobo_fx.passes.pruning.widths import Widths

__all__ = ["cut_by_scopes"]

_FILES, _PART, _STEPS = 3, 0.15, 64
"""Most files measured for a scope, the part of the time for all scopes, and into how many steps shares are divided."""


def cut_by_scopes(
    programs: Programs, precision: Precision, candidates: Candidates, limits: Mapping[str, float], until: float
) -> Iterator[Widths]:
    """For every scope, the widths of the smallest share removed whose file was measured to hold the limits.

    Args:
        programs: makes and measures the files.
        precision: precision of the files.
        candidates: the axes that are free, with their scores.
        limits: limits as shares of the original's.
        until: when the search ends, on the monotonic clock; scopes take a part of the time that is left.
    """
    now = time.monotonic()
    until = now + _PART * (until - now)
    for scope in SCOPES:
        known = {name: Correction.of(name) for name in limits}
        best: Widths | None = None
        for file in range(_FILES if time.monotonic() < until else 0):
            widths = _least_cut(programs, precision, Search(scope, 1, 1), candidates, limits, known if file else None)
            if widths is None or widths == best:
                break
            measured = programs.measure_structure(precision, widths)
            taken = []
            for name, limit in limits.items():
                value = measured.get(name, programs.costs.expected(precision, name, widths))
                known[name].learn(precision.costs[name](widths), value)
                taken.append(value / tolerated(name, limit))
            if max(taken) <= 1:
                best = widths
                if max(taken) > 1 - NEAR:
                    break
        if best is not None:
            yield best


def _least_cut(
    programs: Programs,
    precision: Precision,
    search: Search,
    candidates: Candidates,
    limits: Mapping[str, float],
    known: Mapping[str, Correction] | None,
) -> Widths | None:
    """The widths of the smallest share expected to hold the limits, by files of the scope if there are any."""
    for step in range(1, _STEPS):
        shares = search.shares(candidates, step / _STEPS)
        widths = programs.costs.whole | {
            leaf: _nearest(precision.options[leaf], leaf.size * (1 - share)) for leaf, share in shares.items()
        }
        expected = {
            name: known[name](precision.costs[name](widths))
            if known is not None
            else programs.costs.expected(precision, name, widths)
            for name in limits
        }
        if all(expected[name] <= limit for name, limit in limits.items()):
            return widths
    return None


def _nearest(options: Sequence[int], width: float) -> int:
    return min(options, key=lambda option: abs(option - width))
