"""Widths of axes, and helpers to choose them: likeness of axes, patterns of names, the best positions."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from lobo_fx.axes import Axis
from lobo_fx.axes.members import Member
from lobo_fx.axes.removal import Removal

__all__ = [
    "Widths",
    "best_positions",
    "is_named",
    "likeness",
    "modules_above",
    "runs_through",
    "specificity",
]

Widths = dict[Axis, int]
"""How many positions of each leaf stay."""


def best_positions(scores: Mapping[Axis, torch.Tensor], widths: Widths) -> Removal:
    """Keeps the best of each leaf, as many as its width says."""
    removal: Removal = {}
    for leaf, stay in widths.items():
        if stay < leaf.size:
            removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool)
            removal[leaf][scores[leaf].argsort(descending=True, stable=True)[:stay]] = True
    return removal


def likeness(found: Sequence[Member]) -> tuple[tuple[str, int, int], ...]:
    """The kinds of parameters that a leaf runs through; leaves with equal kinds play the same part."""
    return tuple(sorted({(member.name.rpartition(".")[2], member.tensor.dim(), member.dim) for member in found}))


def specificity(pattern: str) -> tuple[bool, int]:
    """A name without wildcards is more specific than a pattern, and more letters are more than fewer."""
    letters = re.sub(r"\[[^\]]*\]|[*?]", "", pattern)
    return letters == pattern, len(letters)


def modules_above(parameter: str) -> list[str]:
    """`a.b.weight` → `a.b`, `a`."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[: at + 1]) for at in range(len(parts))]


def runs_through(found: Sequence[Member], pattern: str) -> bool:
    """Whether an axis runs through a parameter of this name, or of a module of this name."""
    return is_named((name for member in found for name in member.names), [pattern])


def is_named(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether a pattern matches one of these parameters, or a module that one is in."""
    above = {found for name in names for found in (name, *modules_above(name))}
    return any(fnmatch.filter(above, pattern) for pattern in patterns)
