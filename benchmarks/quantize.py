"""Int8 beside ONNX Runtime's own quantizer: latency against float, file size, signal-to-noise ratio.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --models timm:vit_tiny_patch16_224

Every variant of a model is measured in turn in one run: ONNX Runtime, one thread, one row; the same random
calibration data for all. Weights are random (seed 0): sizes and times are real, accuracies are not. The
signal-to-noise ratio is that of the outputs on a batch that calibration did not see.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lobo_fx
from lobo_fx.data import random_batches
from lobo_fx.exporters.onnx_runtime import OnnxRuntime
from lobo_fx.inputs import Inputs, find_inputs
from lobo_fx.measures import signal_to_noise
from lobo_fx.models import build
from lobo_fx.passbase import Pass
from lobo_fx.passes import MixedPrecision, QuantizeDynamic, QuantizeStatic
from lobo_fx.program import Program
from lobo_fx.quiet import quiet
from lobo_fx.reexport import named_arrays, with_rows
from lobo_fx.report import machine
from lobo_fx.runtime import benchmark
from lobo_fx.tables import new_table, render

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


def measure(name: str, rounds: int, folder: Path) -> list[list[str]]:
    """A row for each variant of a model."""
    model, inputs = build(name)
    assert isinstance(model, nn.Module)
    inputs = (find_inputs(model) if inputs is None else inputs).map(lambda tensor: tensor[:1])
    batches = random_batches(inputs, 4)
    files: dict[str, Path] = {}
    failed: dict[str, str] = {}
    program: Program | None = None
    for label, author in OURS.items():
        try:
            settings: dict[str, Any] = {"example_inputs": inputs, "calibration_data": batches, "progress": False}
            result = lobo_fx.compile(model, [author], **settings)
            if program is None:
                program = result.original
                files["float"] = result.export_original(folder / "float.onnx").path
            files[label] = result.export(folder / f"{len(files)}.onnx").path
        except lobo_fx.LoboError as error:
            failed[label] = str(error).splitlines()[0]
    assert program is not None
    feeds = [named_arrays(program, batch) for batch in batches]
    for label, make in variants_of_onnxruntime(files["float"], feeds).items():
        path = folder / f"{len(files)}.onnx"
        try:
            with quiet():
                make(path)
            files[label] = path
        except Exception as error:  # a library's own failure is a result
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
    return [*_rows(name, files, program, inputs, rounds), *([name, label, reason] for label, reason in failed.items())]


def _rows(name: str, files: dict[str, Path], program: Program, inputs: Inputs, rounds: int) -> list[list[str]]:
    unseen = next(iter(random_batches(inputs, 1, seed=1)))
    arrays = named_arrays(program, with_rows(program, 1))
    measured = benchmark(files, OnnxRuntime(), arrays=arrays, threads=1, rounds=rounds, memory=False)
    feed = named_arrays(program, unseen)
    outputs = {label: _floats(OnnxRuntime().load(path, 1).run(feed)) for label, path in files.items()}
    size = files["float"].stat().st_size
    return [
        [
            name,
            label,
            f"{measured.ratio(label):.2f}",
            f"{path.stat().st_size / size:.3f}",
            f"{signal_to_noise(outputs['float'], outputs[label]):.1f}",
        ]
        for label, path in files.items()
        if label != "float"
    ]


def _floats(arrays: list[Any]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays if array.dtype == np.float32]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="as the CLI names them")
    parser.add_argument("--rounds", type=int, default=20)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    table = new_table(f"Int8 against float, {machine()}", ["model", "variant", "latency", "file", "SNR dB"])
    for name in settings.models:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(name, settings.rounds, Path(folder)):
                print(*row, flush=True)
                table.add_row(*row, *[""] * (5 - len(row)))
    print(render(table))


if __name__ == "__main__":
    main()
