"""The JSON schema of `report.json`, made from the record classes and their docstrings, and a check against it.

`python -m lobo_fx.report.schema > docs/report_schema.json` writes it to a file.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lobo_fx.graph.notes import Note
from lobo_fx.measures.latency import Benchmark
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.report.records import AxisRow, CandidateRow, ModuleRow, Row, Sheet

__all__ = ["SCHEMA", "first_fault", "schema"]

SCHEMA = 1
"""Raised whenever an entry is removed or changes its meaning; reports of another schema are refused."""

_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_PLAIN = {str: "string", Path: "string", int: "integer", bool: "boolean", types.NoneType: "null"}
_PYTHON: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "null": types.NoneType, "array": list,
    "object": dict,
}  # fmt: skip

_PARTS: dict[str, tuple[Any, str]] = {
    "model": (str, "name of the model's class, its path, or as the command line named it"),
    "machine": (str, "processor, system and Python that figures were measured on"),
    "versions": (dict[str, str], "of lobo_fx, torch and onnxruntime"),
    "seed": (int | None, "of whatever was drawn at random; null if not known"),
    "settings": (list[tuple[str, dict[str, Any]]], "of every pass, in order: its name, and its settings by name"),
    "passes": (list[Row], "a row for the original, then one for every pass"),
    "notes": (list[Note], "what a user should know"),
    "sheets": (list[Sheet], "tables that passes added: sensitivity, refitting, ranks, trainings"),
    "axes": (list[AxisRow], "axes that were cut, the one with most parameters first"),
    "modules": (list[ModuleRow], "modules that hold layers, in the order of calls; older reports have none"),
    "candidates": (list[CandidateRow], "what a search found"),
    "artifacts": (dict[str, Artifact], "files that were written, by label: original, compiled"),
    "benchmark": (Benchmark | None, "latencies of files that ran in turn; null if not measured"),
}

_ADDED = frozenset({"modules", "cpu_ratio"})
"""Entries, of the report or of a record, that older reports of this schema may lack."""


def schema() -> dict[str, Any]:
    """The schema of a whole report."""
    definitions: dict[str, Any] = {}
    parts = {name: {**_of(hint, definitions), "description": text} for name, (hint, text) in _PARTS.items()}
    checksums = {**_of(dict[str, str], definitions), "description": "SHA-256 of the files beside report.json"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lobo-fx report",
        "description": 'Numbers that JSON lacks are the texts "inf", "-inf" and "nan"; what was not measured is null.',
        "type": "object",
        "required": _required(["schema", *parts]),
        "properties": {"schema": {"const": SCHEMA}, **parts, "files": checksums},
        "$defs": dict(sorted(definitions.items())),
    }


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; records are defined once, under their names."""
    if hint is float:
        return dict(_NUMBER)
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if hint is Note:
        names = list(Note("").as_json())
        definitions["Note"] = _record(Note, {name: {"type": "string"} for name in names})
        return {"$ref": "#/$defs/Note"}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}
            hints = get_type_hints(hint)
            entries = {field.name: _of(hints[field.name], definitions) for field in dataclasses.fields(hint)}
            if hint is Artifact:
                entries["gzip_bytes"] = _of(int | None, definitions)
            definitions[hint.__name__] = _record(hint, entries)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        return {"anyOf": [_of(argument, definitions) for argument in arguments]}
    if origin is tuple and Ellipsis not in arguments:
        parts = [_of(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if origin in (list, tuple):
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    return {}


def _required(entries: Iterable[str]) -> list[str]:
    return [name for name in entries if name not in _ADDED]


def _record(record: type, entries: dict[str, Any]) -> dict[str, Any]:
    """The schema of a record; the attributes in its docstring describe the entries."""
    text = record.__doc__ or ""
    said = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", text, re.MULTILINE)) | {
        "gzip_bytes": "size after gzip at level 6; null if not measured"
    }
    described = {
        name: {**entry, "description": " ".join(said[name].split())} if name in said else entry
        for name, entry in entries.items()
    }
    return {
        "type": "object",
        "description": text.splitlines()[0],
        "required": _required(entries),
        "properties": described,
        "additionalProperties": False,
    }


def first_fault(value: Any) -> str | None:
    """The first deviation of a report from the schema, in words; None if there is none."""
    whole = schema()
    return next(_faults(value, whole, "report", whole["$defs"]), None)


def _faults(value: Any, wanted: Mapping[str, Any], place: str, definitions: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in wanted:
        wanted = definitions[wanted["$ref"].rpartition("/")[2]]
    if "anyOf" in wanted:
        if all(any(_faults(value, choice, place, definitions)) for choice in wanted["anyOf"]):
            yield f"{place} is {_shown(value)}"
        return
    if value not in wanted.get("enum", [value]) or value != wanted.get("const", value):
        yield f"{place} is {_shown(value)}"
    kind = wanted.get("type")
    if kind is not None and (
        not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))
    ):
        yield f"{place} is {_shown(value)}, no {kind}"
        return
    if kind == "object":
        yield from (f"{place} lacks '{name}'" for name in wanted.get("required", ()) if name not in value)
        known, others = wanted.get("properties", {}), wanted.get("additionalProperties", {})
        for name, entry in value.items():
            if name not in known and others is False:
                yield f"{place} has '{name}', which is unknown"
            else:
                yield from _faults(entry, known.get(name, others), f"{place}.{name}", definitions)
    if kind == "array":
        first = wanted.get("prefixItems", [])
        if first and len(value) != len(first):
            yield f"{place} holds {len(value)} entries, not {len(first)}"
        for index, entry in enumerate(value):
            of_entry = first[index] if index < len(first) else wanted["items"]
            yield from _faults(entry, of_entry or {}, f"{place}[{index}]", definitions)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 40 else f"{text[:36]} …"


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
