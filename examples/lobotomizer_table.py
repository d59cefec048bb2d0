"""Redoes a published compression table with honest columns: three models × seven pipelines, one command.

    python examples/lobotomizer_table.py [folder] [--rounds 10] [--models ResNet-50]

The original table (Lobotomizer v0.1, February 2026) reported ResNet-50, Whisper-tiny and MobileViT-v2-050 with
sizes and parameter counts. Here every row is also exported to ONNX, compared with PyTorch, and timed in ONNX
Runtime in turn with the original. Weights are random: sizes and latencies are real, accuracies are not. Whisper has its
head and gives logits, as it is deployed. Tracing, done once a model, is not part of the times.
"Forward OK" means that the outputs have the original's shapes and are finite; a row that can't be compiled or
exported says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import lobo_fx
from lobo_fx import Artifact, LoboError, Pass, Program, Result, passes
from lobo_fx.files import check_folder, write_files
from lobo_fx.graph.inputs import Inputs
from lobo_fx.measures.latency import benchmark, check_counts
from lobo_fx.measures.machine import machine
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build_program
from lobo_fx.terminal.tables import new_table, render, to_markdown

Pipelines = dict[str, list[Pass]]

MODELS = {
    "ResNet-50": "torchvision:resnet50",
    "Whisper-tiny": "transformers:whisper-tiny",
    "MobileViT-v2-050": "timm:mobilevitv2_050",
}
PIPELINES: Pipelines = {
    "Prune 30% (unstructured L1)": [passes.PruneWeights(0.3)],
    "Quantize (static int8)": [passes.QuantizeStatic()],
    "Prune 30% + Quantize": [passes.PruneWeights(0.3), passes.QuantizeStatic()],
    **{f"Structured Prune {share}%": [passes.PruneChannels(share / 100)] for share in (30, 50, 70)},
    "Structured Prune 50% + Quantize": [passes.PruneChannels(0.5), passes.QuantizeStatic()],
}
MEBIBYTE = 2**20
COLUMNS = [
    *("Model", "Pipeline", "Orig Size (MB)", "Comp Size (MB)", "Ratio", "Params Before", "Params After", "Non-zero"),
    *("Forward OK", "Time (s)", "ONNX (MB)", "ONNX ratio", "gzip (MB)", "gzip ratio", "Parity", "SNR (dB)"),
    "Latency ratio",
]


@dataclasses.dataclass(frozen=True)
class Done:
    """A pipeline that went well, and how long it took."""

    result: Result
    file: Artifact
    seconds: float


def measure_model(name: str, spec: str, pipelines: Pipelines, rounds: int) -> list[list[str]]:
    """The lines of one model: every pipeline, its file timed in turn with the original's."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = build_program(spec)
            data = random_batches(program.example_inputs, 4)
            base = run_pipeline(program, [], data, Path(folder) / "original.onnx")
        except LoboError as error:
            return [failed(name, pipeline, error) for pipeline in pipelines]
        found: dict[str, Done | LoboError] = {}
        for index, (pipeline, chosen) in enumerate(pipelines.items()):
            try:
                found[pipeline] = run_pipeline(program, chosen, data, Path(folder) / f"{index}.onnx")
            except LoboError as error:
                found[pipeline] = error
        files = {
            "original": base.file.path,
            **{p: done.file.path for p, done in found.items() if isinstance(done, Done)},
        }
        measured = benchmark(files, RUNTIMES.get(RUNTIMES.default)(), rounds=rounds, memory=False)
        return [
            [name, pipeline, *cells(done, base, measured.ratio(pipeline))]
            if isinstance(done, Done)
            else failed(name, pipeline, done)
            for pipeline, done in found.items()
        ]


def run_pipeline(program: Program, chosen: list[Pass], data: list[Inputs], file: Path) -> Done:
    """Compiles and exports."""
    start = time.perf_counter()
    result = lobo_fx.compile(program, chosen, calibration_data=data)
    seconds = time.perf_counter() - start
    return Done(result, result.export(file), seconds)


def forward_ok(result: Result) -> bool:
    """Whether the compiled model's outputs have the original's shapes and are finite."""
    assert result.original is not None
    expected, found = (tree_leaves(program.run()) for program in (result.original, result.program))
    shapes = [[getattr(leaf, "shape", None) for leaf in leaves] for leaves in (expected, found)]
    tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
    return shapes[0] == shapes[1] and all(bool(tensor.isfinite().all()) for tensor in tensors)


def failed(name: str, pipeline: str, error: LoboError) -> list[str]:
    """A line that says why there are no figures."""
    reason = " ".join(str(error).split())
    cells = {"Model": name, "Pipeline": f"{pipeline}: {reason}", "Forward OK": "FAILED"}
    return [cells.get(column, "") for column in COLUMNS]


def cells(done: Done, base: Done, latency: float) -> list[str]:
    """The figures of a line."""
    rows = done.result.report.rows
    before, after, file, original = rows[0], rows[-1], done.file, base.file
    return [
        f"{before.bytes / MEBIBYTE:.2f}",
        f"{after.bytes / MEBIBYTE:.2f}",
        f"{before.bytes / after.bytes:.2f}x",
        f"{before.parameters:,}",
        f"{after.parameters:,}",
        f"{after.nonzero:,}",
        "OK" if forward_ok(done.result) else "FAILED",
        f"{done.seconds:.1f}",
        f"{file.bytes / MEBIBYTE:.2f}",
        f"{original.bytes / file.bytes:.2f}x",
        f"{file.gzip_bytes / MEBIBYTE:.2f}",
        f"{original.gzip_bytes / file.gzip_bytes:.2f}x",
        f"{file.parity:.1e}",
        f"{after.snr:.1f}",
        f"{latency:.2f}",
    ]


def write_table(lines: list[list[str]], folder: Path) -> str:
    """Writes `table.md` into a folder, and returns the table as text."""
    shown = new_table("ONNX Runtime, one thread, batch 1, random weights", COLUMNS)
    for line in lines:
        shown.add_row(*line)
    text = f"{to_markdown(shown)}\nMeasured on {machine()}; latency ratio = CPU time, compiled / original.\n"
    write_files(folder, {"table.md": text})
    return render(shown, width=260)


def main() -> None:
    """Prints the table and writes it as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/lobotomizer_table"))
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each file")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options: Any = parser.parse_args()
    check_counts(rounds=options.rounds)
    check_folder(options.folder)
    lines = []
    for name in options.models:
        lines += measure_model(name, MODELS[name], PIPELINES, options.rounds)
    print(write_table(lines, options.folder))


if __name__ == "__main__":
    main()
