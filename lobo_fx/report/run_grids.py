"""The tables of compared runs, for the terminal, markdown and the page alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lobo_fx.report.cells import NOT_MEASURED, Cell, Grid, Source, size_text
from lobo_fx.report.figures import METRICS, ROWS, Figures, Metric, quality_metric, ranking_metric
from lobo_fx.terminal.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PLACES", "best_grid", "grid_table", "ranking_grid", "runs_grid", "trade_off_grid"]

PLACES = 12
"""Most runs that a ranking lists."""

_NAME = 28
"""Least columns of the terminal for a name."""


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column: its title, figure, format, and divisor, and whether it is shown even if nothing was measured."""

    title: str
    name: str
    form: Any
    by: str = ""
    always: bool = False


_SIZES_AND_TIMES = (
    _Column("file", "bytes", size_text, always=True),
    _Column("times as small", "original_bytes", "{:.2f}", "bytes", always=True),
    _Column("gzip", "gzip_bytes", size_text),
    _Column("p50 ms", "milliseconds", "{:.3f}", always=True),
    _Column("times as fast", "original_milliseconds", "{:.2f}", "milliseconds", always=True),
    _Column("memory", "added_memory", size_text),
)
_QUALITY = (_Column("score", "score", "{:.4g}"), _Column("score kept", "score", "{:.2%}", "original_score"))
_COUNTS = (
    _Column("parameters", "parameters", "{:,}"),
    _Column("non-zero", "nonzero", "{:,}"),
    _Column("non-zero share", "nonzero", "{:.1%}", "parameters"),
    _Column("params left", "nonzero", "{:.1%}", "original_parameters"),
)


def runs_grid(source: Source, places: Sequence[int], runs: Sequence[Figures], name: str = "runs") -> Grid:
    """A line per run; columns without any figure are left out, except sizes, times and quality.

    Args:
        source: the data of the comparison.
        places: indices of the runs in it.
        runs: all runs of the comparison.
        name: name of the grid.
    """
    chosen = [runs[place] for place in places]
    quality, ranking = quality_metric(chosen), ranking_metric(chosen)
    rate = [_Column(f"{run.unit} a second", "rate", "{:,.1f}") for run in chosen if run.unit != ROWS][:1]
    decibels = _Column("SNR dB", "decibels", "{:.1f}", always=quality.name == "decibels")
    columns = [
        column
        for column in (*_SIZES_AND_TIMES, *rate, *_QUALITY, decibels, *_COUNTS, _Column("seconds", "seconds", "{:.1f}"))
        if column.always or any(getattr(run, column.name) is not None for run in chosen)
    ]
    named = {
        "model": len({run.model for run in chosen}) > 1,
        "group": any(run.group for run in chosen),
        "fault": any(run.fault for run in chosen),
    }
    rows = []
    for place, run in zip(places, chosen, strict=True):
        value = ranking.of(run)
        rows.append(
            [
                Cell(run.name),
                *(Cell(getattr(run, one)) for one, is_shown in named.items() if is_shown),
                *(
                    source.cell(
                        *("runs", place, column.name),
                        form=column.form,
                        by=("runs", place, column.by) if column.by else (),
                    )
                    if column.title != "score kept" or run.kept is not None
                    else Cell(NOT_MEASURED)
                    for column in columns
                ),
                Cell(ranking.shown(run), value if value is not None and math.isfinite(value) else None),
            ]
        )
    headings = [one for one, is_shown in named.items() if is_shown] + [column.title for column in columns]
    return Grid(name, "Runs", ["run", *headings, ranking.name], rows)


def ranking_grid(runs: Sequence[Figures], metrics: Sequence[Metric], name: str = "ranking") -> Grid:
    """The best runs by each metric, in order."""
    ranked = [metric.ranked(runs)[:PLACES] for metric in metrics]
    rows = [
        [
            Cell(str(place + 1)),
            *(
                Cell(_named(found[place], metric) if place < len(found) else "")
                for metric, found in zip(metrics, ranked, strict=True)
            ),
        ]
        for place in range(max(map(len, ranked), default=0))
    ]
    title = "Ranking" if len(runs) <= PLACES else f"Ranking, the best {PLACES} of {len(runs)}"
    return Grid(name, title, ["place", *(metric.name for metric in metrics)], rows)


def best_grid(runs: Sequence[Figures], metrics: Sequence[Metric], name: str = "best") -> Grid:
    """The best run of each group by each metric; empty if runs have no groups."""
    rows = []
    for group in dict.fromkeys(run.group for run in runs if run.group):
        chosen = [run for run in runs if run.group == group]
        firsts = [(metric, metric.ranked(chosen)[:1]) for metric in metrics]
        cells = [Cell(_named(found[0], metric)) if found else Cell(NOT_MEASURED) for metric, found in firsts]
        rows.append([Cell(f"{group} ({len(chosen)})"), *cells])
    return Grid(name, "Best of each group", ["group (runs)", *(metric.name for metric in metrics)], rows)


def trade_off_grid(front: Sequence[Figures], quality: Metric, name: str = "trade-off") -> Grid:
    """Runs that no other one beats, the fastest first."""
    metrics = [METRICS["size"], METRICS["speed"], quality]
    rows = [
        [Cell(run.name), *(Cell(metric.shown(run)) for metric in metrics)] for run in METRICS["speed"].ranked(front)
    ]
    return Grid(name, "Trade-off: no other run beats these", ["run", *(metric.name for metric in metrics)], rows)


def grid_table(grid: Grid) -> Table:
    """A grid as a table for the terminal and for markdown."""
    table = new_table(grid.title, list(grid.columns))
    longest = max((len(row[0].text) for row in grid.rows), default=0)
    table.columns[0].min_width = min(longest, _NAME)
    for row in grid.rows:
        table.add_row(*(cell.text for cell in row))
    return table


def _named(run: Figures, metric: Metric) -> str:
    return f"{run.name} ({metric.shown(run)})"
