"""Int8 beside ONNX Runtime's own quantizer and NNCF: latency against float, file size, signal-to-noise ratio.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --models timm:vit_tiny_patch16_224
    pip install -e '.[nncf]'  # adds NNCF's rows; it reports its use to its authors until `opt_in_out --opt_out`

Every variant of a model is measured in turn in one run: one thread, one row, CPU time; the same random calibration
data for all. Everything is compared with the float file in ONNX Runtime, which runs all but the rows of OpenVINO;
OpenVINO gets fixed shapes. What stays float it computes in float32, and in bfloat16 in rows of their own where the
CPU has that, its default there. Weights are random (seed 0): sizes and times are real, accuracies are not. The
signal-to-noise ratio is that of the outputs on eight rows that calibration did not see. Outputs of random networks
hardly depend on their inputs; "varying" leaves out what the eight rows have in common. With --statistics, batch norms
get those of random data first: without, activations may shrink from layer to layer (to 4e-14 in EfficientNet-B0),
which some tools round to zero.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lobo_fx
from lobo_fx.contracts.passbase import Pass
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.sized_inputs import named_arrays, with_rows
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.latency import Benchmark, interleave
from lobo_fx.measures.machine import machine
from lobo_fx.passes import MixedPrecision, QuantizeDynamic, QuantizeStatic
from lobo_fx.plugins.protocols import Runtime, Session
from lobo_fx.sources.batches import random_batches
from lobo_fx.sources.known_inputs import find_inputs
from lobo_fx.sources.models import build
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, render

MODELS = [
    "torchvision:resnet50",
    "timm:mobilevitv2_050",
    "benchmarks/headed.py:whisper_tiny_encoder",
    "timm:vit_tiny_patch16_224",
    "torchvision:efficientnet_b0",
    "benchmarks/headed.py:bert_base",
    "benchmarks/headed.py:gpt2",
]
OURS: dict[str, Pass] = {
    "QuantizeStatic": QuantizeStatic(),
    "QuantizeStatic(kernels='all')": QuantizeStatic(kernels="all"),
    "MixedPrecision(decibels=31)": MixedPrecision(decibels=31),
    "QuantizeDynamic": QuantizeDynamic(),
}
_PRODUCTS = ["Conv", "MatMul", "Gemm"]
_HAS_NNCF = all(importlib.util.find_spec(name) for name in ("nncf", "openvino"))


def variants_of_onnxruntime(original: Path, batches: list[dict[str, Any]]) -> dict[str, Callable[[Path], None]]:
    """How people quantize with `onnxruntime.quantization`, by name."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[dict[str, Any]] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    def static(path: Path, **settings: Any) -> None:
        quantize_static(original, path, Reader(), activation_type=QuantType.QUInt8, per_channel=True, **settings)

    return {
        "onnxruntime static": lambda path: static(path),
        "onnxruntime static, products": lambda path: static(path, op_types_to_quantize=_PRODUCTS),
        "onnxruntime static, weights": lambda path: static(
            path, op_types_to_quantize=_PRODUCTS, extra_options={"MatMulConstBOnly": True}
        ),
        "onnxruntime dynamic": lambda path: quantize_dynamic(original, path, per_channel=True),
    }


def variants_of_nncf(original: Path, batches: list[dict[str, Any]]) -> dict[str, Callable[[Path], None]]:
    """NNCF's post-training quantization for OpenVINO and for ONNX Runtime, by name; none where it isn't installed."""
    if not _HAS_NNCF:
        return {}
    import nncf
    import onnx
    import openvino

    def read() -> Any:
        model = openvino.Core().read_model(original)
        model.reshape({name: array.shape for name, array in batches[0].items()})
        return model

    def quantize(model: Any) -> Any:
        kind = nncf.ModelType.TRANSFORMER if _attends(original) else None
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            return nncf.quantize(model, nncf.Dataset(batches), model_type=kind)

    return {
        "float, OpenVINO": lambda path: openvino.save_model(read(), path, compress_to_fp16=False),
        "NNCF, OpenVINO": lambda path: openvino.save_model(quantize(read()), path),
        "NNCF, onnxruntime": lambda path: onnx.save(quantize(onnx.load(original)), path),
    }


def _attends(path: Path) -> bool:
    """Whether a softmax is inside the network, not at its end."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    ends = {output.name for output in graph.output}
    return any(node.op_type == "Softmax" and not ends.intersection(node.output) for node in graph.node)


def measure(name: str, rounds: int, folder: Path, statistics: bool = False) -> list[list[str]]:
    """A row for each variant of a model."""
    model, inputs = build(name)
    assert isinstance(model, nn.Module)
    inputs = (find_inputs(model) if inputs is None else inputs).map(lambda tensor: tensor[:1])
    if statistics:
        wide = inputs.map(lambda tensor: tensor.repeat_interleave(8, 0))
        torch.optim.swa_utils.update_bn([batch.leaves[0] for batch in random_batches(wide, 2)], model)
    batches = random_batches(inputs, 4)
    files: dict[str, Path] = {}
    sessions: dict[str, Session] = {}
    failed: dict[str, str] = {}
    program: Program | None = None

    def load(label: str, path: Path) -> None:
        for suffix, runtime in _runtimes(path).items():
            sessions[label + suffix] = runtime.load(path, 1)
            files[label + suffix] = path

    for label, pass_ in OURS.items():
        try:
            settings: dict[str, Any] = {"example_inputs": inputs, "calibration_data": batches, "progress": False}
            result = lobo_fx.compile(model, [pass_], **settings)
            if program is None:
                program = result.original
                load("float", result.export_original(folder / "float.onnx").path)
            load(label, result.export(folder / f"{len(files)}.onnx").path)
        except lobo_fx.LoboError as error:
            failed[label] = str(error).splitlines()[0]
    assert program is not None
    feeds = [named_arrays(program, batch) for batch in batches]
    with quiet():
        variants = variants_of_onnxruntime(files["float"], feeds) | variants_of_nncf(files["float"], feeds)
    for label, make in variants.items():
        path = folder / f"{len(files)}{'.xml' if label.endswith('OpenVINO') else '.onnx'}"
        try:
            with quiet():
                make(path)
                load(label, path)
        except Exception as error:  # a library's own failure is a result
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
    rows = _rows(name, files, sessions, program, inputs, rounds)
    return [*rows, *([name, label, reason] for label, reason in failed.items())]


def _runtimes(path: Path) -> dict[str, Runtime]:
    """What runs a file, by what that adds to its label."""
    if path.suffix == ".onnx":
        return {"": OnnxRuntime()}
    import openvino
    from openvino_runtime import OpenVino

    narrow = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"": OpenVino(), **({", bfloat16": OpenVino("bf16")} if narrow else {})}


def _rows(
    name: str, files: dict[str, Path], sessions: dict[str, Session], program: Program, inputs: Inputs, rounds: int
) -> list[list[str]]:
    arrays = named_arrays(program, with_rows(program, 1))
    calls = {label: functools.partial(session.run, arrays) for label, session in sessions.items()}
    measured = Benchmark("onnxruntime", 1, 1, rounds, interleave(calls, rounds=rounds, warmup=3, rows=1))
    unseen = [named_arrays(program, batch) for batch in random_batches(inputs, 8, seed=1)]
    outputs = {label: [_floats(session.run(feed)) for feed in unseen] for label, session in sessions.items()}
    return [
        [
            name,
            label,
            f"{measured.ratio(label):.2f}",
            f"{_size(path) / _size(files['float']):.3f}",
            f"{signal_to_noise(outputs['float'], outputs[label]):.1f}",
            f"{signal_to_noise(_varying(outputs['float']), _varying(outputs[label])):.1f}",
        ]
        for label, path in files.items()
        if label != "float"
    ]


def _varying(rows: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Outputs less their mean over the rows."""
    means = [torch.stack(found).mean(0) for found in zip(*rows, strict=True)]
    return [[value - mean for value, mean in zip(row, means, strict=True)] for row in rows]


def _size(path: Path) -> int:
    """Bytes of a file; OpenVINO keeps the weights in one beside it."""
    return sum(part.stat().st_size for part in {path, path.with_suffix(".bin")} if part.is_file())


def _floats(arrays: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays if array.dtype == np.float32]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="as the CLI names them")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--statistics", action="store_true", help="batch norms take their statistics from random data")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if not _HAS_NNCF:
        print("NNCF is not installed: pip install -e '.[nncf]'")
    table = new_table(
        f"Int8 against float, {machine()}", ["model", "variant", "latency", "file", "SNR dB", "varying dB"]
    )
    for name in settings.models:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(name, settings.rounds, Path(folder), settings.statistics):
                print(*row, flush=True)
                table.add_row(*row, *[""] * (6 - len(row)))
    print(render(table))


if __name__ == "__main__":
    main()
