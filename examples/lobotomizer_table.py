"""Redoes a published compression table with honest columns: three models × seven pipelines, one command.

    python examples/lobotomizer_table.py [folder] [--rounds 10]

The original table (Lobotomizer v0.1, February 2026) reported ResNet-50, Whisper-tiny and MobileViT-v2-050 with
sizes and parameter counts. Here every row is also exported to ONNX, compared with PyTorch, and timed in ONNX
Runtime in turn with the original. Weights are random: sizes and latencies are real, accuracies are not.
A row is "OK" only when the outputs have the original's shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import lobo_fx
from lobo_fx import passes
from lobo_fx.data import random_batches
from lobo_fx.inputs import find_inputs
from lobo_fx.models import build
from lobo_fx.registry import RUNTIMES
from lobo_fx.report import machine
from lobo_fx.runtime import benchmark
from lobo_fx.tables import new_table, render, to_markdown

MODELS = {
    "ResNet-50": "torchvision:resnet50",
    "Whisper-tiny": "transformers:whisper-tiny",
    "MobileViT-v2-050": "timm:mobilevitv2_050",
}
PIPELINES: dict[str, list[lobo_fx.Pass]] = {
    "Prune 30% (unstructured L1)": [passes.PruneWeights(0.3)],
    "Quantize (static int8)": [passes.QuantizeStatic()],
    "Prune 30% + Quantize": [passes.PruneWeights(0.3), passes.QuantizeStatic()],
    **{f"Structured Prune {share}%": [passes.PruneChannels(share / 100)] for share in (30, 50, 70)},
    "Structured Prune 50% + Quantize": [passes.PruneChannels(0.5), passes.QuantizeStatic()],
}
MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table; sizes in memory as the original table has them, in MiB."""

    model: str
    pipeline: str
    cells: tuple[str, ...]


COLUMNS = [
    *("Model", "Pipeline", "Orig Size (MB)", "Comp Size (MB)", "Ratio", "Params Before", "Params After", "Non-zero"),
    *("Forward OK", "Time (s)", "ONNX (MB)", "ONNX ratio", "gzip (MB)", "gzip ratio", "Parity", "SNR (dB)"),
    "Latency ratio",
]


def measure_model(name: str, spec: str, rounds: int) -> list[Line]:
    """All pipelines on one model, their files timed in turn with the original's."""
    model, inputs = build(spec)
    if inputs is None:
        assert not isinstance(model, (str, Path))
        inputs = find_inputs(model)  # type: ignore[arg-type]
    data = random_batches(inputs, 4)
    results: dict[str, lobo_fx.Result] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for pipeline, chosen in PIPELINES.items():
            start = time.perf_counter()
            result = lobo_fx.compile(model, chosen, example_inputs=inputs, calibration_data=data)
            seconds[pipeline] = time.perf_counter() - start
            if not files:
                files["original"] = result.export_original(Path(folder) / "original.onnx").path
                original = result.report.artifacts["original"]
            files[pipeline] = result.export(Path(folder) / f"{len(files)}.onnx").path
            results[pipeline] = result
        measured = benchmark(files, RUNTIMES.get("onnxruntime")(), rounds=rounds, memory=False)
        return [
            Line(name, pipeline, _cells(results[pipeline], original, measured.ratio(pipeline), seconds[pipeline]))
            for pipeline in PIPELINES
        ]


def _cells(result: lobo_fx.Result, original: lobo_fx.Artifact, latency: float, seconds: float) -> tuple[str, ...]:
    assert result.original is not None
    before, after, file = result.report.rows[0], result.report.rows[-1], result.report.artifacts["compiled"]
    same_shapes = result.program.signature.outputs == result.original.signature.outputs
    return (
        f"{before.bytes / MEBIBYTE:.2f}",
        f"{after.bytes / MEBIBYTE:.2f}",
        f"{before.bytes / after.bytes:.2f}x",
        f"{before.parameters:,}",
        f"{after.parameters:,}",
        f"{after.nonzero:,}",
        "OK" if same_shapes else "FAILED",
        f"{seconds:.1f}",
        f"{file.bytes / MEBIBYTE:.2f}",
        f"{original.bytes / file.bytes:.2f}x",
        f"{file.gzip_bytes / MEBIBYTE:.2f}",
        f"{original.gzip_bytes / file.gzip_bytes:.2f}x",
        f"{file.parity:.1e}",
        f"{after.snr:.1f}",
        f"{latency:.2f}",
    )


def main() -> None:
    """Prints the table and writes it as markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("out/lobotomizer_table"))
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each file")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    options: Any = parser.parse_args()
    lines = [line for name in options.models for line in measure_model(name, MODELS[name], options.rounds)]
    shown = new_table("ONNX Runtime, one thread, batch 1, random weights", COLUMNS)
    for line in lines:
        shown.add_row(line.model, line.pipeline, *line.cells)
    print(render(shown, width=260))
    options.folder.mkdir(parents=True, exist_ok=True)
    text = f"{to_markdown(shown)}\nMeasured on {machine()}; latency ratio = CPU time, compiled / original.\n"
    (options.folder / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
