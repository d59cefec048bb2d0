"""The model card: what a file is, what it was made from and how to run it, for anyone who finds it beside the file.

Source: the idea, and what a card should tell: Mitchell et al., "Model Cards for Model Reporting", 2019.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.terminal.tables import decimals, escape, new_table, to_markdown

if TYPE_CHECKING:
    from lobo_fx.graph.signature import Signature
    from lobo_fx.report.report import Report

__all__ = ["model_card"]

_UNKNOWN = "not measured"
_NOTES = 20


def model_card(report: Report, facts: Mapping[str, str], signature: Signature, needs: str) -> str:
    """The card in markdown.

    Args:
        report: a report with the written files.
        facts: metadata of the compiled file.
        signature: its inputs and outputs.
        needs: what it requires of its runtime.
    """
    told = {name.removeprefix("lobo_fx."): value for name, value in facts.items()}
    file = report.artifacts["compiled"].path.name
    parts = [f"# {escape(report.model)}, compiled by lobo-fx {escape(told['version'])}\n"]
    parts.append(f"`{escape(file)}`, made on {told['date']}. {escape(needs)}\n")
    parts += ["## Before and after\n", _figures(report), "## What was done\n", _passes(json.loads(told["settings"]))]
    parts += ["## Inputs and outputs\n", _values(signature), "## How to run it\n", _code(file, signature)]
    made = new_table("", ["made of", "value"])
    for name in ("source_checksum", "calibration_rows_read", "calibration_checksum", "seed", "machine"):
        made.add_row(name.replace("_", " "), told.get(name, "none" if "calibration" in name else "not known"))
    for package, version in report.versions.items():
        made.add_row(package, version)
    parts += ["## Where it comes from\n", to_markdown(made)]
    if report.notes:
        shown = [f"- {escape(note)}" for note in report.notes[:_NOTES]]
        more = len(report.notes) - len(shown)
        parts += ["## What to know\n", "\n".join(shown + [f"- and {more} more in report.md"] * (more > 0)) + "\n"]
    return "\n".join(parts)


def _figures(report: Report) -> str:
    """Each figure of both files, or that it was not measured."""
    table = new_table("", ["", "original", "compiled"])
    rows = {"original": report.rows[0], "compiled": report.rows[-1]}
    latencies = {} if report.benchmark is None else report.benchmark.latencies

    def add(name: str, of: Any) -> None:
        table.add_row(name, *(of(label) for label in ("original", "compiled")))

    def file(label: str, form: Any) -> str:
        artifact = report.artifacts.get(label)
        return _UNKNOWN if artifact is None else str(form(artifact))

    def latency(label: str, form: Any) -> str:
        found = latencies.get(label)
        return _UNKNOWN if found is None else str(form(found))

    add("file, MB", lambda label: file(label, lambda a: decimals(a.bytes / MEGABYTE)))
    if report.benchmark is not None:
        threads, runtime = report.benchmark.threads, escape(report.benchmark.runtime)
        title = f"median latency, ms ({runtime}, {threads} thread{'s' * (threads > 1)}, batch {report.benchmark.batch})"
        add(title, lambda label: latency(label, lambda found: f"{found.p50:.3f}"))
        add("CPU time, ms", lambda label: latency(label, lambda found: f"{found.cpu:.3f}"))
    add("parameters", lambda label: f"{rows[label].parameters:,}")
    add("not zero", lambda label: f"{rows[label].nonzero:,}")
    add("score of the file", lambda label: file(label, lambda a: _UNKNOWN if a.score is None else f"{a.score:.6g}"))
    add("dB against the original", lambda label: "=" if rows[label].snr == math.inf else f"{rows[label].snr:.1f}")
    add(
        "largest difference from PyTorch",
        lambda label: file(label, lambda a: "not compared" if math.isnan(a.parity) else f"{a.parity:.1e}"),
    )
    return to_markdown(table)


def _passes(settings: list[tuple[str, dict[str, Any]]]) -> str:
    """Every pass with all its settings."""
    if not settings:
        return "Nothing.\n"
    said = []
    for name, given in settings:
        listed = ", ".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        said.append(f"1. {escape(name)}: {escape(listed) or 'no settings'}")
    return "\n".join(said) + "\n"


def _values(signature: Signature) -> str:
    table = new_table("", ["name", "is an", "type", "shape"])
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec is not None:
                shape = " x ".join(map(str, spec.shape)) or "one number"
                table.add_row(spec.name, kind, str(spec.dtype).removeprefix("torch."), shape)
    return to_markdown(table)


def _code(file: str, signature: Signature) -> str:
    """Code that calls the file on the sample beside it."""
    outputs = [spec.name for spec in signature.outputs if spec]
    return f"""```python
import numpy as np
import onnxruntime

sample = np.load("sample.npz")
session = onnxruntime.InferenceSession({json.dumps(file)}, providers=["CPUExecutionProvider"])
inputs = {{value.name: sample[f"input:{{value.name}}"] for value in session.get_inputs()}}
outputs = session.run({json.dumps(outputs)}, inputs)
np.testing.assert_allclose(outputs[0], sample["output:" + {json.dumps(outputs[0])}], rtol=1e-3, atol=1e-3)
```
"""
