"""A pruning plan: which positions of which axes stay, and why, in names that hold for any checkpoint of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lobo_fx.axes import Axis, Inference, kind
from lobo_fx.axes.members import Member, members
from lobo_fx.axes.removal import Removal
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.files import read_json, written_beside
from lobo_fx.terminal.tables import new_table, render

__all__ = ["AxisCut", "PruningPlan"]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class AxisCut:
    """What stays of one axis.

    Attributes:
        name: the first parameter and dimension that the axis runs through, as `layer1.0.conv1.weight[0]`; where heads
            and their dimensions share it, `qkv.weight[0, 1]` is the second of them.
        members: all parameters and dimensions that it runs through, named alike, in graph order.
        kind: what the axis is used as, one of `lobo_fx.axes.KINDS`.
        before: its positions before the removal.
        kept: the positions that stay, in order.
        why: the criterion and the share that chose them.
    """

    name: str
    members: tuple[str, ...]
    kind: str
    before: int
    kept: tuple[int, ...]
    why: str

    @property
    def after(self) -> int:
        """How many positions stay."""
        return len(self.kept)


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """Every axis that is cut. Compare plans with `==`, print them, keep them in a file.

    A plan names axes by the parameters that they run through, so it fits any checkpoint of the same model.

    Attributes:
        cuts: one for each axis, in graph order.

    Example:
        ```python
        plan = PruneChannels(0.5).plan_for(program, context)
        plan.save("plan.json")
        lobo_fx.compile(other_checkpoint, [PruneChannels(plan="plan.json")])
        ```
    """

    cuts: tuple[AxisCut, ...]

    @classmethod
    def of(cls, inference: Inference, removal: Removal, why: Mapping[Axis, str]) -> PruningPlan:
        """The plan of a removal that was decided on a program's axes."""
        cuts = []
        for leaf, found in members(inference).items():
            if leaf in removal:
                names = _names(leaf, found)
                kept = tuple(removal[leaf].nonzero().flatten().tolist())
                cuts.append(AxisCut(names[0], names, kind(leaf), leaf.size, kept, why.get(leaf, "")))
        return cls(tuple(cuts))

    def removal(self, inference: Inference) -> Removal:
        """The plan in terms of a program's axes.

        Raises:
            InvalidInput: the program is not the plan's; the first difference is named.
        """
        leaves = {_names(leaf, found): leaf for leaf, found in members(inference).items()}
        by_name = {names[0]: names for names in leaves}
        removal: Removal = {}
        for cut in self.cuts:
            if cut.members not in leaves:
                raise InvalidInput(f"the plan does not fit this model: {_difference(cut, by_name)}")
            leaf = leaves[cut.members]
            if leaf.size != cut.before:
                raise InvalidInput(
                    f"the plan does not fit this model: {cut.name} is {leaf.size} wide, not {cut.before}"
                )
            removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool)
            removal[leaf][list(cut.kept)] = True
        return removal

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, beside its place first.

        Raises:
            InvalidInput: the path can't be written to.
        """
        path = Path(path)
        content = {"format": _FORMAT, "cuts": [dataclasses.asdict(cut) for cut in self.cuts]}
        with written_beside(path) as folder:
            (folder / path.name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Reads a plan.

        Raises:
            InvalidInput: no such file, or no plan.
        """
        content = read_json(Path(path))
        if content.get("format") != _FORMAT:
            raise InvalidInput(f"{path} is no pruning plan of format {_FORMAT}; PruningPlan.save writes one")
        if "integers" in content:
            raise InvalidInput(f"{path} is the plan of a goal, which is more than widths: FitGoal(plan=...) applies it")
        try:
            return cls.of_json(content["cuts"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{path} is no pruning plan ({type(error).__name__}: {error})") from None

    @classmethod
    def of_json(cls, entries: Any) -> PruningPlan:
        """Builds a plan from decoded JSON.

        Raises:
            ValueError: an axis keeps no positions, its positions are not in order or not in range, or it is cut twice.
                An entry that is no cut raises other built-in errors.
        """
        if not isinstance(entries, list):
            raise ValueError("cuts are no list")
        cuts = tuple(_cut(entry) for entry in entries)
        if len({cut.members for cut in cuts}) < len(cuts):
            raise ValueError("an axis is cut twice")
        return cls(cuts)

    def __repr__(self) -> str:
        return f"PruningPlan({len(self.cuts)} axes cut)"

    def __str__(self) -> str:
        table = new_table("pruning plan", ["axis", "runs through", "kind", "before", "after", "why"])
        for cut in self.cuts:
            more = f"{len(cut.members)} dimensions" if len(cut.members) > 1 else ""
            table.add_row(cut.name, more, cut.kind, str(cut.before), str(cut.after), cut.why)
        return render(table)


def _names(leaf: Axis, found: Sequence[Member]) -> tuple[str, ...]:
    """A name for each member: `name[dim]`, or `name[dim, part]` where several axes make up the dimension."""
    names = []
    for member in found:
        parts = list(dict.fromkeys(member.axes[member.dim].leaves()))
        part = f", {parts.index(leaf)}" if len(parts) > 1 else ""
        names.append(f"{member.name}[{member.dim}{part}]")
    return tuple(names)


def _cut(entry: Any) -> AxisCut:
    """A cut from JSON, its positions in range and in order."""
    before, kept = entry["before"], tuple(entry["kept"])
    if not all(type(number) is int for number in (before, *kept)):
        raise ValueError(f"the width and the positions of {entry['name']} are not all whole numbers")
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < before:
        raise ValueError(f"positions of {entry['name']} are none, not in order, or not in range")
    names = tuple(map(str, entry["members"]))
    return AxisCut(str(entry["name"]), names, str(entry["kind"]), before, kept, str(entry["why"]))


def _difference(cut: AxisCut, known: Mapping[str, tuple[str, ...]]) -> str:
    """The first difference between a cut and a program's axes, in words."""
    if cut.name not in known:
        return f"it has no free axis that starts at {cut.name}; {suggestion(cut.name, known)}"
    theirs = known[cut.name]
    odd = next((name for name in (*cut.members, *theirs) if (name in cut.members) != (name in theirs)), cut.name)
    return f"the axis of {cut.name} {'does not run' if odd in cut.members else 'runs'} through {odd}"
