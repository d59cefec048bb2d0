"""A comparison of runs as one HTML file that needs nothing beside it and asks no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lobo_fx.report.advice import Advice
from lobo_fx.report.cells import MB, Cell, Grid, Source
from lobo_fx.report.figures import Figures, Metric
from lobo_fx.report.html import fill
from lobo_fx.report.report import Report
from lobo_fx.report.scatter import Point, Scatter

__all__ = ["comparison_page"]


def comparison_page(
    reports: Mapping[str, Report],
    runs: Sequence[Figures],
    metrics: Sequence[Metric],
    front: Sequence[Figures],
    advice: Sequence[Advice],
    warnings: Sequence[str],
) -> str:
    """The page of several runs."""
    sources = {name: Source(report.as_json(), name) for name, report in reports.items()}
    quality = metrics[2].name
    charts = [
        Scatter.of(
            f"{quality}-{cost}",
            f"{quality.capitalize()} against {words}",
            words,
            quality,
            [Point(run.name, _quotient(sources[run.name], cost), _quality(sources[run.name], quality), "run")
             for run in runs],
        )
        for cost, words in (("latency", "latency, of the original's"), ("size", "size of the file, of the original's"))
    ]  # fmt: skip
    ranked = {metric.name: metric.ranked(runs) for metric in metrics}
    return fill(
        "comparison.html",
        title=f"{len(runs)} runs compared",
        tiles=[(metric, found[0], metric.shown(found[0])) for metric in metrics if (found := ranked[metric.name])],
        grid=_runs_grid(sources, runs, metrics[-1]),
        ranked=ranked,
        metrics=metrics,
        front=[run.name for run in front],
        charts=[chart for chart in charts if chart],
        advice=advice,
        warnings=warnings,
        datas={name: source.data for name, source in sources.items()},
    )  # fmt: skip


def _quotient(source: Source, cost: str) -> Cell:
    path = ("benchmark", "latencies", "{}", "p50") if cost == "latency" else ("artifacts", "{}", "bytes")
    new, old = (tuple(key.format(label) for key in path) for label in ("compiled", "original"))
    return source.cell(*new, form="{:.3f}", by=old)


def _quality(source: Source, name: str, at: int = -1) -> Cell:
    index = at % max(1, len(source.data["passes"]))
    return source.cell("passes", index, "snr" if name == "decibels" else "score", form="{:.4g}")


def _runs_grid(sources: dict[str, Source], runs: Sequence[Figures], last: Metric) -> Grid:
    several = len({run.model for run in runs}) > 1
    columns = [
        "run",
        *(["model"] if several else []),
        "file",
        "of original",
        "p50 ms",
        "latency, of original",
        "score",
        "original's score",
    ]
    rows: list[list[Cell]] = []
    for run in runs:
        source = sources[run.name]
        value = last.of(run)
        known = value is not None and math.isfinite(value)
        rows.append(
            [
                Cell(run.name),
                *([Cell(run.model)] if several else []),
                source.cell("artifacts", "compiled", "bytes", form=MB),
                _quotient(source, "size"),
                source.cell("benchmark", "latencies", "compiled", "p50", form="{:.3f}"),
                _quotient(source, "latency"),
                _quality(source, "score"),
                _quality(source, "score", 0),
                _quality(source, "decibels"),
                source.cell("passes", len(source.data["passes"]) - 1, "parameters"),
                Cell(last.shown(run), value if known else None, "", "", run.name),
            ]
        )
    return Grid("runs", "Runs", [*columns, "SNR dB", "parameters", last.name], rows)
