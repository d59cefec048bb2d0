"""A report as one self-contained HTML file, which needs no network; made from the data of `report.json`."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobo_fx.graph.notes import gathered, notes_from_json
from lobo_fx.report.cells import Cell, Source, size_text
from lobo_fx.report.drawing import PRECISIONS, drawing
from lobo_fx.report.grids import (
    axes_grid,
    before_and_after,
    candidates_grid,
    files_grid,
    latency_grid,
    notes_grid,
    passes_grid,
    sheet_grids,
)
from lobo_fx.report.json import benchmark_from_json
from lobo_fx.report.scatter import Point, Scatter

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["can_render", "fill", "report_page"]

_TEMPLATES = Path(__file__).parent / "templates"


def can_render() -> bool:
    """Whether jinja2 is installed."""
    return importlib.util.find_spec("jinja2") is not None


@functools.cache
def _templates() -> Environment:
    """The templates; they escape all that they show, except our own style and script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    made.globals["script"] = Markup(script)
    made.globals["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals["style"] = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return made


def fill(template: str, **given: Any) -> str:
    """Fills a template with what the page shows."""
    return _templates().get_template(template).render(given)


def report_page(data: Mapping[str, Any]) -> str:
    """The page of one run, from the result of `Report.as_json`; jinja2 must be installed."""
    source = Source(data)
    grids = [passes_grid(source), files_grid(source), latency_grid(source), candidates_grid(source), axes_grid(source)]
    return fill(
        "report.html",
        title=data["model"],
        data=data,
        tiles=list(_tiles(source)),
        changes=before_and_after(source),
        steps=_time_line(source),
        **_network(source),
        charts=[chart for chart in _charts(source) if chart],
        grids=[grid for grid in grids if grid.rows],
        sheets=sheet_grids(source),
        notes=gathered(notes_from_json(data["notes"])) + _busy(data["benchmark"]),
        noted=notes_grid(source),
    )


def _network(source: Source) -> dict[str, Any]:
    """The drawing, and which entries its legend needs."""
    network, modules = drawing(source), source.data.get("modules", [])
    bars = [] if network is None else network.bars
    return {
        "network": network,
        "precisions": PRECISIONS,
        "used": {bar.precision for bar in bars} | ({network.precision} if network is not None else set()),
        "pruned": any(bar.before > bar.after or bar.zero for bar in bars),
        "faded": any(bar.is_longer for bar in bars),
        "timed": any(
            side and side["microseconds"] is not None for row in modules for side in (row["before"], row["after"])
        ),
    }


def _busy(benchmark: Mapping[str, Any] | None) -> list[str]:
    return [] if benchmark is None else benchmark_from_json(benchmark).busy


def _tiles(source: Source) -> Iterator[tuple[str, Cell, Cell, Cell]]:
    """The most important figures: a heading, the figure, and its values before and after."""
    last = len(source.data["passes"]) - 1
    measured = ("benchmark", "latencies")
    for title, form, new, old, turned in (
        ("times as small", size_text, ("artifacts", "compiled", "bytes"), ("artifacts", "original", "bytes"), True),
        ("times as fast", "{:,.3f} ms", (*measured, "compiled", "p50"), (*measured, "original", "p50"), True),
        ("of the parameters", "{:,}", ("passes", last, "parameters"), ("passes", 0, "parameters"), False),
        (
            "of the peak memory",
            size_text,
            (*measured, "compiled", "memory"),
            (*measured, "original", "memory"),
            False,
        ),
    ):
        top, bottom = (old, new) if turned else (new, old)
        figure = source.cell(*top, form="{:.2f}×" if turned else "{:.1%}", by=bottom)  # noqa: RUF001
        yield title, figure, source.cell(*old, form=form), source.cell(*new, form=form)
    if source.find("passes", last, "score") is not None or source.find("passes", 0, "score") is not None:
        figure, before = (source.cell("passes", at, "score", form="{:.4g}") for at in (last, 0))
        yield "score", figure, before, figure
    decibels = source.cell("passes", last, "snr", form="{:.1f} dB")
    yield "signal to noise of the outputs", decibels, Cell(""), Cell("")


def _time_line(source: Source) -> list[tuple[str, Cell, float, float]]:
    """Every pass with its time, and its start and length as shares of the whole."""
    rows = source.data["passes"][1:]
    whole = sum(row["seconds"] for row in rows) or 1.0
    steps, start = [], 0.0
    for index, row in enumerate(rows, 1):
        seconds = source.cell("passes", index, "seconds", form="{:,.1f} s")
        steps.append((row["name"], seconds, start / whole, row["seconds"] / whole))
        start += row["seconds"]
    return steps


def _charts(source: Source) -> Iterator[Scatter | None]:
    """Quality against latency and against size: of a search's candidates, else of the files and passes."""
    last, candidates = len(source.data["passes"]) - 1, source.data["candidates"]
    if candidates:
        name = "score" if any(one["score"] is not None for one in candidates) else "decibels"
        for cost, form, words in (
            ("latency", "{:.3f}", "latency, of the original's"),
            ("bytes", size_text, "file, MB"),
        ):
            points = [
                Point(
                    one["name"] + ", taken" * one["chosen"] + ", predicted" * (not one["is_measured"]),
                    source.cell("candidates", at, cost, form=form),
                    source.cell("candidates", at, name, form="{:.4g}"),
                    "compiled" if one["chosen"] else "candidate",
                    1e6 if cost == "bytes" else 1,
                )
                for at, one in enumerate(candidates)
            ]
            yield Scatter.of(f"candidates-{cost}", f"{name.capitalize()} against {words}", words, name, points)
        return
    name = "snr" if source.find("passes", last, "score") is None else "score"
    title = "decibels" if name == "snr" else "score"
    ends = {"original": 0, "compiled": last}
    quality = {label: source.cell("passes", at, name, form="{:.4g}") for label, at in ends.items()}
    times = {label: source.cell("benchmark", "latencies", label, "p50", form="{:.3f} ms") for label in ends}
    points = [Point(label, times[label], quality[label], label) for label in ends]
    yield Scatter.of("latency", f"{title.capitalize()} against latency", "median latency, ms", title, points)
    points = [
        Point(
            row["name"],
            source.cell("passes", at, "bytes", form=size_text),
            source.cell("passes", at, name, form="{:.4g}"),
            "original" if at == 0 else "compiled" if at == last else "candidate",
            1e6,
        )
        for at, row in enumerate(source.data["passes"])
    ]
    yield Scatter.of("size", f"{title.capitalize()} against memory of the weights", "MB in memory", title, points)
