"""What the examples of the reports share: options, runs measured here or read from a benchmark's results, the forms."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tasks.training import default_cache
from torch import nn
from torch.utils._pytree import tree_leaves

import lobo_fx
from lobo_fx import LoboError, Pass, Program
from lobo_fx.files import check_folder, read_json
from lobo_fx.graph.inputs import Inputs
from lobo_fx.measures.latency import MEGABYTE
from lobo_fx.report.comparison import Comparison
from lobo_fx.report.figures import Conditions, Figures
from lobo_fx.report.records import Sheet
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build_program
from lobo_fx.terminal.tables import printable

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "reports"
SMALL = {"Small CNN": f"{__file__}:small"}
"""For `--quick`, what stands for the models."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compress: the group it is of, the passes, and how its file stores weights."""

    group: str
    passes: Sequence[Pass]
    storage: str = "dense"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        runs: the original, then the variants.
        trainable: by name of the run, trainable parameters before and after.
        remark: how faithful outputs would be that never change, which decibels are to be read beside.
    """

    runs: list[Figures]
    trainable: dict[str, tuple[int, int]]
    remark: str


def small() -> tuple[nn.Module, torch.Tensor]:
    """A network that is compiled in a second, and its inputs."""
    stages = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stages, nn.Linear(32, 10)).eval(), torch.randn(2, 3, 12, 12)


def options(description: str, name: str, results: bool = False) -> argparse.Namespace:
    """What every report can be told on the command line; `results`: it reads those of the benchmark of its name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out") / name, help="folder to write (%(default)s)")
    if results:
        parser.add_argument("--results", type=Path, help=f"JSON file of the benchmark (docs/reports/{name}.json)")
        parser.add_argument("--quick", action="store_true", help="read what the benchmark's --quick left in the cache")
    else:
        parser.add_argument("--rounds", type=int, default=30, help="timed calls of each file (%(default)s)")
        parser.add_argument("--quick", action="store_true", help="a small model, a few variants and rounds")
    found = parser.parse_args()
    check_folder(found.output)
    if results:
        quick = default_cache() / "quick"
        found.results = found.results or (quick if found.quick else RESULTS) / f"{name}.json"
        if not found.results.is_file():
            sys.exit(f"not measured: run python benchmarks/{name}.py{' --quick' * found.quick}")
    elif found.quick:
        found.rounds = 3
    return found


def measured(name: str, spec: str, variants: Mapping[str, Variant], rounds: int, quick: bool = False) -> Measured:
    """Compiles, exports and times every variant in turn with the original; what can't be says why.

    Args:
        name: of the model, for headings.
        spec: builds it, with random weights.
        variants: by name.
        rounds: timed calls of each file.
        quick: only two variants of each group, memory not measured.
    """
    if quick:
        groups = {
            variant.group: [label for label in variants if variants[label].group == variant.group]
            for variant in variants.values()
        }
        variants = {label: variants[label] for labels in groups.values() for label in labels[:2]}
    torch.manual_seed(0)
    program = build_program(spec)
    data = random_batches(program.example_inputs, 4)
    runs: list[Figures] = []
    trainable: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        nothing = lobo_fx.compile(program, [], progress=False)
        original = nothing.export(Path(folder) / "original.onnx")
        for label, variant in variants.items():
            print(f"{name}: {label}", file=sys.stderr)
            try:
                result = lobo_fx.compile(program, variant.passes, calibration_data=data, progress=False)
                result.report.artifacts["original"] = original
                file = result.export(Path(folder) / "compiled.onnx", storage=variant.storage)
                result.benchmark(rounds=rounds, memory=not quick)
            except LoboError as error:
                runs.append(Figures(label, name, variant.group, " ".join(str(error).split())))
                continue
            runs.append(
                dataclasses.replace(
                    result.report.figures(label),
                    model=name,
                    group=variant.group,
                    gzip_bytes=file.gzip_bytes,
                    original_gzip_bytes=original.gzip_bytes,
                )
            )
            trainable[label] = _trainable(nothing.module), _trainable(result.module)
    first = [as_original(run) for run in runs if not run.fault][:1]
    remark = f"{name}: outputs that never change would have {constant_decibels(program, data):.1f} dB."
    return Measured([*first, *runs], trainable, remark)


def constant_decibels(program: Program, data: Sequence[Inputs]) -> float:
    """Signal-to-noise ratio of the outputs' mean over all rows: random weights hardly tell inputs apart."""
    with torch.no_grad():
        found = [next(leaf for leaf in tree_leaves(program.run(batch)) if leaf.is_floating_point()) for batch in data]
    outputs = torch.cat(found).double()
    return float(10 * torch.log10(outputs.square().mean() / (outputs - outputs.mean(0)).square().mean()))


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def as_original(run: Figures) -> Figures:
    """The original of a run as a run of its own: what was measured of it, beside itself."""
    sides = {field.name for field in dataclasses.fields(run)}
    same = {name.removeprefix("original_"): getattr(run, name) for name in sides if name.startswith("original_")}
    return dataclasses.replace(
        run, name="original", group="", decibels=float("inf"), nonzero=run.original_parameters, seconds=0.0, **same
    )


def run_of(model: str, name: str, row: Mapping[str, Any], original: Mapping[str, Any] | None) -> Figures:
    """The figures of a row of a benchmark's results; the original's latency is that measured in turn with it."""
    first = original or {}
    return Figures(
        name,
        model,
        bytes=row["bytes"],
        original_bytes=first.get("bytes"),
        gzip_bytes=row["gzip bytes"],
        original_gzip_bytes=first.get("gzip bytes"),
        milliseconds=row["ms"],
        original_milliseconds=row["ms"] / row["ratio"],
        added_memory=row.get("memory"),
        original_added_memory=first.get("memory"),
        parameters=row.get("parameters"),
        nonzero=row.get("non-zero"),
        original_parameters=first.get("parameters"),
        seconds=row["seconds"],
        conditions=Conditions(row["machine"]),
    )


def read_results(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by network and name."""
    return read_json(path)


def original_row(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the original, if it was measured."""
    return next((row for name, row in rows.items() if name.lower() == "original"), None)


def before_and_after(run: Figures) -> Sheet:
    """What the original and a run need, with the change."""
    quantities = {
        "size of the file, MB": ("bytes", MEGABYTE),
        "size after gzip, MB": ("gzip_bytes", MEGABYTE),
        "median latency, ms": ("milliseconds", 1),
        "memory, MB": ("added_memory", MEGABYTE),
        f"{run.unit} a second": ("rate", 1),
        "parameters": ("parameters", 1),
    }
    rows = []
    for title, (name, scale) in quantities.items():
        before, after = getattr(run, f"original_{name}"), getattr(run, name)
        change = "not measured" if before is None or after is None else f"{after / before - 1:+.1%}"
        cells = (
            "not measured" if value is None else value / scale if scale > 1 else value for value in (before, after)
        )
        rows.append((title, *cells, change))
    return Sheet(f"{run.name}, before and after", ("", "original", run.name, "change"), tuple(rows))


def show(comparison: Comparison, folder: Path) -> None:
    """Prints the tables and charts, and writes all forms."""
    print(comparison)
    print(comparison.charts())
    written = ", ".join(file.name for file in comparison.save(folder))
    print(printable(f"written to {folder}: {written}"))
