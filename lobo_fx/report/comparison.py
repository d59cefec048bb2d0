"""Compares any number of runs: rankings, the best of each group, recommendations; in every form of a report."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder, file_name, write_files
from lobo_fx.report.advice import Advice
from lobo_fx.report.cells import Grid, Source
from lobo_fx.report.charts import can_draw, draw_curve
from lobo_fx.report.comparison_page import comparison_page
from lobo_fx.report.curves import Curve, removal_curve
from lobo_fx.report.dashboards import dashboards
from lobo_fx.report.family import Family
from lobo_fx.report.figures import METRICS, Figures, families
from lobo_fx.report.grids import sheet_grids
from lobo_fx.report.html import can_render
from lobo_fx.report.json import as_json
from lobo_fx.report.plain_charts import charts_of
from lobo_fx.report.reading import read_report
from lobo_fx.report.records import Sheet
from lobo_fx.report.report import Report, plain_cell
from lobo_fx.report.run_grids import best_grid, grid_table, ranking_grid, runs_grid, trade_off_grid
from lobo_fx.terminal.tables import escape, printable, render, to_markdown

__all__ = ["COMPARISON_FILES", "Comparison", "compare", "read_runs"]

COMPARISON_FILES = ("comparison.md", "comparison.csv", "comparison.json", "comparison.html")

_UNSTEADY = 1.3
"""Largest ratio of an original's latencies in two runs before a warning."""

_DERIVED = ("share", "faster", "change", "kept", "removed", "gain", "efficiency")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs, and what follows from their figures together.

    Attributes:
        runs: their figures; names differ within a model.
        title: heading.
        score: meaning of the score, in words.
        remarks: what a reader should know beforehand.
        sheets: further tables.
        curves: figures measured along another, such as an error rate over a noise level.
    """

    runs: Sequence[Figures]
    title: str = "Comparison"
    score: str = METRICS["score"].meaning
    remarks: Sequence[str] = ()
    sheets: Sequence[Sheet] = ()
    curves: Sequence[Curve] = ()

    @classmethod
    def of(cls, reports: Mapping[str, Report]) -> Comparison:
        """The comparison of reports, by name of the run."""
        return cls([report.figures(name) for name, report in reports.items()])

    @property
    def families(self) -> list[Family]:
        """The runs of each model, if every model has several; else all runs as one family."""
        found = [(places, [self.runs[place] for place in places]) for places in families(self.runs)]
        return [
            Family(runs[0].model if len(found) > 1 else "", places, runs, self.score) for places, runs in found if runs
        ]

    @property
    def advice(self) -> list[Advice]:
        """Recommendations that follow from the figures, family by family."""
        return [advice for family in self.families for advice in family.advice]

    @property
    def warnings(self) -> list[str]:
        """Conditions in which runs differ, so that some of their figures can't be compared."""
        conditions = [run.conditions for run in self.runs]
        kinds: dict[str, set[str]] = {
            "models": {run.model for run in self.runs} if len(self.families) == 1 else set(),
            "machines": {one.machine for one in conditions} - {""},
            "runtimes": {one.runtime for one in conditions} - {""},
            "numbers of threads": {str(one.threads) for one in conditions if one.threads is not None},
            "batch sizes": {str(one.batch) for one in conditions if one.batch is not None},
        }
        return [
            f"the runs have different {kind} ({', '.join(sorted(found))}): "
            "compare shares and ratios, not sizes and times"
            for kind, found in kinds.items()
            if len(found) > 1
        ] + [text for family in self.families if (text := _unsteady(family.runs))]

    @property
    def tally(self) -> str:
        """How many runs succeeded and failed, as a sentence."""
        models, failed = len({run.model for run in self.runs}), sum(bool(run.fault) for run in self.runs)
        of = f" of {models} models" if models > 1 else ""
        return f"{len(self.runs)} runs{of}: {len(self.runs) - failed} came through, {failed} failed."

    @property
    def all_curves(self) -> list[Curve]:
        """The given curves, and those of speed and quality over the removed share, where runs differ in it."""
        derived = [
            removal_curve(family.runs, metric, family.name)
            for family in self.families
            for metric in (METRICS["speed"], family.quality)
        ]
        return [*self.curves, *(curve for curve in derived if curve is not None)]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, raw numbers."""
        return {
            "title": self.title,
            "score": self.score,
            "remarks": list(self.remarks),
            "runs": as_json(self.runs),
            "sheets": as_json(self.sheets),
            "curves": as_json(self.all_curves),
        }

    def _grids(self, source: Source, family: Family) -> list[Grid]:
        grids = [
            runs_grid(source, family.places, self.runs),
            best_grid(family.runs, family.metrics),
            ranking_grid(family.runs, family.metrics),
            trade_off_grid(family.front, family.quality),
        ]
        return [grid for grid in grids if grid.rows]

    def _sheets(self) -> list[Grid]:
        """The sheets, and the curves as tables."""
        sheets = [*self.sheets, *(curve.sheet for curve in self.curves)]
        return sheet_grids(Source({"sheets": as_json(sheets)}))

    def __str__(self) -> str:
        source = Source(self.as_json())
        parts = [f"{printable(line)}\n" for line in (self.title, *self.remarks, self.tally)]
        for family in self.families:
            parts += [f"\n{printable(family.name)}\n{'=' * len(family.name)}\n"] if family.name else []
            parts += [render(grid_table(grid)) for grid in self._grids(source, family)]
            parts += [f"{printable(str(advice))}\n" for advice in family.advice]
        parts += [render(grid_table(grid)) for grid in self._sheets()]
        return "".join([*parts, *(f"note: {printable(warning)}\n" for warning in self.warnings)])

    def charts(self, width: int = 80) -> str:
        """Bar charts made of characters."""
        return "\n".join(charts_of(family.runs, width, family.name) for family in self.families)

    def to_markdown(self) -> str:
        """The tables, recommendations and notes as GitHub markdown."""
        source = Source(self.as_json())
        parts = [f"# {escape(self.title)}\n", *(f"{escape(remark)}\n" for remark in self.remarks), f"{self.tally}\n"]
        for family in self.families:
            parts += [f"## {escape(family.name)}\n"] if family.name else []
            parts += [to_markdown(grid_table(grid)) for grid in self._grids(source, family)]
            parts.append("".join(f"- {metric.name}: {escape(metric.meaning)}\n" for metric in family.metrics))
            if advices := family.advice:
                level = "###" if family.name else "##"
                said = "".join(f"- {escape(str(advice))}\n" for advice in advices)
                parts.append(f"{level} Recommendations\n\n{said}")
        parts += [f"## {escape(grid.title)}\n\n{to_markdown(grid_table(_untitled(grid)))}" for grid in self._sheets()]
        if self.warnings:
            parts.append("## Notes\n\n" + "".join(f"- {escape(warning)}\n" for warning in self.warnings))
        conditions = dict.fromkeys(str(run.conditions) for run in self.runs)
        return "\n".join([*parts, "".join(f"Measured on {escape(one)}.\n" for one in conditions if one)])

    def to_csv(self) -> str:
        """A line per run with raw numbers; empty where nothing was measured."""
        stream = io.StringIO()
        names = [field.name for field in dataclasses.fields(Figures) if field.name != "conditions"]
        conditions = ("machine", "runtime", "threads", "batch")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*names, *_DERIVED, *conditions])
        for run in self.runs:
            cells = [getattr(run, name) for name in (*names, *_DERIVED)]
            writer.writerow(map(plain_cell, [*cells, *(getattr(run.conditions, name) for name in conditions)]))
        return stream.getvalue()

    def to_html(self) -> str:
        """A single self-contained page; jinja2 must be installed."""
        return comparison_page(
            Source(self.as_json()), self.families, self.runs, self.all_curves, self.warnings, self.tally
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `comparison.md`, `.csv` and `.json`; with jinja2 `comparison.html`; with matplotlib pictures.

        Each given sheet and curve gets a CSV file, each curve a picture, and each family its dashboards.

        Raises:
            InvalidInput: the folder can't be made or written to; older files are left as they were.
        """
        check_folder(Path(folder))
        markdown, table, record, page = COMPARISON_FILES
        files: dict[str, str | bytes] = {
            markdown: self.to_markdown(),
            table: self.to_csv(),
            record: json.dumps(self.as_json(), indent=1),
        }
        for title, sheet in [(sheet.title, sheet) for sheet in self.sheets] + [(c.title, c.sheet) for c in self.curves]:
            files[_free(f"{file_name(title)}.csv", files)] = _sheet_csv(sheet)
        if can_render():
            files[page] = self.to_html()
        if can_draw():
            for family in self.families:
                pictures = dashboards(family.runs)
                for name, picture in pictures.items():
                    files[_free(_of_model(name, family.name), files)] = picture
            for curve in self.all_curves:
                files[_free(_of_model(f"{curve.title}.png", curve.model), files)] = draw_curve(curve)
        return write_files(Path(folder), files)


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Reads the runs that `lobo-fx compile -o` or `Report.save` wrote to folders.

    Args:
        folders: one for each run; its name is the run's, or its path if names repeat.

    Raises:
        InvalidInput: there is none, a folder is given twice, or it has no report of this version.
    """
    return Comparison.of(read_runs(folders))


def read_runs(folders: Sequence[str | Path]) -> dict[str, Report]:
    """The reports for `compare`, by name of the run; refuses the same folders as `compare`."""
    if isinstance(folders, (str, Path)):
        raise InvalidInput(f"folders is '{folders}'; expected a list, as ['{folders}']")
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise InvalidInput("give one or more folders of runs")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InvalidInput("a run is given twice")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return {name: read_report(path) for name, path in zip(names, paths, strict=True)}


def _unsteady(runs: Sequence[Figures]) -> str:
    """A warning if the same original took different times in several runs, as on a machine with other work."""
    times = [run.original_milliseconds for run in runs if run.original_milliseconds is not None]
    if len({run.model for run in runs}) > 1 or not times or max(times) < _UNSTEADY * min(times):
        return ""
    return (
        f"the original of {runs[0].model} took {min(times):.3g} to {max(times):.3g} ms: other work slowed some runs; "
        "compare times as fast, which are measured in turn, not milliseconds"
    )


def _untitled(grid: Grid) -> Grid:
    return dataclasses.replace(grid, title="")


def _of_model(name: str, model: str) -> str:
    """The name of a picture, with the model's name if there are several models."""
    stem, _, suffix = name.rpartition(".")
    return f"{file_name(f'{model} {stem}'.strip())}.{suffix}"


def _free(name: str, taken: Container[str]) -> str:
    """A name that is not taken yet; if it is, a number is added."""
    stem, _, suffix = name.rpartition(".")
    numbers = (f"{stem} {number}.{suffix}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbers) if one not in taken)


def _sheet_csv(sheet: Sheet) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(plain_cell, sheet.columns))
    writer.writerows([plain_cell(cell) for cell in row] for row in sheet.rows)
    return stream.getvalue()
