"""Weight-only and dynamic quantization of a 110-million-parameter decoder, beside ONNX Runtime's own quantizers.

    python benchmarks/quantize_weights.py [layers] [file ...]

The decoder is GPT-2's (12 layers, width 768; the output layer is not tied, since ONNX Runtime's quantizer passes
tied ones over). Weights are random (seed 0): sizes, times and signal-to-noise ratios are real, accuracies are not.
All files run in turn, one thread, with 32 tokens and with one (as in decoding, where every product has one row);
ratios are to the float file. Where files are named, no others are made: `… 12 int4`.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import lobo_fx
from lobo_fx import passes
from lobo_fx.contracts.passbase import Pass
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.latency import Benchmark, benchmark
from lobo_fx.measures.machine import machine
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, render

WIDTH, VOCABULARY, TOKENS = 768, 16384, 32
BLOCK_SIZE = 32

OURS: dict[str, tuple[Pass, bool]] = {
    "int4": (passes.QuantizeWeights("int4", BLOCK_SIZE), False),
    "int4, calibrated": (passes.QuantizeWeights("int4", BLOCK_SIZE), True),
    "int4, compute float32": (passes.QuantizeWeights("int4", BLOCK_SIZE, compute="float32"), False),
    "int8": (passes.QuantizeWeights("int8", BLOCK_SIZE), False),
    "int8, compute int8": (passes.QuantizeWeights("int8", BLOCK_SIZE, compute="int8"), False),
    "log2_6": (passes.QuantizeWeights("log2_6", BLOCK_SIZE), False),
    "e4m3": (passes.QuantizeWeights("e4m3", BLOCK_SIZE), False),
    "dynamic": (passes.QuantizeDynamic(), False),
}


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.projection = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.attention_norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (12, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(functional.gelu(self.up(self.norm(x)), approximate="tanh"))
        return x + down


class Decoder(nn.Module):
    """Tokens to logits."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.layers(x)))


@dataclasses.dataclass(frozen=True)
class Written:
    """A file, and how long it took to make it."""

    path: Path
    seconds: float


def ours(model: nn.Module, tokens: torch.Tensor, folder: Path, labels: Sequence[str]) -> dict[str, Written]:
    """Each pass alone, and the float file first."""
    data = [torch.randint(VOCABULARY, (4, TOKENS)) for _ in range(8)]
    found: dict[str, Written] = {}
    for label, (pass_, calibrated) in ((label, OURS[label]) for label in labels or OURS):
        result = lobo_fx.compile(
            model,
            [pass_],
            example_inputs=tokens,
            dynamic_shapes={"tokens": {1: torch.export.Dim("length", max=TOKENS)}},
            calibration_data=data if calibrated else None,
            progress=False,
        )
        if not found:
            found["float"] = Written(result.export_original(folder / "float.onnx").path, 0.0)
        path = result.export(folder / f"{label}.onnx").path
        found[label] = Written(path, result.report.rows[-1].seconds)
    return found


def onnx_runtimes(source: Path, folder: Path) -> dict[str, Written]:
    """ONNX Runtime's quantizers on the float file, embeddings included."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    def four_bits(path: Path, symmetric: bool, level: int = 1) -> None:
        config = DefaultWeightOnlyQuantConfig(
            BLOCK_SIZE,
            is_symmetric=symmetric,
            accuracy_level=level,
            op_types_to_quantize=("MatMul", "Gather"),
            quant_axes=(("MatMul", 0), ("Gather", 1)),
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path))

    makers: dict[str, Callable[[Path], None]] = {
        "onnxruntime int4": lambda path: four_bits(path, symmetric=False),
        "onnxruntime int4, level 4": lambda path: four_bits(path, symmetric=False, level=4),
        "onnxruntime int4, symmetric": lambda path: four_bits(path, symmetric=True),
        "onnxruntime dynamic": lambda path: quantize_dynamic(source, path, per_channel=True),
    }
    found = {}
    for label, make in makers.items():
        start = time.perf_counter()
        with quiet():
            make(folder / f"{label}.onnx")
        found[label] = Written(folder / f"{label}.onnx", time.perf_counter() - start)
    return found


def load_seconds(path: Path) -> float:
    """Least of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        OnnxRuntime().load(path, threads=1)
        times.append(time.perf_counter() - start)
    return min(times)


def print_table(
    files: dict[str, Written], measured: Benchmark, one: Benchmark, tokens: torch.Tensor, parameters: int
) -> None:
    """A row a file."""
    feed = {"tokens": tokens.numpy()}
    outputs = {
        label: torch.from_numpy(OnnxRuntime().load(file.path, threads=1).run(feed)[0]) for label, file in files.items()
    }
    title = f"decoder of {parameters / 1e6:.0f} million parameters, blocks of {BLOCK_SIZE}, {machine()}"
    table = new_table(
        title, ["file", "float / size", "SNR (dB)", "latency ratio", "at one token", "load (s)", "made in (s)"]
    )
    sizes = {label: file.path.stat().st_size for label, file in files.items()}
    for label, file in files.items():
        table.add_row(
            label,
            f"{sizes['float'] / sizes[label]:.2f}",
            f"{signal_to_noise(outputs['float'], outputs[label]):.2f}",
            f"{measured.ratio(label):.2f}",
            f"{one.ratio(label):.2f}",
            f"{load_seconds(file.path):.2f}",
            f"{file.seconds:.0f}",
        )
    print(render(table))


def main(layers: int, labels: Sequence[str]) -> None:
    """Prints files beside each other."""
    torch.manual_seed(0)
    model = Decoder(layers).eval()
    tokens = torch.randint(VOCABULARY, (1, TOKENS))
    with tempfile.TemporaryDirectory() as name:
        files = ours(model, tokens, Path(name), labels)
        if not labels:
            files |= onnx_runtimes(files["float"].path, Path(name))
        paths = {label: file.path for label, file in files.items()}
        measured, one = (
            benchmark(paths, OnnxRuntime(), arrays={"tokens": fed.numpy()}, memory=False, rounds=20, progress=False)
            for fed in (tokens, tokens[:, :1])
        )
        print_table(files, measured, one, tokens, sum(parameter.numel() for parameter in model.parameters()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12, sys.argv[2:])
