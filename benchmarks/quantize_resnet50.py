"""Bars of static quantization on ResNet-50: compile time, file size, integer kernels, speed, memory.

    python benchmarks/quantize_resnet50.py

Weights are random (seed 0): sizes and times are real, accuracies are not. Every ratio is taken in one run;
latencies are measured in turn, one thread. Memory is the peak of fresh processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import lobo_fx
from lobo_fx import passes
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.inputs import Inputs
from lobo_fx.measures.machine import machine
from lobo_fx.measures.memory import peak_memory_now
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, render

SPEC = "torchvision:resnet50"


def model_and_input() -> tuple[torch.nn.Module, Inputs]:
    """ResNet-50 in inference mode and one image."""
    model, inputs = build(SPEC)
    assert isinstance(model, torch.nn.Module)
    assert inputs is not None
    return model.eval(), inputs.map(lambda image: image[:1])


def baseline_seconds(model: torch.nn.Module, inputs: Inputs, path: Path) -> float:
    """Time of `torch.export.export` and `torch.onnx.export(dynamo=True)`, the file saved."""
    start = time.perf_counter()
    with quiet():
        exported = torch.export.export(model, inputs.args, strict=False)
        written = torch.onnx.export(exported, dynamo=True, verbose=False)
        assert written is not None
        written.save(path)
    return time.perf_counter() - start


def memory(stage: str) -> int:
    """Peak bytes of a fresh process that builds the model and runs one stage: build, trace or compile."""
    done = subprocess.run([sys.executable, __file__, stage], capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def run_stage(stage: str) -> None:
    """Runs one stage and prints this process's peak memory in bytes."""
    model, inputs = model_and_input()
    if stage == "trace":
        trace(model, inputs)
    if stage == "compile":
        data = random_batches(inputs, 4)
        lobo_fx.compile(model, [passes.QuantizeStatic()], example_inputs=inputs, calibration_data=data)
    print(json.dumps(peak_memory_now()))


def main() -> None:
    """Prints each bar with what was measured."""
    model, inputs = model_and_input()
    data = random_batches(inputs, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        baseline_seconds(model, inputs, folder / "warm-up.onnx")
        lobo_fx.compile(model, [passes.QuantizeStatic()], example_inputs=inputs, calibration_data=data)
        baseline = baseline_seconds(model, inputs, folder / "baseline.onnx")
        start = time.perf_counter()
        result = lobo_fx.compile(model, [passes.QuantizeStatic()], example_inputs=inputs, calibration_data=data)
        compiled = time.perf_counter() - start
        artifact = result.export(folder / "model.onnx")
        exported = time.perf_counter() - start
        original = result.export_original(folder / "original.onnx")
        measured = result.benchmark(rounds=40)
    kernels = artifact.details["kernels"]
    floats = sum(count for kernel, count in kernels.items() if kernel in ("Conv", "FusedConv"))
    size = result.report.rows[0].bytes
    extra = memory("compile") - memory("trace")
    table = new_table(f"QuantizeStatic on ResNet-50, {machine()}", ["bar", "allowed", "measured"])
    table.add_row("compile / (export + onnx.export)", "4.00", f"{compiled / baseline:.2f} ({compiled:.1f} s)")
    table.add_row("the same, with result.export", "4.00", f"{exported / baseline:.2f} ({exported:.1f} s)")
    table.add_row("ONNX file / float file", "0.27", f"{artifact.bytes / original.bytes:.3f}")
    table.add_row("convolutions left float", "0", f"{floats} (integer: {kernels.get('QLinearConv', 0)})")
    table.add_row("latency float / int8, 1 thread", "≥ 3.00", f"{1 / measured.ratio('compiled'):.2f}")
    table.add_row("(peak of compile - of trace) / model", "4.00", f"{extra / size:.2f} ({extra / 1e6:.0f} MB)")
    table.add_row("signal-to-noise ratio", "", f"{result.report.rows[-1].snr:.1f} dB")
    print(render(table))


if __name__ == "__main__":
    run_stage(sys.argv[1]) if len(sys.argv) > 1 else main()
