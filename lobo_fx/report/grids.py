"""The tables of a report's page, made from its data."""

from __future__ import annotations

import dataclasses
from typing import Any

from lobo_fx.report.cells import Cell, Grid, Source, count_text, size_text

__all__ = [
    "axes_grid",
    "before_and_after",
    "candidates_grid",
    "files_grid",
    "latency_grid",
    "notes_grid",
    "passes_grid",
    "sheet_grids",
]

_DB = "{:,.1f}"


def passes_grid(source: Source) -> Grid:
    """A line per pass."""
    columns: dict[str, tuple[str, Any]] = {
        "params": ("parameters", "{:,}"),
        "non-zero": ("nonzero", "{:,}"),
        "sparsity": ("sparsity", "{:.1%}"),
        "MACs": ("macs", count_text),
        "memory": ("bytes", size_text),
        "SNR dB": ("snr", _DB),
        "worst output dB": ("worst", _DB),
        "worst output": ("worst_part", "{}"),
        "score": ("score", "{:.4g}"),
        "seconds": ("seconds", "{:,.1f}"),
    }
    rows = source.data["passes"]
    if not any(row["worst_part"] for row in rows):
        del columns["worst output dB"], columns["worst output"]
    if all(row["score"] is None for row in rows):
        del columns["score"]
    cells = [
        [Cell(row["name"]), *(source.cell("passes", at, name, form=form) for name, form in columns.values())]
        for at, row in enumerate(rows)
    ]
    return Grid("passes", "Passes", ["pass", *columns], cells)


def before_and_after(source: Source) -> Grid:
    """Figures of the original and of the compiled model, and their ratio."""
    last = len(source.data["passes"]) - 1
    pairs: list[tuple[str, Any, tuple[str | int, ...], tuple[str | int, ...]]] = []
    for title, name, form in (
        ("parameters", "parameters", "{:,}"),
        ("parameters that are not zero", "nonzero", "{:,}"),
        ("multiply-accumulates of a row", "macs", count_text),
        ("memory of the weights", "bytes", size_text),
        ("score", "score", "{:.4g}"),
    ):
        pairs.append((title, form, ("passes", 0, name), ("passes", last, name)))
    for title, name in (("file", "bytes"), ("file after gzip", "gzip_bytes")):
        pairs.append((title, size_text, ("artifacts", "original", name), ("artifacts", "compiled", name)))
    for title, name, form in (
        ("median latency", "p50", "{:,.3f} ms"),
        ("latency, 95 % of the calls", "p95", "{:,.3f} ms"),
        ("CPU time of a call", "cpu", "{:,.3f} ms"),
        ("rows a second", "throughput", "{:,.1f}"),
        ("peak memory", "memory", size_text),
    ):
        start = ("benchmark", "latencies")
        pairs.append((title, form, (*start, "original", name), (*start, "compiled", name)))
    rows = [
        [Cell(title), source.cell(*old, form=form), source.cell(*new, form=form),
         source.cell(*new, form="{:.1%}", by=old)]
        for title, form, old, new in pairs
    ]  # fmt: skip
    return Grid("changes", "Before and after", ["", "original", "compiled", "share"], rows)


def files_grid(source: Source) -> Grid:
    """A line per file."""
    rows = []
    for label, artifact in source.data["artifacts"].items():
        kernels = artifact["details"].get("kernels", {})
        rows.append(
            [
                Cell(label),
                Cell(artifact["path"].rpartition("/")[2]),
                source.cell("artifacts", label, "bytes", form=size_text),
                source.cell("artifacts", label, "bytes", form="{:.2f}", by=("artifacts", "original", "bytes")),
                source.cell("artifacts", label, "gzip_bytes", form=size_text),
                source.cell("artifacts", label, "parity", form="{:.1e}"),
                Cell(", ".join(f"{count} {name}" for name, count in kernels.items())),
            ]
        )
    return Grid("files", "Files", ["label", "file", "size", "of original", "gzip", "parity", "kernels"], rows)


def latency_grid(source: Source) -> Grid:
    """A line per file that was measured."""
    if source.data["benchmark"] is None:
        return Grid("latency", "Latency", [], [])
    found = source.data["benchmark"]
    columns = {name: (name, "{:,.3f}") for name in ("p5", "p50", "p95", "cpu")}
    more: dict[str, tuple[str, Any]] = {"rows/s": ("throughput", "{:,.1f}"), "peak memory": ("memory", size_text)}
    rows = [
        [
            Cell(label),
            *(source.cell("benchmark", "latencies", label, name, form=form)
              for name, form in (*columns.values(), *more.values())),
        ]
        for label in found["latencies"]
    ]  # fmt: skip
    title = (
        f"Latency in {found['runtime']}, {found['threads']} thread{'s' * (found['threads'] > 1)}, "
        f"batch {found['batch']}, {found['rounds']} rounds in turn"
    )
    return Grid("latency", title, ["file", "p5 ms", "p50 ms", "p95 ms", "CPU ms", *more], rows)


def candidates_grid(source: Source) -> Grid:
    """A line per candidate of a search."""
    forms: dict[str, Any] = {"latency": "{:.4f}", "bytes": size_text, "decibels": _DB, "score": "{:.4g}"}
    rows = [
        [
            Cell(candidate["name"]),
            *(source.cell("candidates", at, name, form=form) for name, form in forms.items()),
            Cell("measured" if candidate["is_measured"] else "predicted"),
            Cell("taken" if candidate["chosen"] else ""),
        ]
        for at, candidate in enumerate(source.data["candidates"])
    ]
    columns = ["candidate", "latency, of original", "file", "dB", "score", "latency is", "taken"]
    return Grid("candidates", "What the search found", columns, rows)


def axes_grid(source: Source) -> Grid:
    """A line per axis that was cut, with a bar for the share that stays."""
    rows = []
    for at, axis in enumerate(source.data["axes"]):
        share = source.cell("axes", at, "after", form="{:.1%}", by=("axes", at, "before"))
        rows.append(
            [
                Cell(axis["name"]),
                dataclasses.replace(share, bar=share.value),
                *(source.cell("axes", at, name) for name in ("before", "after", "members", "parameters")),
            ]
        )
    columns = ["axis", "stays", "before", "after", "runs through", "parameters along it"]
    return Grid("axes", "Axes that were cut", columns, rows)


def sheet_grids(source: Source) -> list[Grid]:
    """The sheets, with a bar behind the second column."""
    grids = []
    for number, sheet in enumerate(source.data["sheets"]):
        drawn = [row[1] for row in sheet["rows"] if len(row) > 1 and _is_number(row[1])]
        largest = max(map(abs, drawn), default=0) or 1
        rows = [
            [_sheet_cell(source, number, at, column, cell, largest) for column, cell in enumerate(row)]
            for at, row in enumerate(sheet["rows"])
        ]
        grids.append(Grid(f"sheet-{number}", sheet["title"].capitalize(), sheet["columns"], rows))
    return grids


def _sheet_cell(source: Source, sheet: int, at: int, column: int, cell: Any, largest: float) -> Cell:
    if not _is_number(cell) and cell not in ("inf", "-inf", "nan"):
        return Cell("" if cell is None else str(cell))
    found = source.cell("sheets", sheet, "rows", at, column, form=_plain)
    bar = max(0.0, cell / largest) if column == 1 and _is_number(cell) else None
    return Cell(found.text, found.value, found.path, bar=bar)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, (int, float)) and not isinstance(cell, bool)


def _plain(value: float) -> str:
    """As many digits as a reader needs; integers in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def notes_grid(source: Source) -> Grid:
    """Every note with what it is about."""
    names = {"reason": "note", "made_by": "pass", "operator": "operator", "module": "module",
             "parameter": "parameter", "line": "line"}  # fmt: skip
    rows = [[Cell(note[name]) for name in names] for note in source.data["notes"]]
    used = [index for index in range(len(names)) if index == 0 or any(row[index].text for row in rows)]
    columns = list(names.values())
    return Grid("notes-table", "Notes one by one", [columns[i] for i in used], [[row[i] for i in used] for row in rows])
