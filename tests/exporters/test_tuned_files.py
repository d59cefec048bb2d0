"""Files that are tuned: what is written, that it computes the same, and that nothing of another export survives.

Times are made up (`taken`): what is asked for is faster, everything else is not.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.transformers import optimizer
from torch import nn

import lobo_fx
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.exporters.onnxruntime.session_options import SavedOptions, read_options
from lobo_fx.exporters.onnxruntime.tuning import CHOICES, Fusions
from lobo_fx.graph.program import Program
from lobo_fx.measures.in_turn import Comparison, Stand
from lobo_fx.passes import PruneWeights, QuantizeStatic
from lobo_fx.report.schema import first_fault

ROWS, TOKENS = torch.randn(2, 4), torch.randn(2, 6, 32)
NO_ARENA = SavedOptions({"enable_cpu_mem_arena": False})


class Block(nn.Module):
    """Sums that are normalised, which ONNX Runtime has one operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x + self.down(F.gelu(self.up(x))))
        return self.second(x + self.down(F.gelu(self.up(x))))


@functools.cache
def traced(which: str) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if which == "block":
            return lobo_fx.trace(Block().eval(), TOKENS)
        return lobo_fx.trace(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)).eval(), ROWS)


def small(*chosen: Any) -> Any:
    return lobo_fx.compile(traced("small"), list(chosen), calibration_data=[ROWS], progress=False)


def block() -> Any:
    return lobo_fx.compile(traced("block"), [], progress=False)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has the first file that holds a text, or has it in the options beside it, be the faster one."""

    def take(text: str) -> None:
        def has(path: Path) -> bool:
            return any(text.encode() in file.read_bytes() for file in path.parent.iterdir())

        def compare(self: Stand, before: Path, after: Path, rounds: int, limit: float = 0.0) -> Comparison:
            return Comparison((0.5 if has(after) and not has(before) else 1.0,))

        monkeypatch.setattr(Stand, "compare", compare)

    return take


def listing(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_what_is_kept_is_written_beside_and_told(tmp_path: Path, taken: Callable[[str], None]) -> None:
    taken("enable_cpu_mem_arena")
    result = small()
    artifact = result.export(tmp_path / "model.onnx", tune=True)
    assert listing(tmp_path) == {"model.onnx", "model.onnx.session.json"}
    assert set(artifact.files) == set(tmp_path.iterdir())
    assert artifact.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert result.report.artifacts["compiled"] == artifact
    assert read_options(artifact.path) == NO_ARENA
    told = artifact.details["tuning"]
    assert (told["kept"], told["ratio"]) == (["no arena"], 0.5)
    assert {"basic optimisations", "no pre-packing", "denormals as zero"} < {one["name"] for one in told["tried"]}
    assert not any("fusions" in one["name"] for one in told["tried"]), "there is nothing to fuse"
    assert not any("thread" in one["name"] for one in told["tried"]), "nobody asked for threads"
    (note,) = (str(note) for note in result.report.notes if "tuned" in str(note))
    assert note.startswith("model.onnx tuned: it takes 0.50 times as long as untuned; kept: no arena (0.50); tried and")
    assert first_fault(json.loads(result.report.to_json())) is None
    # the file is as it was, and the next one has no options of an older
    tuned = artifact.path.read_bytes()
    assert small().report.artifacts == {}
    result.export(artifact.path)
    assert listing(tmp_path) == {"model.onnx"}
    assert artifact.path.read_bytes() == tuned


def test_where_nothing_is_faster_the_file_stays_as_it_was(tmp_path: Path, taken: Callable[[str], None]) -> None:
    taken("no such text")
    result = small()
    artifact = result.export(tmp_path / "model.onnx", tune=True)
    assert listing(tmp_path) == {"model.onnx"}
    assert artifact.files == (artifact.path,)
    assert artifact.details["tuning"]["kept"] == []
    assert any(
        "nothing that the runtime offers saves 2.0% of its time or more; tried" in str(n) for n in result.report.notes
    )


def test_counts_of_threads_are_written_down_where_they_are_asked_for(
    tmp_path: Path, taken: Callable[[str], None]
) -> None:
    taken('"intra_op_num_threads": 2')
    artifact = small().export(tmp_path / "two.onnx", tune=lobo_fx.Tuning(threads=(1, 2)))
    assert read_options(artifact.path) == SavedOptions({"intra_op_num_threads": 2})
    assert artifact.details["tuning"]["kept"] == ["2 threads"]
    taken("enable_cpu_mem_arena")
    artifact = small().export(tmp_path / "one.onnx", tune=lobo_fx.Tuning(threads=(1, 2)))
    assert read_options(artifact.path) == SavedOptions({"intra_op_num_threads": 1, "enable_cpu_mem_arena": False})


@pytest.mark.parametrize("external_data", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fused_files_keep_all_that_files_say(external_data: bool, tmp_path: Path, taken: Callable[[str], None]) -> None:
    taken("SkipLayerNormalization")
    result, exporter = block(), OnnxExporter(external_data=external_data)
    plain = result.export(tmp_path / "plain.onnx", exporter)
    (tmp_path / "tuned").mkdir()
    artifact = result.export(tmp_path / "tuned" / "model.onnx", exporter, tune=True)
    assert artifact.details["tuning"]["kept"] == ["bert fusions"]
    names = listing(tmp_path / "tuned") - {"model.onnx", "model.onnx.session.json"}
    assert len(names) == external_data
    assert all(name.startswith("model.onnx.") and name.endswith(".data") for name in names)
    before, after = onnx.load(plain.path), onnx.load(artifact.path)
    fused = Counter(node.op_type for node in after.graph.node if node.domain == "com.microsoft")
    assert fused == {"SkipLayerNormalization": 2, "BiasGelu": 2}
    assert before.graph.input == after.graph.input
    assert before.graph.output == after.graph.output
    sizes = after.graph.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", "length", 32]
    assert before.metadata_props == after.metadata_props
    assert "lobo_fx.signature" in {entry.key for entry in after.metadata_props}
    assert (before.producer_name, before.doc_string) == (after.producer_name, after.doc_string) == ("lobo-fx", "")
    assert before.ir_version == after.ir_version
    assert [e.version for e in after.opset_import if not e.domain] == [e.version for e in before.opset_import]
    assert any("its fused operators (com.microsoft) run in ONNX Runtime only" in str(n) for n in result.report.notes)
    session = OnnxRuntime().load(artifact.path, 1)
    for rows in (TOKENS, torch.randn(5, 9, 32)):
        expected = result.module(rows).detach().numpy()
        np.testing.assert_allclose(session.run({"x": rows.numpy()})[0], expected, rtol=0, atol=1e-5)
    assert 0 < artifact.parity < 1e-5


@pytest.mark.parametrize("spoil", ["input", "metadata_props", "weight"])
def test_fusions_that_change_what_a_file_is_are_not_taken(
    spoil: str, tmp_path: Path, taken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken("SkipLayerNormalization")
    right = optimizer.optimize_by_fusion

    def wrong(*given: Any, **settings: Any) -> Any:
        found = right(*given, **settings)
        if spoil == "weight":
            (weight,) = (w for w in found.model.graph.initializer if w.name == "first.weight")
            weight.CopyFrom(onnx.numpy_helper.from_array(np.full(32, 2, np.float32), "first.weight"))
        elif spoil == "input":
            found.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        else:
            del found.model.metadata_props[0]
        return found

    monkeypatch.setattr(optimizer, "optimize_by_fusion", wrong)
    artifact = block().export(tmp_path / "model.onnx", tune=True)
    assert artifact.details["tuning"]["kept"] == []
    assert listing(tmp_path) == {"model.onnx"}
    reason = artifact.details["tuning"]["tried"][0]["reason"]
    said = {"input": "has other inputs", "metadata_props": "has other metadata", "weight": "differ from PyTorch's by"}
    assert said[spoil] in reason


def test_a_library_that_fails_is_told_and_the_others_are_tried(
    tmp_path: Path, taken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **settings: Any) -> Any:
        raise TypeError("'method' object is not iterable")

    taken("enable_cpu_mem_arena")
    monkeypatch.setattr(optimizer, "optimize_by_fusion", broken)
    told = small().export(tmp_path / "model.onnx", tune=True).details["tuning"]
    failed = [one["reason"] for one in told["tried"] if "fusions" in one["name"]]
    assert len(failed) == sum(isinstance(choice, Fusions) for choice in CHOICES)
    assert set(failed) == {"onnxruntime.transformers can't fuse it: 'method' object is not iterable"}
    assert told["kept"] == ["no arena"]


@pytest.mark.parametrize(
    ("chosen", "storage"),
    [(QuantizeStatic(), None), (PruneWeights(0.7), "packed")],
    ids=["integers", "packed"],
)
def test_integers_and_packed_weights_agree_at_the_lowest_level(
    chosen: Any, storage: str | None, tmp_path: Path, taken: Callable[[str], None]
) -> None:
    taken('"graph_optimization_level": 1')
    result = small(chosen)
    artifact = result.export(tmp_path / "model.onnx", storage=storage, tune=True, confirm=False)
    assert artifact.details["tuning"]["kept"] == ["basic optimisations"]
    assert ("packed" in artifact.details) == (storage == "packed")
    used = OnnxRuntime().load(artifact.path, 1).handle.get_session_options()
    assert used.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC


def test_wrong_requests_are_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="tune is 'yes'"):
        small().export(tmp_path / "model.onnx", tune="yes")
    with pytest.raises(InvalidInput, match="does not exist"):
        small().export(tmp_path / "missing" / "model.onnx", tune=True)
    assert listing(tmp_path) == set()
    (tmp_path / "model.onnx.session.json").mkdir()
    with pytest.raises(InvalidInput, match=r"model.onnx.session.json is a folder"):
        small().export(tmp_path / "model.onnx", tune=True)
    assert listing(tmp_path) == {"model.onnx.session.json"}
