"""Bars of packed storage on ResNet-50: file size, time to load, first and later inferences, memory.

    python benchmarks/packed.py [--sparsity 0.3 0.5 0.7] [--rounds 9]

Weights are random (seed 0): sizes and times are real, accuracies are not. Each packed file is measured in turn with the
dense file of the same program: loading and the first inference in fresh processes, the least of all rounds, since other
work on the machine only adds; later inferences in one process, their medians; one thread. `sparse` is the peer, ONNX's
own sparse initializers in ONNX Runtime, whose indices take 64 bits each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

import lobo_fx
from lobo_fx import passes
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime, kernels
from lobo_fx.measures.latency import benchmark, random_arrays
from lobo_fx.measures.machine import machine
from lobo_fx.measures.memory import peak_memory_now
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.models import build
from lobo_fx.terminal.tables import new_table, render

COLUMNS = ["weights", "file / float", "allowed", "load s", "dense", "more", "CPU s more", "allowed", "first", "later"]
COLUMNS += ["peak MB", "dense"]
ALLOWED = {"float": {0.3: 0.74, 0.5: 0.54, 0.7: 0.34}, "int8": {0.3: 0.22, 0.5: 0.16, 0.7: 0.11}}


def load_once(path: Path) -> tuple[float, float, float, float]:
    """Seconds to load a file, CPU seconds of that, seconds of the first inference, and the peak memory in megabytes."""
    import onnxruntime  # noqa: F401  not part of the time

    start, cpu = time.perf_counter(), time.process_time()
    session = OnnxRuntime().load(path, 1)
    loaded, cpu = time.perf_counter() - start, time.process_time() - cpu
    feed = random_arrays(session.inputs, 1)
    begun = time.perf_counter()
    session.run(feed)
    return loaded, cpu, time.perf_counter() - begun, peak_memory_now() / 1e6


def load_in_turn(paths: list[Path], rounds: int) -> list[tuple[float, ...]]:
    """The least of `load_once` in fresh processes, the files in turn."""
    found: dict[Path, list[Any]] = {path: [] for path in paths}
    for index in range(-1, rounds):
        for path in paths:
            command = [sys.executable, __file__, "--load", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            if index >= 0:
                found[path].append(json.loads(done.stdout.splitlines()[-1]))
    return [tuple(map(min, zip(*found[path], strict=True))) for path in paths]


def with_sparse_initializers(dense: Path, path: Path) -> Path:
    """The dense file with what is half zeros and more as sparse initializers."""
    model = onnx.load(dense)
    graph = model.graph
    for tensor in list(graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.size > 1000 and (array == 0).mean() > 0.2 and array.dtype == np.float32:
            places = np.flatnonzero(array)
            values = numpy_helper.from_array(array.reshape(-1)[places], tensor.name)
            indices = numpy_helper.from_array(places.astype(np.int64), f"{tensor.name}_indices")
            graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
            graph.initializer.remove(tensor)
    onnx.save(model, path)
    return path


def measure(table: Any, name: str, files: dict[str, Path], whole: int, allowed: float | None, rounds: int) -> None:
    """Adds a row for each file that is not the first, the dense one."""
    dense, *others = files
    loads = dict(zip(files, load_in_turn(list(files.values()), rounds), strict=True))
    latencies = benchmark(files, OnnxRuntime(), rounds=5 * rounds, memory=False, progress=False)
    for label in others:
        (load, cpu, first, peak), base = loads[label], loads[dense]
        table.add_row(
            f"{name}, {label}",
            f"{files[label].stat().st_size / whole:.4f}",
            f"{allowed:g}" if allowed and label == "packed" else "",
            f"{load:.2f}",
            f"{base[0]:.2f}",
            f"{load - base[0]:.2f}",
            f"{cpu - base[1]:.2f}",
            f"{max(0.2 * base[0], 0.5):.2f}",
            f"{first / base[2]:.3f}",
            f"{latencies.ratio(label, 'p50'):.3f}",
            f"{peak:.0f}",
            f"{base[3]:.0f}",
        )
    print(render(table), flush=True)


def main() -> None:
    """Prints the table anew with each sparsity and form."""
    parser = argparse.ArgumentParser(description="Size and speed of packed files.")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="shares of zeros")
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes for each file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_once(options.load)))
        return
    model, inputs = build("torchvision:resnet50")
    assert inputs is not None
    inputs = inputs.map(lambda image: image[:1])
    data = random_batches(inputs, 4)
    table = new_table(f"packed storage of ResNet-50, {machine()}", COLUMNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sparsity in options.sparsity:
            pruning = [passes.FoldBatchNorm(), passes.PruneWeights(sparsity)]
            for form, more in {"float": [], "int8": [passes.QuantizeStatic()]}.items():
                result = lobo_fx.compile(
                    model, [*pruning, *more], example_inputs=inputs, calibration_data=data, progress=False
                )
                files = {storage: folder / f"{form}_{sparsity}_{storage}.onnx" for storage in ("dense", "packed")}
                for storage, path in files.items():
                    result.export(path, confirm=False, storage=storage)
                assert kernels(files["dense"]) == kernels(files["packed"])
                if form == "float":
                    original = result.export_original(folder / "original.onnx").bytes
                    files["sparse"] = with_sparse_initializers(files["dense"], folder / f"sparse_{sparsity}.onnx")
                measure(
                    table, f"{form}, {sparsity:.0%} zeros", files, original, ALLOWED[form].get(sparsity), options.rounds
                )


if __name__ == "__main__":
    main()
