"""Bars of structured pruning: latency, time and memory of removal, beside Torch-Pruning where that works.

    python benchmarks/prune_channels.py
    python benchmarks/prune_channels.py --models torchvision:resnet50

Every free width is halved (L2, multiples of 8). Weights are random (seed 0): sizes and times are real, accuracies
are not. Latencies are of ONNX files in ONNX Runtime, one thread, batch 1, measured in turn in one run. Seconds are
of inference, scoring and surgery together, against building Torch-Pruning's graph and pruning with it, best of
three each. Memory is the peak of fresh processes, less that of tracing alone; most of it, where models are small, is
what a single run of the original takes, which is in the last column.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lobo_fx
from lobo_fx.axes import Inference
from lobo_fx.axes.surgery import remove
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.measures.latency import benchmark
from lobo_fx.measures.machine import machine
from lobo_fx.measures.memory import peak_memory_now
from lobo_fx.passes import PruneChannels
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.sources.models import build
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, render

LATENCY_BARS = {
    "torchvision:resnet50": 0.28,
    "benchmarks/headed.py:whisper_tiny": 0.42,
    "timm:mobilevitv2_050": 0.46,
    "timm:vit_tiny_patch16_224": 0.30,
    "torchvision:swin_t": 0.40,
    "benchmarks/headed.py:bert_base": 0.30,
}
COMPARED = {
    "torchvision:resnet50": "fc",
    "torchvision:efficientnet_b0": "classifier.1",
    "timm:convnext_tiny": "head.fc",
}
"""Models that Torch-Pruning prunes with a generic call, and the layer whose outputs must stay."""
HALF = PruneChannels(0.5)


def model_and_inputs(name: str) -> tuple[nn.Module, Inputs]:
    """The model in inference mode, and the inputs it is traced with."""
    model, inputs = build(name)
    assert isinstance(model, nn.Module)
    return model.eval(), find_inputs(model) if inputs is None else inputs


def prune(program: Program, pass_: PruneChannels) -> Program:
    """Inference, scoring and surgery alone, without the checks that compile adds."""
    inference = Inference(program).run()
    remove(inference, pass_.removal(inference, Context(program.signature)))
    return program


def torch_pruning(model: nn.Module, images: torch.Tensor, head: str) -> nn.Module:
    """Half of every width by Torch-Pruning's generic call."""
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(head)],
        round_to=8,
    )
    pruner.step()
    return model


def best_of(count: int, prepare: Callable[[], Any], work: Callable[[Any], Any]) -> float:
    """Seconds of `work` on what `prepare` gives, the shortest of some runs."""
    found = []
    for _ in range(count):
        made = prepare()
        start = time.perf_counter()
        work(made)
        found.append(time.perf_counter() - start)
    return min(found)


def export(program: Program, path: Path) -> Path:
    """An ONNX file, compared with PyTorch."""
    return OnnxExporter().export(program, path, {}).path


def ratio(program: Program, files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Latency of each file against the first, one thread, one row, in turn."""
    arrays = named_arrays(program, with_rows(program, 1))
    measured = benchmark(files, OnnxRuntime(), arrays=arrays, threads=1, rounds=rounds, memory=False)
    return {label: measured.ratio(label) for label in files}


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def memory(stage: str, name: str) -> int:
    """Peak bytes of a fresh process that traces a model, and then runs or prunes it."""
    command = [sys.executable, __file__, "--stage", stage, "--models", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


def run_stage(stage: str, name: str) -> None:
    """Runs one stage and prints this process's peak memory in bytes."""
    model, inputs = model_and_inputs(name)
    if stage in ("trace", "run"):
        program = trace(model, inputs)
        if stage == "run":
            program.run()
    else:
        lobo_fx.compile(model, [HALF], example_inputs=inputs, progress=False)
    print(json.dumps(peak_memory_now()))


def row(name: str, rounds: int, folder: Path) -> list[str]:
    """Share of parameters, latency ratio, seconds and memory of one model."""
    model, inputs = model_and_inputs(name)
    original = trace(model, inputs)
    seconds = best_of(3, original.clone, lambda program: prune(program, HALF))
    pruned = lobo_fx.compile(model, [HALF], example_inputs=inputs, progress=False).program
    files = {"original": export(original, folder / "original.onnx"), "pruned": export(pruned, folder / "pruned.onnx")}
    latency = ratio(original, files, rounds)["pruned"]
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    traced = memory("trace", name)
    extra, run = ((memory(stage, name) - traced) / size for stage in ("prune", "run"))
    kept = count(pruned.module) / count(original.module)
    bar = LATENCY_BARS.get(name)
    return [
        name,
        f"{kept:.2f}",
        f"{latency:.2f}",
        f"{bar:.2f}" if bar else "",
        f"{seconds:.2f}",
        f"{extra:.2f}",
        f"{run:.2f}",
    ]


def compare(name: str, head: str, rounds: int, folder: Path) -> list[str]:
    """Seconds and latency at the parameters that Torch-Pruning leaves."""
    model, inputs = model_and_inputs(name)
    images = inputs.leaves[0]
    original = trace(model, inputs)
    with quiet():
        theirs_seconds = best_of(3, lambda: copy.deepcopy(model), lambda twin: torch_pruning(twin, images, head))
        theirs = trace(torch_pruning(copy.deepcopy(model), images, head), inputs)
    kept = count(theirs.module) / count(original.module)
    pass_ = PruneChannels(target="parameters", keep=kept)
    seconds = best_of(3, original.clone, lambda program: prune(program, HALF))
    ours = lobo_fx.compile(model, [pass_], example_inputs=inputs, progress=False).program
    files = {
        label: export(program, folder / f"{label}.onnx")
        for label, program in {"original": original, "theirs": theirs, "ours": ours}.items()
    }
    found = ratio(original, files, rounds)
    share = count(ours.module) / count(original.module)
    times = f"{seconds:.2f} / {theirs_seconds:.2f} = {seconds / theirs_seconds:.2f}"
    return [name, f"{kept:.3f}", f"{share:.3f}", f"{found['theirs']:.3f}", f"{found['ours']:.3f}", times]


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({*LATENCY_BARS, *COMPARED}), help="as the CLI names them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--stage", choices=["trace", "run", "prune"], help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.stage:
        run_stage(settings.stage, settings.models[0])
        return
    torch.set_num_threads(1)
    first = new_table(
        f"Half of every width, {machine()}",
        ["model", "parameters", "latency", "bar", "seconds", "memory / model", "one run"],
    )
    second = new_table(
        "Beside Torch-Pruning 1.6",
        ["model", "its parameters", "ours", "its latency", "ours", "seconds ours / its"],
    )
    with tempfile.TemporaryDirectory() as name:
        for model in settings.models:
            if model in LATENCY_BARS:
                first.add_row(*row(model, settings.rounds, Path(name)))
                print(" ".join(map(str, [list(column.cells)[-1] for column in first.columns])), flush=True)
            if model in COMPARED:
                second.add_row(*compare(model, COMPARED[model], settings.rounds, Path(name)))
                print(" ".join(map(str, [list(column.cells)[-1] for column in second.columns])), flush=True)
    print(render(first))
    print(render(second))


if __name__ == "__main__":
    main()
