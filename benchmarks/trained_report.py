"""What the reports share: variants of a trained network, each compiled, exported, scored and measured once.

Results are kept in a JSON file as they come; a report that is started again goes on with the first row that is missing.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import functools
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from command_line import add_networks
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from tasks import Split
from tasks.training import Loss, default_cache

import lobo_fx
from lobo_fx.content import checksum_of
from lobo_fx.contracts.passbase import Pass
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.file_module import FileModule
from lobo_fx.files import write_files
from lobo_fx.measures.latency import benchmark
from lobo_fx.measures.machine import machine
from lobo_fx.terminal.quiet import quiet
from lobo_fx.terminal.tables import new_table, to_markdown

__all__ = ["Results", "Trial", "Variant", "options", "torch_pruned"]

CALIBRATION = 256
VALIDATION = 2_000


MakeFile = Callable[[Path, Path, Sequence[Mapping[str, Any]]], None]
"""From the original's file to one of a peer, with arrays to calibrate with."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a report.

    Attributes:
        method: what is done, in the report's words.
        compression: how much.
        passes: what does it; none for the original.
        prepare: makes another module of the trained one before the passes run (a peer's pruning).
        make_file: makes a file of the exported original's instead of passes (a peer's quantization).
        settings: of what no pass says: a peer's.
    """

    method: str
    compression: str
    passes: Sequence[Pass] = ()
    prepare: Callable[[nn.Module], nn.Module] | None = None
    make_file: MakeFile | None = None
    settings: str = ""

    @property
    def key(self) -> str:
        return f"{self.method} {self.compression}".strip()

    @property
    def recipe(self) -> dict[str, Any]:
        """What a row is made with, which is kept in it: a row of other settings is not this one."""
        return {"passes": [str(pass_) for pass_ in self.passes], "settings": self.settings}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trained network, with all that its variants are made and judged with.

    Attributes:
        module: as it was trained.
        train: what may be learned from.
        validation: what chooses the best weights.
        test: what the report tells.
        loss: to train with; None where nothing is learned from labels.
        score: of a module on a split; higher is better.
        batch: rows of a training batch.
        calibration: how many rows of `train` calibrate.
        workdir: where programs between passes are kept: variants that begin with the same passes share them, and a
            report that was killed goes on within a row.
    """

    module: nn.Module
    train: Split
    validation: Split
    test: Split
    loss: Loss | None
    score: Callable[[nn.Module, Split], float]
    batch: int = 128
    calibration: int = CALIBRATION
    workdir: Path | None = None

    def run(self, variant: Variant, rounds: int, tell: Callable[[FileModule], Mapping[str, Any]]) -> dict[str, Any]:
        """Compiles, exports and measures a variant.

        Args:
            variant: what to do.
            rounds: of measuring latency, in turn with the original.
            tell: figures of the exported file.
        """
        if variant.make_file is not None:
            return self._run_file(variant.make_file, rounds, tell)
        start = time.perf_counter()
        module = self.module if variant.prepare is None else variant.prepare(self.module)
        result = lobo_fx.compile(
            module,
            variant.passes,
            example_inputs=self.train.inputs[:2],
            train_data=self.train.shuffled(self.batch),
            loss_fn=self.loss,
            calibration_data=self._calibration,
            evaluate=lambda found: self.score(found, self.validation),
            workdir=self.workdir,
        )
        seconds = time.perf_counter() - start
        original = self._original
        with tempfile.TemporaryDirectory() as folder:
            artifact = result.export(Path(folder) / "model.onnx")
            result.report.artifacts["original"] = original.export(Path(folder) / "original.onnx")
            measured = result.benchmark(rounds=rounds)
            told = dict(tell(_module_of(artifact.path, result.program)))
            size, zipped = artifact.bytes, artifact.gzip_bytes
        last = result.report.rows[-1]
        latency = measured.latencies["compiled"]
        return {
            **told,
            "parameters": last.parameters,
            "non-zero": last.nonzero,
            "macs": last.macs,
            "bytes": size,
            "gzip bytes": zipped,
            "ms": latency.p50,
            "ratio": measured.ratio("compiled", "p50"),
            "memory": (latency.memory or 0) - (latency.base_memory or 0),
            "scores": [row.score for row in result.report.rows],
            "notes": [str(note) for note in result.report.notes if "batches in" in note.reason],
            "seconds": seconds,
        }

    @functools.cached_property
    def _original(self) -> lobo_fx.Result:
        return lobo_fx.compile(self.module, [], example_inputs=self.train.inputs[:2])

    @property
    def _calibration(self) -> list[tuple[torch.Tensor, ...]]:
        return self.train.sample(self.calibration).batches(64)

    def _run_file(self, make: MakeFile, rounds: int, tell: Callable[[FileModule], Mapping[str, Any]]) -> dict[str, Any]:
        """What `run` gives, of a file that no pass made; what it computes inside is not looked into."""
        with tempfile.TemporaryDirectory() as folder:
            paths = {label: Path(folder) / f"{label}.onnx" for label in ("original", "compiled")}
            self._original.export(paths["original"])
            name = OnnxRuntime().load(paths["original"], 1).inputs[0].name
            start = time.perf_counter()
            with quiet():
                make(paths["original"], paths["compiled"], [{name: x.numpy()} for x, *_ in self._calibration])
            seconds = time.perf_counter() - start
            arrays = {name: self.train.inputs[:1].numpy()}
            measured = benchmark(paths, OnnxRuntime(), arrays=arrays, rounds=rounds, progress=False)
            told = dict(tell(_module_of(paths["compiled"], self._original.program)))
            content = paths["compiled"].read_bytes()
        latency = measured.latencies["compiled"]
        return {
            **told,
            "bytes": len(content),
            "gzip bytes": len(gzip.compress(content)),
            "ms": latency.p50,
            "ratio": measured.ratio("compiled", "p50"),
            "memory": (latency.memory or 0) - (latency.base_memory or 0),
            "seconds": seconds,
        }


def _module_of(path: Path, program: lobo_fx.Program) -> FileModule:
    return FileModule(OnnxRuntime().load(path, torch.get_num_threads()), program)


def torch_pruned(
    module: nn.Module,
    inputs: torch.Tensor,
    share: float,
    ends: Callable[[nn.Module], Sequence[nn.Module]],
    learn: Callable[[nn.Module, Any], None] | None = None,
) -> nn.Module:
    """A copy cut by Torch-Pruning's own pruner until so much of its multiply-accumulates is left.

    Args:
        module: to copy.
        inputs: example.
        share: of the multiply-accumulates that stays.
        ends: of the copy, the layers that give outputs, whose widths stay.
        learn: trains the copy with the penalty of its group-norm pruner before, which then cuts it.
    """
    import torch_pruning

    steps = 200
    found = copy.deepcopy(module)
    make = torch_pruning.pruner.BasePruner if learn is None else torch_pruning.pruner.GroupNormPruner
    pruner = make(
        found,
        inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.99,
        iterative_steps=steps,
        ignored_layers=list(ends(found)),
    )
    if learn is not None:
        learn(found, pruner)
    whole, _ = torch_pruning.utils.count_ops_and_params(found, inputs)
    for _ in range(steps):
        pruner.step()
        if torch_pruning.utils.count_ops_and_params(found, inputs)[0] <= share * whole:
            break
    return found.eval()


class Results:
    """Rows by network and variant, in a JSON file; each says what machine measured it, and how long it took.

    Args:
        path: of the JSON file; the markdown lies beside it.
        wanted: patterns of the rows that are measured; those that the file has stay in it.
    """

    def __init__(self, path: Path, wanted: Sequence[str] = ("*",)) -> None:
        self.path, self.wanted = path, wanted
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        if "networks" in self.rows:
            raise SystemExit(f"{path} was written by an earlier version: remove it, or give another --output")

    def measure(
        self, network: str, variants: Sequence[Variant], run: Callable[[Variant], dict[str, Any]], original: nn.Module
    ) -> None:
        """Runs what is missing or was made with other settings, and keeps every row as soon as it is there.

        Raises:
            SystemExit: rows in the file were made of another training of the original.
        """
        found = self.rows.setdefault(network, {})
        weights = checksum_of(original.state_dict())
        if strange := [key for key, row in found.items() if row.get("weights", weights) != weights]:
            raise SystemExit(
                f"{self.path}: {network} was trained anew since its rows were measured ({', '.join(strange)}). Remove "
                "them from the file, or give --output another one"
            )
        for variant in variants:
            if not any(fnmatch.fnmatch(variant.key, pattern) for pattern in self.wanted):
                continue
            row = found.get(variant.key)
            if row is None or variant.recipe != {
                key: row.get(key, none) for key, none in Variant("", "").recipe.items()
            }:
                found[variant.key] = run(variant) | variant.recipe | {"weights": weights, "machine": machine()}
                print(f"{network}, {variant.key}: {found[variant.key]}", flush=True)
                self.save()

    def save(self) -> None:
        write_files(self.path.parent, {self.path.name: json.dumps(self.rows, indent=1)})

    def write_markdown(
        self, title: str, columns: Mapping[str, Callable[[str, dict[str, Any]], str]], remark: str = ""
    ) -> str:
        """A table for each network and machine, its columns made of the name and the figures of each row."""
        every = [(network, key, row) for network, rows in self.rows.items() for key, row in rows.items()]
        seconds = sum(row["seconds"] for _, _, row in every)
        parts = [f"# {title}\n\nTraining and compiling took {seconds / 3600:.1f} hours.\n"]
        parts += [f"{remark}\n"] if remark else []
        for place in dict.fromkeys((network, row["machine"]) for network, _, row in every):
            table = new_table("", list(columns))
            for network, key, row in every:
                if (network, row["machine"]) == place:
                    table.add_row(*(cell(key, row) for cell in columns.values()))
            parts.append(f"## {place[0]}, on {place[1]}\n\n{to_markdown(table)}")
        text = "\n".join(parts)
        write_files(self.path.parent, {self.path.with_suffix(".md").name: text})
        return text


def options(description: str, name: str, networks: Sequence[str] = ()) -> argparse.Namespace:
    """What every report can be told on the command line, where it has several networks: which of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if networks:
        add_networks(parser, networks)
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that it works")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows wanted, such as 'student*'")
    parser.add_argument("--threads", type=int, default=2, help="to train with; latency is of one thread")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for data and weights (%(default)s)")
    parser.add_argument("--output", type=Path, help=f"JSON file (docs/reports/{name}; with --quick in the cache)")
    found = parser.parse_args()
    # rows that are there are not measured again: quick ones must never stand where those of a report do
    found.output = found.output or (found.cache / "quick" if found.quick else Path("docs/reports")) / name
    found.workdir = None if found.quick else found.cache / "work" / Path(name).stem
    torch.set_num_threads(found.threads)
    return found
