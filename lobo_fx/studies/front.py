"""The outcome of a study: its front as a table, JSON and recipes."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobo_fx.contracts.passbase import Pass
from lobo_fx.files import write_files
from lobo_fx.recipe import read_recipe
from lobo_fx.report.json import as_json
from lobo_fx.report.records import Sheet
from lobo_fx.studies.objectives import OBJECTIVES
from lobo_fx.terminal.tables import escape, new_table, printable, render, to_markdown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FRONT_FILES", "Front", "FrontPoint", "undominated"]

FRONT_FILES = ("front.md", "front.json")
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """A trial that was measured.

    Attributes:
        trial: its number in the study.
        measured: by name, the objectives and what else was measured.
        choices: by choice of the space, what was chosen.
        recipe: its recipe, as YAML.
        machine: where it was measured.
    """

    trial: int
    measured: dict[str, float]
    choices: dict[str, Any]
    recipe: str
    machine: str = ""

    @property
    def file(self) -> str:
        """Name of the recipe's file."""
        return f"trial_{self.trial}.yaml"

    @property
    def passes(self) -> list[Pass]:
        """The passes of its recipe."""
        return read_recipe(self.recipe, self.file)

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in self.choices.items()
        )


@dataclasses.dataclass(frozen=True)
class Front:
    """The trials of a study that no other one beats in every objective.

    Attributes:
        study: name of the study.
        model: the compiled model.
        objectives: the objectives that trials are compared by.
        points: the front, the best in the first objective first.
        trials: how many trials came to an outcome.
        refused: by number, why a trial's model can't be compiled.
        errors: by number, why a trial failed.
        machines: where trials were measured.
        is_interrupted: whether Ctrl-C ended the search.
        notes: what else a reader must know.
    """

    study: str
    model: str
    objectives: tuple[str, ...]
    points: list[FrontPoint]
    trials: int
    refused: dict[int, str]
    errors: dict[int, str]
    machines: list[str]
    is_interrupted: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> FrontPoint:
        return self.points[index]

    @property
    def summary(self) -> list[str]:
        """How the trials went, in sentences, followed by the notes."""
        measured = self.trials - len(self.refused) - len(self.errors)
        said = [
            f"{self.trials} trials: {measured} measured, {len(self.refused)} refused, {len(self.errors)} failed; "
            f"{len(self.points)} on the front"
        ]
        for kind, reasons in (("refused", self.refused), ("failed", self.errors)):
            for reason, count in Counter(reasons.values()).most_common(_SHOWN):
                first = next(number for number in reasons if reasons[number] == reason)
                more = f" and {count - 1} more" if count > 1 else ""
                said.append(f"{kind}, trial {first}{more}: {reason}")
        if len(self.machines) > 1:
            said.append(f"measured on {len(self.machines)} kinds of machines: their ratios of latency may differ")
        return [*said, *self.notes]

    @property
    def sheet(self) -> Sheet:
        """The front as a sheet."""
        rows = [(point.trial, *(point.measured[name] for name in self.objectives), str(point)) for point in self.points]
        return Sheet("front", ("trial", *self.objectives, "choices"), tuple(rows))

    def __str__(self) -> str:
        return render(self._table()) + "".join(f"note: {printable(note)}\n" for note in self.summary)

    def _table(self) -> Table:
        table = new_table(f"{self.study}: {self.model}", ["choices", "trial", *self.objectives])
        for point in self.points:
            table.add_row(str(point), str(point.trial), *(f"{point.measured[name]:.4g}" for name in self.objectives))
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, raw numbers; those that are not finite as text."""
        points = [dataclasses.asdict(point) | {"file": point.file} for point in self.points]
        plain: dict[str, Any] = as_json(
            dataclasses.asdict(self)
            | {
                "objectives": {name: dataclasses.asdict(OBJECTIVES[name]) for name in self.objectives},
                "points": points,
            }
        )
        return plain

    def to_markdown(self) -> str:
        """The table and the notes as GitHub markdown."""
        meanings = "".join(
            f"- {name}: {OBJECTIVES[name].meaning}; {OBJECTIVES[name].direction.removesuffix('imize')}imized\n"
            for name in self.objectives
        )
        notes = "".join(f"- {escape(note)}\n" for note in self.summary)
        measured = "".join(f"Measured on {escape(machine)}.\n" for machine in self.machines)
        return f"# Front\n\n{to_markdown(self._table())}\n{meanings}\n## Notes\n\n{notes}\n{measured}"

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `front.md`, `front.json`, and a recipe for each point.

        `front.json` is replaced last, and names the recipes that are on the front.

        Raises:
            InvalidInput: the folder can't be created or written to.
        """
        files: dict[str, str | bytes] = {point.file: point.recipe for point in self.points}
        markdown, leader = FRONT_FILES
        plain = json.dumps(self.as_json(), indent=2, allow_nan=False)
        return write_files(Path(folder), {**files, markdown: self.to_markdown(), leader: plain})


def undominated(points: Sequence[FrontPoint], objectives: Sequence[str]) -> list[FrontPoint]:
    """The points that no other one beats, the best in the first objective first; of equal points, the first one."""
    signs = [-1 if OBJECTIVES[name].direction == "maximize" else 1 for name in objectives]
    costs = [tuple(s * p.measured[name] for s, name in zip(signs, objectives, strict=True)) for p in points]
    kept = [
        index
        for index, cost in enumerate(costs)
        if cost not in costs[:index]
        and not any(other != cost and all(o <= c for o, c in zip(other, cost, strict=True)) for other in costs)
    ]
    return [points[index] for index in sorted(kept, key=lambda index: costs[index])]
