"""A report as tables for the terminal and markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lobo_fx.errors import InvalidInput
from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.report.cells import count_text
from lobo_fx.report.records import AxisRow, Row, Sheet
from lobo_fx.terminal.tables import decimals, new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["artifact_table", "axis_table", "pass_table", "settings_table", "sheet_table"]


def pass_table(model: str, rows: Sequence[Row]) -> Table:
    """A line per pass."""
    scored = any(row.score is not None for row in rows)
    parted = any(row.worst_part for row in rows)
    columns = ["pass", "params", "non-zero", "sparsity", "MACs", "MB in memory", "SNR dB"]
    columns += ["worst output dB"] if parted else []
    table = new_table(model, [*columns, *(["score"] if scored else []), "seconds"])
    for row in rows:
        cells = [
            row.name,
            f"{row.parameters:,}",
            f"{row.nonzero:,}",
            f"{row.sparsity:.1%}",
            "not measured" if row.macs is None else count_text(row.macs),
            decimals(row.bytes / MEGABYTE),
            "=" if row.snr == math.inf else f"{row.snr:.1f}",
        ]
        if parted:
            cells.append(f"{row.worst:.1f} ({row.worst_part})" if row.worst_part and row.worst < math.inf else "=")
        if scored:
            cells.append("not measured" if row.score is None else f"{row.score:.4g}")
        table.add_row(*cells, f"{row.seconds:.1f}")
    return table


def sheet_table(sheet: Sheet) -> Table:
    """The table of a sheet."""
    table = new_table(sheet.title, list(sheet.columns))
    for cells in sheet.rows:
        table.add_row(*map(str, cells))
    return table


def axis_table(axes: Sequence[AxisRow]) -> Table:
    """A line per axis that was cut."""
    table = new_table("axes that were cut", ["axis", "before", "after", "stays", "runs through", "parameters"])
    for axis in axes:
        share = f"{axis.after / axis.before:.1%}"
        table.add_row(axis.name, str(axis.before), str(axis.after), share, str(axis.members), f"{axis.parameters:,}")
    return table


def settings_table(passes: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A line per setting of every pass, also those at their defaults if the pass is installed."""
    from lobo_fx.contracts.passbase import shown  # a report is shown without PyTorch
    from lobo_fx.contracts.setting_facts import settings_of
    from lobo_fx.plugins.registry import PASSES

    table = new_table("settings", ["pass", "setting", "value", "default"])
    for name, given in passes:
        try:
            defaults = {setting.name: setting.default for setting in settings_of(PASSES.get(name))}
        except InvalidInput:
            defaults = {}
        for setting in {**defaults, **given}:
            default = defaults.get(setting, "not known")
            table.add_row(name, setting, shown(given[setting]) if setting in given else default, default)
    return table


def artifact_table(artifacts: Mapping[str, Artifact]) -> Table:
    """A line per file."""
    scored = any(artifact.score is not None for artifact in artifacts.values())
    columns = ["file", "label", "MB", "of original", "gzip MB", "parity", *(["score"] if scored else []), "kernels"]
    table = new_table("files", columns)
    first = next(iter(artifacts.values())).bytes
    for label, artifact in artifacts.items():
        gzipped = artifact.known_gzip_bytes
        score = "not measured" if artifact.score is None else f"{artifact.score:.4g}"
        table.add_row(
            artifact.path.name,
            label,
            decimals(artifact.bytes / MEGABYTE),
            f"{artifact.bytes / first:.2f}" if "original" in artifacts else "not measured",
            "not measured" if gzipped is None else decimals(gzipped / MEGABYTE),
            "not compared" if math.isnan(artifact.parity) else f"{artifact.parity:.1e}",
            *([score] if scored else []),
            ", ".join(f"{count} {name}" for name, count in artifact.details.get("kernels", {}).items()),
        )
    return table
