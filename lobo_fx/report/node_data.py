"""Figures of a file's nodes for Model Explorer: one JSON file for each quantity, to overlay on the graph.

The format is that of its `node_data_builder`: a value by name of the graph and name of the node. A node without a
figure has no entry, since a figure that was not measured is not zero.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lobo_fx.measures.module_figures import ModuleFigures, is_inside
from lobo_fx.plugins.file_nodes import FileGraph
from lobo_fx.report.records import ModuleRow

__all__ = ["node_data", "with_times"]

_PALE_TO_DARK = [{"stop": 0, "bgColor": "#f3f7fd"}, {"stop": 1, "bgColor": "#1f5fbf"}]
_DARK_TO_PALE = [{"stop": 0, "bgColor": "#b86e00"}, {"stop": 1, "bgColor": "#f6fbf8"}]
_FLOAT, _INTEGER, _STORED = "#dfe3e8", "#bfe3d0", "#cfe0f7"


def node_data(
    graph: FileGraph, microseconds: Mapping[str, float], modules: Sequence[ModuleRow], label: str
) -> dict[str, str]:
    """The JSON text of each quantity (`microseconds`, `bytes`, `precision`, `decibels`) that has any figure.

    Args:
        graph: graph of the file.
        microseconds: times by name of the node.
        modules: modules of the report, for figures that the file does not hold: bits of codes, decibels.
        label: which file it is: `original` or `compiled`.
    """
    rows = {row.name: row for row in modules}
    layers = {node.name: rows[node.module] for node in graph.nodes if node.is_layer and node.module in rows}
    known = {name: figures for name, row in layers.items() if (figures := _figures(row, label)) and figures.kind}
    decibels = {name: layers[name].decibels for name in known} if label == "compiled" else {}
    precisions = {node.name: node.precision for node in graph.nodes} | {
        name: ", ".join(dict.fromkeys((figures.computed, figures.stored))) for name, figures in known.items()
    }
    quantities: dict[str, tuple[Mapping[str, Any], list[dict[str, Any]]]] = {
        "microseconds": ({node.name: microseconds.get(node.name) for node in graph.nodes}, _PALE_TO_DARK),
        "bytes": ({node.name: node.bytes or None for node in graph.nodes}, _PALE_TO_DARK),
        "precision": (precisions, []),
        "decibels": (decibels, _DARK_TO_PALE),
    }
    texts = {}
    for name, (values, gradient) in quantities.items():
        results = {node: {"value": value, **_style(value)} for node, value in values.items() if value not in (None, "")}
        if results:
            data = {"name": name, "results": results} | ({"gradient": gradient} if gradient else {})
            texts[name] = json.dumps({graph.name: data}, indent=1, allow_nan=False)
    return texts


def _figures(row: ModuleRow, label: str) -> ModuleFigures | None:
    return row.before if label == "original" else row.after


def _style(value: Any) -> dict[str, str]:
    """The colour of a precision; numbers are coloured by a gradient."""
    if not isinstance(value, str):
        return {}
    return {"bgColor": _INTEGER if value.startswith("int8") else _STORED if ", " in value else _FLOAT}


def with_times(
    modules: Sequence[ModuleRow], label: str, graph: FileGraph, microseconds: Mapping[str, float]
) -> list[ModuleRow]:
    """The modules with the times of the nodes inside of them; None for modules without timed nodes.

    Args:
        modules: modules of the report.
        label: which file it is: `original` or `compiled`.
        graph: graph of the file.
        microseconds: times by name of the node; the empty name holds those of no node, which count for the model.
    """
    homes = {node.name: node.module for node in graph.nodes} | {"": ""}
    rows = []
    for row in modules:
        spent = [time for name, time in microseconds.items() if is_inside(homes[name], row.name)]
        if (figures := _figures(row, label)) is not None:
            timed = dataclasses.replace(figures, microseconds=sum(spent) if spent else None)
            is_before = label == "original"
            row = dataclasses.replace(row, before=timed) if is_before else dataclasses.replace(row, after=timed)
        rows.append(row)
    return rows
