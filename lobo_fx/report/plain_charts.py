"""Charts made of characters: sizes, latencies, speeds, speed by removed share, trade-offs, the ranking."""

from __future__ import annotations

from collections.abc import Sequence

from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.report.figures import METRICS, ROWS, Figures, ranking_metric
from lobo_fx.report.report import Report
from lobo_fx.terminal.bars import bars
from lobo_fx.terminal.tables import printable

__all__ = ["charts_of", "pass_charts"]

_CURVE = "▓"
_MORE = (
    ("Size of the file after gzip, MB", "gzip_bytes", MEGABYTE),
    ("Memory that the file adds to its process, MB", "added_memory", MEGABYTE),
)


def charts_of(runs: Sequence[Figures], width: int = 80, heading: str = "") -> str:
    """Charts of one or more runs, under a heading."""
    one_model = len({run.model for run in runs}) == 1
    sizes = [(run.name, None if run.bytes is None else run.bytes / MEGABYTE) for run in runs]
    times = [(run.name, run.milliseconds) for run in runs]
    if one_model and (size := _original(runs, "bytes")) is not None:
        sizes.insert(0, ("original", size / MEGABYTE))
    if len(runs) == 1:
        times.insert(0, ("original", runs[0].original_milliseconds))
    parts = [f"{printable(heading)}\n{'#' * len(heading)}\n"] if heading else []
    parts += [
        bars("Size of the file, MB", sizes, width=width),
        bars("Median latency, ms", times, width=width),
        bars("Times as fast", [("original", 1.0), *((run.name, run.faster) for run in runs)], "{:.2f}x", width),
    ]
    for title, name, scale in _MORE:
        values = [(run.name, None if (value := getattr(run, name)) is None else value / scale) for run in runs]
        if any(value is not None for _, value in values):
            first = _original(runs, name)
            start_of = [("original", first / scale)] if one_model and first is not None else []
            parts.append(bars(title, [*start_of, *values], width=width))
    if any(run.unit != ROWS for run in runs):
        rates = [("original", runs[0].original_rate)] if len(runs) == 1 else []
        parts.append(
            bars(f"{runs[0].unit} a second".capitalize(), [*rates, *((r.name, r.rate) for r in runs)], width=width)
        )
    if any(run.score is not None for run in runs):
        start = [("original", _original(runs, "score"))] if one_model else []
        parts.append(bars("Score", [*start, *((run.name, run.score) for run in runs)], "{:.4g}", width))
    known = sorted((run.removed, run.name, run.faster) for run in runs if run.removed is not None)
    curve = [(f"{removed:.0%} {name}", faster) for removed, name, faster in known]
    parts.append(bars("Share of the parameters that is gone, and speed", curve, "{:.2f}x", width, _CURVE))
    trade = [bars(run.name, _trade(run), "{:.1%}", width) for run in runs]
    parts += ["Trade-off\n=========\n", *trade]
    if len(runs) > 1:
        metric = ranking_metric(runs)
        places = [f"{place}. {run.name}: {metric.shown(run)}" for place, run in enumerate(metric.ranked(runs), 1)]
        heading = f"Ranking by {metric.name}"
        parts.append("\n".join([heading, "=" * len(heading), metric.meaning, "", *map(printable, places), ""]))
    return "\n".join(parts)


def _original(runs: Sequence[Figures], name: str) -> float | None:
    """A figure of the original that the runs share, from the first run that has it."""
    found: float | None = next((value for run in runs if (value := getattr(run, f"original_{name}")) is not None), None)
    return found


def _trade(run: Figures) -> list[tuple[str, float | None]]:
    """Gains and the kept score, as shares."""
    found = [
        ("file is smaller by", None if run.share is None else 1 - run.share),
        ("faster by", None if run.faster is None else run.faster - 1),
    ]
    if METRICS["score"].of(run) is not None:
        found.append(("score kept", run.kept))
    return found


def pass_charts(report: Report, width: int = 80) -> str:
    """Charts of the passes of one run: memory, fidelity and time of each."""
    rows = report.rows[1:]
    if not rows:
        return ""
    return "\n".join(
        (
            bars("Memory of parameters, MB", [(row.name, row.bytes / MEGABYTE) for row in report.rows], width=width),
            bars("Outputs against the original's, dB", [(row.name, row.snr) for row in rows], "{:.1f}", width),
            bars("Time of the passes, s", [(row.name, row.seconds) for row in rows], "{:.1f}", width),
        )
    )
