"""Converts the contents of a report to JSON and back without loss.

JSON has no infinity and no NaN: such numbers are written as the texts "inf", "-inf" and "nan".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobo_fx.graph.notes import Note
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.measures.module_figures import ModuleFigures
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.report.records import CandidateRow, ModuleRow, Row, Sheet

__all__ = [
    "artifact_from_json",
    "artifact_is_there",
    "as_json",
    "benchmark_from_json",
    "candidate_from_json",
    "module_from_json",
    "row_from_json",
    "sheet_from_json",
]


def as_json(value: Any) -> Any:
    """Converts records, mappings, sequences, paths and numbers to what JSON has; anything else to text."""
    if isinstance(value, Note):
        return value.as_json()
    if isinstance(value, Artifact):
        return as_json({**vars_of(value), "gzip_bytes": value.known_gzip_bytes})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json(vars_of(value))
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def vars_of(record: Any) -> dict[str, Any]:
    """The fields of a record by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def row_from_json(saved: Mapping[str, Any]) -> Row:
    """A row."""
    score = None if saved["score"] is None else float(saved["score"])
    decibels = {name: float(saved[name]) for name in ("snr", "worst") if name in saved}
    return Row(**{**saved, **decibels, "score": score})


def sheet_from_json(saved: Mapping[str, Any]) -> Sheet:
    """A sheet."""
    return Sheet(saved["title"], tuple(saved["columns"]), tuple(map(tuple, saved["rows"])))


def candidate_from_json(saved: Mapping[str, Any]) -> CandidateRow:
    """A candidate of a search."""
    score = None if saved["score"] is None else float(saved["score"])
    return CandidateRow(**{**saved, "decibels": float(saved["decibels"]), "score": score})


def module_from_json(saved: Mapping[str, Any]) -> ModuleRow:
    """A module."""
    before, after = (None if saved[at] is None else ModuleFigures(**saved[at]) for at in ("before", "after"))
    decibels = None if saved["decibels"] is None else float(saved["decibels"])
    return ModuleRow(saved["name"], before, after, decibels)


def benchmark_from_json(saved: Mapping[str, Any]) -> Benchmark:
    """Latencies."""
    latencies = {label: Latency(**entry) for label, entry in saved["latencies"].items()}
    return Benchmark(**{**saved, "latencies": latencies})


def artifact_from_json(saved: Mapping[str, Any]) -> Artifact:
    """A file that was written."""
    files = tuple(Path(file) for file in saved["files"])
    score = None if saved.get("score") is None else float(saved["score"])
    artifact = Artifact(Path(saved["path"]), files, saved["bytes"], float(saved["parity"]), saved["details"], score)
    if saved["gzip_bytes"] is not None:
        vars(artifact)["gzip_bytes"] = saved["gzip_bytes"]  # where the cached property keeps it
    return artifact


def artifact_is_there(artifact: Artifact) -> bool:
    """Whether its files still exist, with their total size unchanged."""
    there = all(file.is_file() for file in artifact.files)
    return there and sum(file.stat().st_size for file in artifact.files) == artifact.bytes
