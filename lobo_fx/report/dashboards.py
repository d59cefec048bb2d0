"""Pictures of one or several runs, an overview and a detailed comparison, drawn with matplotlib if installed."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.report.charts import plain_label
from lobo_fx.report.figures import METRICS, ROWS, Figures, front, quality_metric, ranking_metric
from lobo_fx.terminal.quiet import quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DASHBOARDS", "dashboards"]

DASHBOARDS = ("dashboard_overview.png", "detailed_comparison.png")
_FEWEST, _MOST = 3, 16
"""Fewest runs that a picture leaves room for, and most runs that it shows."""
_ROOM = (0.25, 0.03)
"""Room for a name, as shares of the range of the points."""
_COLOURS = ("#8a919e", "#1f5fbf")


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A quantity of the detailed comparison: its title, its name among the figures, and what it is divided by."""

    title: str
    name: str
    scale: float = MEGABYTE
    always: bool = True


_PANELS = (
    _Panel("File, MB", "bytes"),
    _Panel("Median latency, ms", "milliseconds", 1),
    _Panel("Memory that it adds to its process, MB", "added_memory"),
    _Panel("Parameters, millions", "parameters", 1e6),
    _Panel("File after gzip, MB", "gzip_bytes", always=False),
    _Panel("{units} a second", "rate", 1, always=False),
)


def dashboards(runs: Sequence[Figures]) -> dict[str, bytes]:
    """The overview and the detailed comparison of one or more runs, by file name.

    If there are many runs, bars show those on the front in size, speed and quality, then the best ones.
    """
    shown = list(runs)
    if len(runs) > _MOST:
        shown = front(runs, ["size", "speed", quality_metric(runs).name])
        shown = [*shown, *(run for run in ranking_metric(runs).ranked(runs) if run not in shown)][:_MOST] or list(
            runs[:_MOST]
        )
    said = (
        ""
        if len(shown) == len(runs)
        else f"{len(shown)} of {len(runs)} runs: the front, then by {ranking_metric(runs).name}"
    )
    return dict(zip(DASHBOARDS, (_overview(shown, runs, said), _details(shown, said)), strict=True))


def _overview(runs: Sequence[Figures], all_runs: Sequence[Figures], said: str) -> bytes:
    """Bars of the gains, and quality against latency of all runs."""

    def draw(axes: Any) -> None:
        names = [run.name for run in runs]
        _bars(axes[0][0], "Times as small", names, [run.smaller for run in runs], 1.0)
        _bars(axes[0][1], "Times as fast", names, [run.faster for run in runs], 1.0)
        quality = quality_metric(runs)
        start = runs[0].original_score if quality.name == "score" and len({run.model for run in runs}) == 1 else None
        _bars(
            axes[1][0],
            quality.name.capitalize() + " (line: the original's)" * (start is not None),
            names,
            [quality.of(run) for run in runs],
            start,
        )
        _trade_off(axes[1][1], all_runs, start)

    return _picture(draw, (2, 2), (11, 2.4 + 0.6 * max(_FEWEST, len(runs))), said)


def _details(runs: Sequence[Figures], said: str) -> bytes:
    """Original and compiled model side by side, for each quantity."""
    panels = [panel for panel in _PANELS if panel.always or _is_measured(panel, runs)]
    units = ", ".join(dict.fromkeys(run.unit for run in runs))

    def draw(axes: Any) -> None:
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        for place, panel in zip(axes.flat, panels, strict=False):
            sides = ((-0.2, f"original_{panel.name}"), (0.2, panel.name))
            for (offset, name), colour, label in zip(sides, _COLOURS, ("original", "compiled"), strict=True):
                values = [getattr(run, name) for run in runs]
                _row(place, [at + offset for at in range(len(runs))], values, 0.36, colour, panel.scale, label)
            _named(place, panel.title.format(units=units), [run.name for run in runs])
        place = axes.flat[0]
        place.figure.legend(
            *place.get_legend_handles_labels(), loc="upper right", ncols=2, fontsize="small", frameon=False
        )

    lines = math.ceil(len(panels) / 2)
    return _picture(draw, (lines, 2), (11, lines * (1.2 + 0.4 * max(_FEWEST, len(runs)))), said)


def _is_measured(panel: _Panel, runs: Sequence[Figures]) -> bool:
    """Whether a panel has figures; rows a second are left out, as they only repeat the latency."""
    counted = [run for run in runs if panel.name != "rate" or run.unit != ROWS]
    return any(getattr(run, panel.name) is not None for run in counted)


def _picture(draw: Callable[[Any], None], grid: tuple[int, int], size: tuple[float, float], said: str) -> bytes:
    from matplotlib.figure import Figure

    figure, stream = Figure(figsize=size), io.BytesIO()
    top = (0.5 + 0.2 * bool(said)) / size[
        1
    ]  # room for titles and names by hand: matplotlib's own layouts draw everything twice
    figure.subplots_adjust(
        left=0.17, right=0.98, wspace=0.55, top=1 - top, bottom=0.53 / size[1], hspace=0.9 / size[1] * 2.2
    )
    figure.text(0.01, 1 - 0.25 / size[1], said, fontsize="small")
    with quiet():  # of letters that the font lacks
        draw(figure.subplots(*grid))
        figure.savefig(stream, format="png", dpi=90)
    return stream.getvalue()


def _bars(axes: Axes, title: str, names: Sequence[str], values: Sequence[float | None], line: float | None) -> None:
    _row(axes, list(range(len(names))), values, 0.7, _COLOURS[1], 1, "")
    if line is not None:
        axes.axvline(line, color=_COLOURS[0], linestyle="--")
    _named(axes, title, names)


def _row(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float | None],
    height: float,
    colour: str,
    scale: float,
    label: str,
) -> None:
    """Bars with their numbers; figures that were not measured have a text instead of a bar."""
    known = [value / scale if value is not None and math.isfinite(value) else 0.0 for value in values]
    drawn = axes.barh(places, known, height, color=colour, label=label)
    texts = ["not measured" if value is None else f"{value / scale:,.3g}" for value in values]
    axes.bar_label(drawn, texts, padding=3, fontsize="x-small")
    axes.margins(x=0.25)


def _named(axes: Axes, title: str, names: Sequence[str]) -> None:
    axes.set_title(title, loc="left", fontsize="medium", fontweight="bold")
    axes.set_yticks(range(len(names)), [plain_label(name) for name in names], fontsize="small")
    axes.set_ylim(max(_FEWEST, len(names)) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _trade_off(axes: Axes, runs: Sequence[Figures], start: float | None) -> None:
    """Quality against speed, with the original's score if known; runs on the front are coloured."""
    if start is not None:
        axes.scatter([1.0], [start], color=_COLOURS[0], marker="D", zorder=2)
        axes.annotate("original", (1.0, start), (4, 4), textcoords="offset points", fontsize="x-small")
    quality = quality_metric(runs)
    best = set(map(id, front(runs, ["speed", quality.name])))
    known = [(run, METRICS["speed"].of(run), quality.of(run)) for run in runs]
    points = [(run, x, y) for run, x, y in known if x is not None and y is not None and math.isfinite(y)]
    speeds, levels = [x for _, x, _ in points] or [0.0], [y for _, _, y in points] or [0.0]
    middle = (min(speeds) + max(speeds)) / 2
    room = _ROOM[0] * (max(speeds) - min(speeds)), _ROOM[1] * (max(levels) - min(levels))
    named: list[tuple[float, float]] = []
    for run, x, y in sorted(points, key=lambda point: id(point[0]) not in best):
        axes.scatter([x], [y], color=_COLOURS[id(run) in best], zorder=2)
        if not any(abs(x - other) < room[0] and abs(y - level) < room[1] for other, level in named):
            side, offset = ("right", (-5, 4)) if x > middle else ("left", (4, 4))
            axes.annotate(
                plain_label(run.name), (x, y), offset, textcoords="offset points", fontsize="x-small", ha=side
            )
            named.append((x, y))
    axes.set_title("Trade-off (blue: the front)", loc="left", fontsize="medium", fontweight="bold")
    axes.set_xlabel("times as fast", fontsize="small")
    axes.set_ylabel(quality.name, fontsize="small")
    axes.margins(0.2)
