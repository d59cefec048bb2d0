"""A survey of a program's axes for users: what can be pruned, what can't and why, and how many parameters that is."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.kinds import kind
from lobo_fx.axes.members import Member, members, parameters
from lobo_fx.errors import first_few
from lobo_fx.terminal.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AxisSummary", "Survey", "axis_table", "lock_table", "survey"]


@dataclasses.dataclass(frozen=True)
class AxisSummary:
    """One free axis.

    Attributes:
        size: number of positions.
        kind: what it is used as, one of `KINDS`.
        members: parameters and dimensions that it runs through, as `name[dim]`.
        parameters: how many parameters lie along it.
        spread: largest over smallest L2 norm of its positions; 1 where all are equal.
        inexact: why removing positions is more than zeroing them.
    """

    size: int
    kind: str
    members: tuple[str, ...]
    parameters: int
    spread: float
    inexact: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Survey:
    """All axes of a program.

    Attributes:
        axes: the free axes, those with most parameters first.
        locks: numbers of parameters that no free axis covers, by the reasons of their locks.
        half_locks: numbers of parameters that have both a free and a locked axis, by the reason of the lock.
        free_share: share of the parameters that a free axis covers.
        unknown: operators without a rule, with where they are called.
    """

    axes: tuple[AxisSummary, ...]
    locks: dict[str, int]
    half_locks: dict[str, int]
    free_share: float
    unknown: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def survey(inference: Inference) -> Survey:
    """Summarises what was inferred."""
    free = members(inference)
    locks: dict[str, int] = defaultdict(int)
    half: dict[str, int] = defaultdict(int)
    covered = everything = 0
    for parameter in inference.program.module.parameters():
        everything += parameter.numel()
        leaves = [leaf for axis in inference.stored.get(id(parameter), ()) for leaf in axis.leaves() if leaf.size != 1]
        if any(not leaf.locks for leaf in leaves):
            covered += parameter.numel()
            for reason in dict.fromkeys(next(iter(leaf.locks)) for leaf in leaves if leaf.locks):
                half[reason] += parameter.numel()
        else:
            reasons = dict.fromkeys(reason for leaf in leaves for reason in leaf.locks)
            one = "it is one value for all" if id(parameter) in inference.stored else "no operator reads it"
            locks["; ".join(list(reasons)[:2]) or one] += parameter.numel()
    axes = [_summary(leaf, found) for leaf, found in free.items()]
    axes.sort(key=lambda axis: -axis.parameters)
    share = covered / everything if everything else 0.0
    return Survey(tuple(axes), _ranked(locks), _ranked(half), share, dict(inference.unknown))


def _ranked(reasons: dict[str, int]) -> dict[str, int]:
    """Sorts reasons by the number of parameters, largest first."""
    return dict(sorted(reasons.items(), key=lambda entry: -entry[1]))


def _summary(leaf: Axis, found: list[Member]) -> AxisSummary:
    trained = parameters(found)
    energy = torch.stack([member.along(leaf, member.weight.square()) for member in trained]).sum(0)
    smallest, largest = float(energy.min()), float(energy.max())
    return AxisSummary(
        leaf.size,
        kind(leaf),
        tuple(f"{member.name}[{member.dim}]" for member in found),
        sum({member.name: member.tensor.numel() for member in trained}.values()),
        (largest / smallest) ** 0.5 if smallest else float("inf") if largest else 1.0,
        tuple(leaf.inexact),
    )


def axis_table(found: Survey) -> Table:
    """A line per free axis."""
    table = new_table("free axes", ["runs through", "size", "kind", "parameters", "importance spread", "removal"])
    for axis in found.axes:
        removal = "more than zeroing" if axis.inexact else "equals zeroing"
        table.add_row(
            first_few(axis.members, 4), str(axis.size), axis.kind, f"{axis.parameters:,}", f"{axis.spread:.2f}", removal
        )
    return table


def lock_table(found: Survey) -> Table:
    """A line per reason why parameters can't be pruned."""
    table = new_table("locked", ["reason", "parameters"])
    for reason, count in found.locks.items():
        table.add_row(reason, f"{count:,}")
    for reason, count in found.half_locks.items():
        table.add_row(f"along one dimension: {reason}", f"{count:,}")
    for operator, where in found.unknown.items():
        table.add_row(f"{operator} has no axis rule: {where}", "")
    return table
