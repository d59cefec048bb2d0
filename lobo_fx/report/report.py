"""The report: a row per pass, then the files and their latency; as a table, markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder, file_name, write_files
from lobo_fx.graph.notes import Note, brief, gathered, notes_from_json
from lobo_fx.measures.latency import Benchmark, benchmark_table
from lobo_fx.measures.machine import machine, versions
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.report.charts import can_draw, draw
from lobo_fx.report.dashboards import dashboards
from lobo_fx.report.figures import Conditions, Figures
from lobo_fx.report.html import can_render, report_page
from lobo_fx.report.json import (
    artifact_from_json,
    artifact_is_there,
    as_json,
    benchmark_from_json,
    candidate_from_json,
    module_from_json,
    row_from_json,
    sheet_from_json,
)
from lobo_fx.report.records import AxisRow, CandidateRow, ModuleRow, Row, Sheet
from lobo_fx.report.schema import SCHEMA
from lobo_fx.report.text import artifact_table, axis_table, pass_table, settings_table, sheet_table
from lobo_fx.terminal.tables import escape, printable, render, to_markdown

__all__ = ["LEADER", "PAGE", "REPORT_FILES", "Report", "plain_cell"]

LEADER, PAGE = "report.json", "report.html"
REPORT_FILES = ("report.md", "report.csv", PAGE, LEADER)

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclasses.dataclass
class Report:
    """What was done to a model, and its figures before and after.

    Attributes:
        model: name of the model's class, or its path.
        rows: the original, then one row per pass.
        notes: what a user should know, such as what was left alone and why.
        artifacts: files written, by label.
        benchmark: latencies, once measured.
        sheets: tables that passes added.
        candidates: the candidates of searches.
        axes: the axes that structured pruning cut.
        settings: name and settings of every pass, in order.
        seed: seed of all random draws; None where it is not known.
        machine: machine that the figures were measured on.
        versions: versions of the packages that they were measured with.
        modules: figures of each module before and after; `Result.save_node_data` adds their times.
    """

    model: str
    rows: list[Row]
    notes: list[Note] = dataclasses.field(default_factory=list)
    artifacts: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    benchmark: Benchmark | None = None
    sheets: list[Sheet] = dataclasses.field(default_factory=list)
    candidates: list[CandidateRow] = dataclasses.field(default_factory=list)
    axes: list[AxisRow] = dataclasses.field(default_factory=list)
    settings: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    seed: int | None = None
    machine: str = dataclasses.field(default_factory=machine)
    versions: dict[str, str] = dataclasses.field(default_factory=versions)
    modules: list[ModuleRow] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, verbose: bool = False) -> str:
        """The tables and notes for a terminal.

        Args:
            verbose: also lists every setting of every pass, even at its default, and operators and lines in notes.
        """
        tables = [pass_table(self.model, self.rows)]
        if self.artifacts:
            tables.append(artifact_table(self.artifacts))
        if self.benchmark:
            tables.append(benchmark_table(self.benchmark))
        if verbose and self.settings:
            tables.append(settings_table(self.settings))
        notes = (gathered if verbose else brief)(self.all_notes)
        return "".join(map(render, tables)) + "".join(f"note: {printable(note)}\n" for note in notes)

    @property
    def all_notes(self) -> list[str]:
        """The notes, and signs that the machine was busy during the benchmark."""
        return [*self.notes, *(self.benchmark.busy if self.benchmark else ())]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data with raw numbers, as in docs/report_schema.json; `from_json` reads it back."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "machine": self.machine,
            "versions": self.versions,
            "seed": self.seed,
            "settings": as_json(self.settings),
            "passes": as_json(self.rows),
            "notes": as_json(self.notes),
            "sheets": as_json(self.sheets),
            "modules": as_json(self.modules),
            "candidates": as_json(self.candidates),
            "axes": as_json(self.axes),
            "artifacts": as_json(self.artifacts),
            "benchmark": as_json(self.benchmark),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], check_files: bool = True) -> Report:
        """Reads `as_json` back.

        Args:
            saved: result of `as_json`.
            check_files: leaves out artifacts whose files no longer exist, or have another size.

        Raises:
            InvalidInput: the report was written under another schema.
        """
        if saved.get("schema") != SCHEMA:
            raise InvalidInput(f"the report has schema {saved.get('schema')}; this version reads schema {SCHEMA}")
        artifacts = {label: artifact_from_json(entry) for label, entry in saved["artifacts"].items()}
        return cls(
            saved["model"],
            [row_from_json(row) for row in saved["passes"]],
            notes_from_json(saved["notes"]),
            {label: one for label, one in artifacts.items() if not check_files or artifact_is_there(one)},
            None if saved["benchmark"] is None else benchmark_from_json(saved["benchmark"]),
            [sheet_from_json(sheet) for sheet in saved["sheets"]],
            [candidate_from_json(candidate) for candidate in saved["candidates"]],
            [AxisRow(**axis) for axis in saved["axes"]],
            [(name, settings) for name, settings in saved["settings"]],
            saved["seed"],
            saved["machine"],
            saved["versions"],
            [module_from_json(module) for module in saved.get("modules", [])],
        )

    def to_json(self) -> str:
        """`as_json` as text."""
        return json.dumps(self.as_json(), indent=2)

    def to_csv(self) -> str:
        """The rows with raw numbers; text that a spreadsheet would take for a formula gets an apostrophe in front."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: plain_cell(cell) for name, cell in dataclasses.asdict(row).items()} for row in self.rows
        )
        return stream.getvalue()

    def to_markdown(self) -> str:
        """The tables as GitHub markdown."""
        parts = [f"# {escape(self.model)}\n"]
        tables = [("Passes", pass_table(self.model, self.rows))]
        if self.artifacts:
            tables.append(("Files", artifact_table(self.artifacts)))
        if self.benchmark:
            tables.append(("Latency", benchmark_table(self.benchmark)))
        tables += [("Axes", axis_table(self.axes))] if self.axes else []
        tables += [(sheet.title.capitalize(), sheet_table(sheet)) for sheet in self.sheets]
        parts += [f"## {escape(title)}\n\n{to_markdown(table)}" for title, table in tables]
        if self.all_notes:
            parts.append("## Notes\n\n" + "".join(f"- {escape(note)}\n" for note in gathered(self.all_notes)))
        packages = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        seed = "" if self.seed is None else f"; seed {self.seed}"
        parts.append(f"Measured on {escape(self.machine)}, with {escape(packages)}{seed}.\n")
        return "\n".join(parts)

    def figures(self, name: str = "compiled") -> Figures:
        """The figures that runs are compared by."""
        measured = self.benchmark
        runtime = ("", None, None) if measured is None else (measured.runtime, measured.threads, measured.batch)
        conditions = Conditions(self.machine, self.versions, self.seed, *runtime)
        return Figures.of(name, self.model, self.rows, self.artifacts, measured, conditions)

    def to_html(self) -> str:
        """A single self-contained page for browsers, phones and print; jinja2 must be installed."""
        return report_page(self.as_json())

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `report.md`, `report.csv`, `report.json` and, with jinja2, `report.html` into `folder`.

        `report.json` is replaced last, and holds the SHA-256 of the others under `files`. If matplotlib is installed,
        pictures are also written: an overview, a comparison with the original, and one of each sheet.

        Raises:
            InvalidInput: the folder can't be made or written to; older reports are left as they were.
        """
        check_folder(Path(folder))
        markdown, table, *_ = REPORT_FILES
        files = {markdown: self.to_markdown().encode(), table: self.to_csv().encode()}
        if can_render():
            files[PAGE] = self.to_html().encode()
        if can_draw():
            files |= dashboards([self.figures()])
            for sheet in self.sheets:  # of two passes that add the same one, the second is numbered
                stem = file_name(sheet.title)
                alike = sum(re.fullmatch(rf"{re.escape(stem)}( \d+)?\.png", name) is not None for name in files)
                files[f"{stem} {alike + 1}.png" if alike else f"{stem}.png"] = draw(sheet)
        checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        saved = json.dumps(self.as_json() | {"files": checksums}, indent=2)
        return write_files(Path(folder), {**files, LEADER: saved})


def plain_cell(cell: Any) -> Any:
    """A cell for spreadsheets: text that would be taken for a formula gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
