"""The report: a row per pass, then the files and their latency; as a table, markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobo_fx.artifact import Artifact, write_files
from lobo_fx.costs import cpu_name
from lobo_fx.measures import Measures
from lobo_fx.plots import can_draw, draw
from lobo_fx.runtime import Benchmark
from lobo_fx.tables import escape, new_table, render, to_markdown

if TYPE_CHECKING:
    from rich.table import Table

MEGABYTE = 1e6
_MODULE = re.compile(r"in module ('[^'\n]*')")
"""How `lobo_fx.provenance.describe` says where."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The program after one pass.

    Attributes:
        name: the pass with its settings; `original` for the first row.
        parameters: see `lobo_fx.measures.Measures`, as are the next four.
        nonzero: parameters that are not zero.
        sparsity: share of the parameters that are zero.
        macs: multiply-accumulates of one row of the batch.
        bytes: memory of parameters and buffers.
        snr: signal-to-noise ratio of the outputs against the original's, in decibels.
        score: what `evaluate` returned, if it was given.
        seconds: time the pass and its verification took.
    """

    name: str
    parameters: int
    nonzero: int
    sparsity: float
    macs: int | None
    bytes: int
    snr: float
    score: float | None
    seconds: float

    @classmethod
    def of(cls, name: str, measures: Measures, snr: float, score: float | None, seconds: float) -> Row:
        m = measures
        return cls(name, m.parameters, m.nonzero, m.sparsity, m.macs, m.bytes, snr, score, seconds)


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table that a pass adds to the report; the second column is drawn against the first.

    Attributes:
        title: in the report, and the name of its files.
        columns: their headings.
        rows: cells, numbers as numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclasses.dataclass
class Report:
    """What was done to a model and what it brought.

    Attributes:
        model: name of the model's class, or its path.
        rows: the original, then one row per pass.
        notes: what a user should know: what was left alone and why.
        artifacts: files written, by label.
        benchmark: latencies, once measured.
        sheets: tables that passes added.
    """

    model: str
    rows: list[Row]
    notes: list[str] = dataclasses.field(default_factory=list)
    artifacts: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    benchmark: Benchmark | None = None
    sheets: list[Sheet] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        tables = [pass_table(self)]
        if self.artifacts:
            tables.append(artifact_table(self))
        if self.benchmark:
            tables.append(benchmark_table(self.benchmark))
        return "".join(render(table) for table in tables) + "".join(f"note: {note}\n" for note in gathered(self.notes))

    def to_json(self) -> str:
        """Everything, with raw numbers; infinite ratios are null."""
        data = {
            "model": self.model,
            "machine": machine(),
            "passes": [dataclasses.asdict(row) for row in self.rows],
            "notes": self.notes,
            "sheets": [dataclasses.asdict(sheet) for sheet in self.sheets],
            "artifacts": {
                label: {
                    "file": str(a.path),
                    "bytes": a.bytes,
                    "gzip_bytes": a.known_gzip_bytes,
                    "parity": a.parity,
                    **a.details,
                }
                for label, a in self.artifacts.items()
            },
            "benchmark": self.benchmark and dataclasses.asdict(self.benchmark),
        }
        return json.dumps(_finite(data), indent=2)

    def to_csv(self) -> str:
        """The rows, with raw numbers."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in self.rows)
        return stream.getvalue()

    def to_markdown(self) -> str:
        """The tables as GitHub markdown."""
        parts = [f"# {escape(self.model)}\n"]
        tables = [("Passes", pass_table(self))]
        if self.artifacts:
            tables.append(("Files", artifact_table(self)))
        if self.benchmark:
            tables.append(("Latency", benchmark_table(self.benchmark)))
        tables += [(sheet.title.capitalize(), sheet_table(sheet)) for sheet in self.sheets]
        parts += [f"## {title}\n\n{to_markdown(table)}" for title, table in tables]
        if self.notes:
            parts.append("## Notes\n\n" + "".join(f"- {escape(note)}\n" for note in gathered(self.notes)))
        parts.append(f"Measured on {machine()}.\n")
        return "\n".join(parts)

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `report.md`, `report.csv` and `report.json` into `folder`, which is made if missing.

        Each sheet is drawn in a picture of its own where matplotlib is installed.

        Raises:
            InvalidInput: the folder can't be made or written to; older reports are left as they were.
        """
        files: dict[str, str | bytes] = {
            "report.md": self.to_markdown(),
            "report.csv": self.to_csv(),
            "report.json": self.to_json(),
        }
        if can_draw():
            files |= {f"{sheet.title}.png": draw(sheet) for sheet in self.sheets}
        return write_files(Path(folder), files)


def pass_table(report: Report) -> Table:
    """A line per pass."""
    scored = any(row.score is not None for row in report.rows)
    columns = ["pass", "params", "non-zero", "sparsity", "MACs", "MB in memory", "SNR dB"]
    table = new_table(report.model, [*columns, *(["score"] if scored else []), "seconds"])
    for row in report.rows:
        cells = [
            row.name,
            f"{row.parameters:,}",
            f"{row.nonzero:,}",
            f"{row.sparsity:.1%}",
            f"{row.macs / 1e6:,.1f}M" if row.macs is not None else "not measured",
            f"{row.bytes / MEGABYTE:.2f}",
            "=" if row.snr == math.inf else f"{row.snr:.1f}",
        ]
        if scored:
            cells.append("not measured" if row.score is None else f"{row.score:.4g}")
        table.add_row(*cells, f"{row.seconds:.1f}")
    return table


def sheet_table(sheet: Sheet) -> Table:
    """A sheet as it is."""
    table = new_table(sheet.title, list(sheet.columns))
    for cells in sheet.rows:
        table.add_row(*map(str, cells))
    return table


def artifact_table(report: Report) -> Table:
    """A line per file."""
    table = new_table("files", ["file", "label", "MB", "of original", "gzip MB", "parity", "kernels"])
    first = next(iter(report.artifacts.values())).bytes
    for label, artifact in report.artifacts.items():
        gzipped = artifact.known_gzip_bytes
        table.add_row(
            artifact.path.name,
            label,
            f"{artifact.bytes / MEGABYTE:.2f}",
            f"{artifact.bytes / first:.2f}" if "original" in report.artifacts else "not measured",
            "not measured" if gzipped is None else f"{gzipped / MEGABYTE:.2f}",
            f"{artifact.parity:.1e}",
            ", ".join(f"{count} {name}" for name, count in artifact.details.get("kernels", {}).items()),
        )
    return table


def benchmark_table(benchmark: Benchmark) -> Table:
    """A line per file measured."""
    title = (
        f"{benchmark.runtime}, {benchmark.threads} thread{'s' * (benchmark.threads > 1)}, "
        f"batch {benchmark.batch}, {benchmark.rounds} rounds in turn"
    )
    table = new_table(
        title,
        ["file", "p5 ms", "p50 ms", "p95 ms", "CPU ms", "p50 ratio", "CPU ratio", "rows/s", "peak MB", "model MB"],
    )
    for label, latency in benchmark.latencies.items():
        known = latency.memory is not None and latency.base_memory is not None
        table.add_row(
            label,
            *(f"{value:.2f}" for value in (latency.p5, latency.p50, latency.p95, latency.cpu)),
            f"{benchmark.ratio(label, 'p50'):.2f}",
            f"{benchmark.ratio(label):.2f}",
            f"{latency.throughput:.1f}",
            f"{(latency.memory or 0) / MEGABYTE:.0f}" if known else "not measured",
            f"{((latency.memory or 0) - (latency.base_memory or 0)) / MEGABYTE:.0f}" if known else "not measured",
        )
    return table


def gathered(notes: Iterable[str]) -> list[str]:
    """Notes for people: those that differ in the module alone (a layer of many) are one."""
    modules: dict[str, list[str]] = {}
    for note in notes:
        modules.setdefault(_MODULE.sub("in module ''", note, count=1), []).extend(_MODULE.findall(note)[:1])
    return [note.replace("in module ''", f"in {_named(names)}", 1) for note, names in modules.items()]


def _named(modules: Sequence[str]) -> str:
    """One module, two, or the first two of many."""
    if len(modules) < 3:
        return f"module{'s' * (len(modules) - 1)} {' and '.join(modules)}"
    return f"{len(modules)} modules, {modules[0]}, {modules[1]} and others"


def machine() -> str:
    """The processor and system that figures were measured on."""
    return f"{cpu_name()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
