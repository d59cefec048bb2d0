"""A comparison of runs as one self-contained HTML file, which needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lobo_fx.report.cells import Source
from lobo_fx.report.curves import Curve, Plot
from lobo_fx.report.family import Family
from lobo_fx.report.figures import Figures
from lobo_fx.report.grids import sheet_grids
from lobo_fx.report.html import fill
from lobo_fx.report.run_grids import PLACES, best_grid, runs_grid
from lobo_fx.report.scatter import Point, Scatter

__all__ = ["comparison_page"]

_COSTS = {
    "latency": ("latency, of the original's", "milliseconds"),
    "size": ("size of the file, of the original's", "bytes"),
}


def comparison_page(
    source: Source,
    families: Sequence[Family],
    runs: Sequence[Figures],
    curves: Sequence[Curve],
    warnings: Sequence[str],
    tally: str,
) -> str:
    """The page of several runs.

    Args:
        source: the data of the comparison.
        families: the groups of runs that are ranked together.
        runs: all runs.
        curves: the curves in the data, in its order.
        warnings: differences between the runs that limit comparison.
        tally: how many runs succeeded.
    """
    plots = [(curve, Plot(curve, f"curve-{place}", place)) for place, curve in enumerate(curves)]
    return fill(
        "comparison.html",
        title=source.data["title"],
        remarks=source.data["remarks"],
        tally=tally,
        parts=[_part(source, family, number, runs, plots) for number, family in enumerate(families)],
        plots=[plot for curve, plot in plots if len(families) > 1 and not curve.model],
        sheets=sheet_grids(source),
        warnings=warnings,
        conditions=[text for text in dict.fromkeys(str(run.conditions) for run in runs) if text],
    )


def _part(
    source: Source, family: Family, number: int, runs: Sequence[Figures], plots: Sequence[tuple[Curve, Plot]]
) -> dict[str, Any]:
    """The part of the page about one family."""
    suffix = f"-{number}" if family.name else ""
    quality, metrics = family.quality, family.metrics
    ranked = [(metric, metric.ranked(family.runs)) for metric in metrics]
    charts = [
        Scatter.of(
            f"{quality.name}-{cost}{suffix}",
            f"{quality.name.capitalize()} against {words}",
            words,
            quality.name,
            [
                Point(
                    run.name,
                    source.cell("runs", place, name, form="{:.3f}", by=("runs", place, f"original_{name}")),
                    source.cell("runs", place, quality.name, form="{:.4g}"),
                    "run",
                )
                for place, run in zip(family.places, family.runs, strict=True)
            ],
        )
        for cost, (words, name) in _COSTS.items()
    ]
    best = best_grid(family.runs, metrics, f"best{suffix}")
    return {
        "name": family.name,
        "suffix": suffix,
        "tiles": [(metric, found[0], metric.shown(found[0])) for metric, found in ranked if found],
        "advice": family.advice,
        "grids": [runs_grid(source, family.places, runs, f"runs{suffix}"), *([best] if best.rows else [])],
        "front": [run.name for run in family.front],
        "charts": [chart for chart in charts if chart],
        "plots": [plot for curve, plot in plots if curve.model == family.name],
        "ranked": [(metric, found[:PLACES], len(found)) for metric, found in ranked],
    }
