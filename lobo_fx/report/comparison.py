"""Any number of runs side by side: rankings, the best of each category, recommendations; in every form of a report."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder, write_files
from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.report.advice import Advice, advise
from lobo_fx.report.charts import can_draw
from lobo_fx.report.comparison_page import comparison_page
from lobo_fx.report.dashboards import dashboards
from lobo_fx.report.figures import METRICS, Figures, Metric, front, quality_metric, ranking_metric
from lobo_fx.report.html import can_render
from lobo_fx.report.plain_charts import charts_of
from lobo_fx.report.reading import read_report
from lobo_fx.report.report import Report, plain_cell
from lobo_fx.terminal.tables import escape, new_table, printable, render, to_markdown

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "compare"]

_NOT_MEASURED = "not measured"
_DERIVED = ("share", "faster", "change", "kept", "removed", "gain", "efficiency")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs and what their figures say beside each other.

    Attributes:
        reports: by name of the run.
    """

    reports: dict[str, Report]

    @property
    def runs(self) -> list[Figures]:
        """The figures of every run."""
        return [report.figures(name) for name, report in self.reports.items()]

    @property
    def metrics(self) -> list[Metric]:
        """What runs are ranked by."""
        return [METRICS["size"], METRICS["speed"], quality_metric(self.runs), ranking_metric(self.runs)]

    @property
    def front(self) -> list[Figures]:
        """Runs that no other one beats in size, speed and quality alike."""
        return front(self.runs, ["size", "speed", quality_metric(self.runs).name])

    @property
    def advice(self) -> list[Advice]:
        """Recommendations that follow from the figures."""
        return advise(self.runs)

    @property
    def warnings(self) -> list[str]:
        """In what the runs differ so that their figures are not of one kind."""
        reports = list(self.reports.values())
        measured = [report.benchmark for report in reports if report.benchmark is not None]
        kinds = {
            "models": {report.model for report in reports},
            "machines": {report.machine for report in reports},
            "runtimes": {one.runtime for one in measured},
            "numbers of threads": {str(one.threads) for one in measured},
            "batch sizes": {str(one.batch) for one in measured},
        }
        return [
            f"the runs have different {kind} ({', '.join(sorted(found))}): "
            "compare shares and ratios, not sizes and times"
            for kind, found in kinds.items()
            if len(found) > 1
        ]

    def _table(self) -> Table:
        columns = ["run", "MB", "of original", "p50 ms", "times as fast", "score", "score change", "SNR dB"]
        table = new_table("runs", [*columns, "params gone", self.metrics[-1].name])
        for run in self.runs:
            table.add_row(
                run.name,
                _shown(run.bytes, "{:.2f}", MEGABYTE),
                _shown(run.share, "{:.3f}"),
                _shown(run.milliseconds, "{:.3f}"),
                _shown(run.faster, "{:.2f}"),
                _shown(run.score, "{:.4g}"),
                _shown(run.change, "{:+.4g}"),
                "=" if run.decibels == float("inf") else _shown(run.decibels, "{:.1f}"),
                _shown(run.removed, "{:.1%}"),
                _shown(self.metrics[-1].of(run), "{:.2f}"),
            )
        return table

    def _ranking(self) -> Table:
        table = new_table("ranking", ["place", *(metric.name for metric in self.metrics)])
        ranked = [metric.ranked(self.runs) for metric in self.metrics]
        for place in range(len(self.reports)):
            cells = [
                f"{found[place].name} ({metric.shown(found[place])})" if place < len(found) else ""
                for metric, found in zip(self.metrics, ranked, strict=True)
            ]
            if any(cells):
                table.add_row(str(place + 1), *cells)
        return table

    def _trade_off(self) -> Table:
        quality = quality_metric(self.runs)
        table = new_table("trade-off: no other run beats these", ["run", "size", "speed", quality.name])
        for run in METRICS["speed"].ranked(self.front):
            table.add_row(run.name, *(METRICS[name].shown(run) for name in ("size", "speed", quality.name)))
        return table

    def _tables(self) -> list[Table]:
        return [self._table(), self._ranking(), *([self._trade_off()] if self.front else [])]

    def __str__(self) -> str:
        said = [*(f"{advice}" for advice in self.advice), *(f"note: {warning}" for warning in self.warnings)]
        return "".join(map(render, self._tables())) + "".join(f"{printable(line)}\n" for line in said)

    def charts(self, width: int = 80) -> str:
        """Bar charts of characters."""
        return charts_of(self.runs, width)

    def to_markdown(self) -> str:
        """The tables, recommendations and notes as GitHub markdown."""
        meanings = "".join(f"- {metric.name}: {metric.meaning}\n" for metric in self.metrics)
        parts = ["# Comparison\n", *map(to_markdown, self._tables()), meanings]
        if self.advice:
            parts.append("## Recommendations\n\n" + "".join(f"- {escape(str(advice))}\n" for advice in self.advice))
        if self.warnings:
            parts.append("## Notes\n\n" + "".join(f"- {escape(warning)}\n" for warning in self.warnings))
        machines = dict.fromkeys(report.machine for report in self.reports.values())
        return "\n".join([*parts, "".join(f"Measured on {escape(machine)}.\n" for machine in machines)])

    def as_json(self) -> dict[str, Any]:
        """The figures of every run, the front, recommendations and warnings as plain data."""
        names = [*(field.name for field in dataclasses.fields(Figures)), *_DERIVED]
        return {
            "runs": [{name: getattr(run, name) for name in names} for run in self.runs],
            "front": [run.name for run in self.front],
            "advice": [dataclasses.asdict(advice) for advice in self.advice],
            "warnings": self.warnings,
        }

    def to_csv(self) -> str:
        """A line per run, raw numbers, nothing where nothing was measured."""
        stream = io.StringIO()
        rows = self.as_json()["runs"]
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: plain_cell(cell) for name, cell in row.items()} for row in rows)
        return stream.getvalue()

    def to_html(self) -> str:
        """One page that needs nothing beside it; jinja2 must be installed."""
        return comparison_page(self.reports, self.runs, self.metrics, self.front, self.advice, self.warnings)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `comparison.md` and `comparison.csv`, with jinja2 `comparison.html`, with matplotlib pictures.

        Raises:
            InvalidInput: the folder can't be made or written to; older files are left as they were.
        """
        check_folder(Path(folder))
        files: dict[str, str | bytes] = {"comparison.csv": self.to_csv(), "comparison.md": self.to_markdown()}
        if can_render():
            files["comparison.html"] = self.to_html()
        if can_draw():
            files |= dashboards(self.runs)
        return write_files(Path(folder), files)


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Reads the runs that `lobo-fx compile -o` or `Report.save` wrote to folders.

    Args:
        folders: one for each run; its name is the run's, or its path where names are alike.

    Raises:
        InvalidInput: there is none, a folder is given twice, or it has no report of this version.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise InvalidInput("give one or more folders of runs")
    if len({path.resolve() for path in paths}) < len(paths):
        raise InvalidInput("a run is given twice")
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return Comparison({name: read_report(path) for name, path in zip(names, paths, strict=True)})


def _shown(value: Any, unit: str, by: float = 1) -> str:
    return _NOT_MEASURED if value is None else unit.format(value / by)
