"""What an exported file says of itself, and the card and the sample beside it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput
from lobo_fx.checksums import checksum_of_program
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneWeights, QuantizeStatic

ROWS = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


def score(module: nn.Module) -> float:
    return float(module(ROWS).detach().mean())


@functools.cache
def traced() -> Program:
    return lobo_fx.trace(network(), ROWS[:2])


def compiled(
    model: nn.Module | None = None, *, data: Any = None, passes: Any = None, **settings: Any
) -> lobo_fx.Result:
    given: dict[str, Any] = {"calibration_data": data or [ROWS], "progress": False, **settings}
    program = traced() if model is None else lobo_fx.trace(model, ROWS[:2])
    return lobo_fx.compile(program, passes or [PruneWeights(0.25), QuantizeStatic(kernels="all")], **given)


def facts_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_a_file_tells_what_was_done_and_to_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    result = compiled(evaluate=score)
    artifact = result.export(tmp_path / "model.onnx")
    told = facts_of(artifact.path)
    settings = dict(json.loads(told["lobo_fx.settings"]))
    assert settings["prune_weights"]["amount"] == 0.25
    assert settings["quantize_static"]["observer"] == "histogram"  # a default
    assert json.loads(told["lobo_fx.passes"])[1] == ["quantize_static", {"kernels": "all"}]
    assert told["lobo_fx.date"] == "2023-11-14"
    assert told["lobo_fx.source_checksum"] == checksum_of_program(lobo_fx.trace(network(), ROWS[:2]))
    assert told["lobo_fx.calibration_rows_read"] == "40"
    assert float(told["lobo_fx.decibels"]) == pytest.approx(result.report.rows[-1].snr, abs=0.01)
    assert float(told["lobo_fx.score"]) == pytest.approx(result.report.rows[-1].score, rel=1e-5)
    assert float(told["lobo_fx.parity"]) == pytest.approx(artifact.parity, rel=0.1)
    original = facts_of(result.export_original(tmp_path / "original.onnx").path)
    assert json.loads(original["lobo_fx.settings"]) == []
    assert "lobo_fx.decibels" not in original
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(InvalidInput, match="SOURCE_DATE_EPOCH is 'yesterday'; it must be a whole number of seconds"):
        result.export(tmp_path / "model.onnx")


def test_the_checksum_is_of_the_weights_that_were_compiled(tmp_path: Path) -> None:
    model = network()
    result = compiled(model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    told = facts_of(result.export(tmp_path / "model.onnx").path)
    assert told["lobo_fx.source_checksum"] == checksum_of_program(traced())


def test_no_signal_at_all_is_not_no_loss(tmp_path: Path) -> None:
    result = compiled()
    result.export(tmp_path / "model.onnx")
    result.report.rows[-1] = dataclasses.replace(result.report.rows[-1], snr=-math.inf)
    result.save_card(tmp_path)
    assert "| dB against the original | = | -inf |" in " ".join((tmp_path / "model_card.md").read_text().split())


def test_checksums_tell_weights_and_data_apart_but_not_their_order(tmp_path: Path) -> None:
    def checksums(**settings: Any) -> tuple[str, str]:
        told = facts_of(compiled(**settings).export(tmp_path / "model.onnx").path)
        return told["lobo_fx.source_checksum"], told["lobo_fx.calibration_checksum"]

    weights, data = checksums()
    assert checksums(model=network(1)) != (weights, data)
    assert checksums(data=[ROWS.flip(0)]) == (weights, data)
    assert checksums(data=[ROWS[:20], ROWS[20:]]) == (weights, data)
    other = checksums(data=[ROWS + 1])
    assert other[0] == weights
    assert other[1] != data
    rows = sorted(hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in ROWS)
    assert data == hashlib.sha256(b"".join(rows)).hexdigest()[:16]


def test_the_card_tells_figures_and_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compiled(evaluate=score)
    result.report.model = "<b>model</b>|"
    result.export_original(tmp_path / "original.onnx")
    artifact = result.export(tmp_path / "model.onnx")
    assert "| CPU time" not in result.save_card(tmp_path)[-1].read_text()
    measured = result.benchmark(rounds=3, warmup=1, memory=False)
    assert {path.name for path in result.save_card(tmp_path)} == {"model_card.md", "sample.npz"}
    card = (tmp_path / "model_card.md").read_text()
    assert "&lt;b>model&lt;/b>\\|" in card
    assert f"{measured.latencies['compiled'].p50:.3f}" in card
    assert f"{artifact.score:.6g}" in card
    assert "needs opset" in card
    assert "ONNX Runtime 1." in card
    assert "observer=" in card
    assert "| input | input | float32 | batch x 12 |" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    sample = np.load(tmp_path / "sample.npz")
    np.testing.assert_array_equal(sample["input:input"], ROWS[:1].numpy())
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"input": ROWS[:1].numpy()})
    np.testing.assert_allclose(sample["output:output"], expected, rtol=0, atol=1e-6)
    original = network()(ROWS[:1]).detach().numpy()
    assert 1e-3 < np.abs(sample["output:output"] - original).max() < 0.1  # of the compressed file


def test_without_a_file_there_is_no_card(tmp_path: Path) -> None:
    result = compiled()
    with pytest.raises(InvalidInput, match="export the result first"):
        result.save_card(tmp_path)
    result.export(tmp_path / "model.onnx").path.unlink()
    with pytest.raises(InvalidInput, match="export the result first"):
        result.save_card(tmp_path)
    assert not list(tmp_path.iterdir())
