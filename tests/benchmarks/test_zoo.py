"""Models of many kinds, halved along every free axis, exported and compared; the whole zoo is slow."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx.axes.rules  # noqa: F401  fills the table that a test changes
from lobo_fx.axes import Axis, Call
from lobo_fx.axes.axis import product
from lobo_fx.axes.call import RULES, Entry
from lobo_fx.capture.tracing import trace
from lobo_fx.exporters.onnx.exporter import OnnxExporter

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SLOW = (
    *(
        "own:u-net",
        "own:super-resolution",
        "own:lstm-tagger",
        "transformers:llama",
        "transformers:t5",
        "timm:test_convnext",
    ),
    "torchvision:shufflenet_v2_x0_5",
)
MODELS = [
    "own:small-u-net",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
]


@pytest.fixture(scope="module")
def zoo() -> Iterator[Any]:
    """The benchmark as a module; it imports its neighbours by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    found, models = importlib.import_module("zoo"), importlib.import_module("own_models")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    small = {
        "small-u-net": (functools.partial(models.UNet, (16, 24)), images),
        "small-super-resolution": (functools.partial(models.SuperResolution, 8, 1), images[..., :8, :8]),
    }
    with mock.patch.dict(models.OWN, small):
        yield found
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_free_axis_can_go(zoo: Any, name: str) -> None:
    outcome = zoo.Outcome(name)
    zoo.check(outcome, export=True, largest=1e7)
    assert outcome.failure == ""
    assert not outcome.unknown
    assert outcome.free > 0.97
    assert outcome.kept < 0.6


def test_a_wrong_rule_is_found(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: pixel shuffle's factors taken for the outer ones."""

    def wrong(call: Call) -> tuple[Axis, ...]:
        n, channels, _, _ = call.axes("self")
        _, size, *space = call.sizes()
        output = call.fresh(size)
        call.unify(channels, product([call.fixed(4, "they become space"), output]))
        return (n, output, *(call.fixed(length, "it is space") for length in space))

    monkeypatch.setitem(RULES, torch.ops.aten.pixel_shuffle.default, Entry(wrong, None))
    outcome = zoo.Outcome("own:small-super-resolution")
    with pytest.raises(ValueError, match="permuted outputs differ"):
        zoo.check(outcome, export=False, largest=1e7)
    assert outcome.failure == "permute"


class Windows(nn.Module):
    """Attention within windows, whose number is a dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.out(y.transpose(2, 3).flatten(-2))
        return out


def test_attention_over_five_dimensions_is_exported(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 3, 6, generator=torch.Generator().manual_seed(0))
    program = trace(Windows().eval(), x)
    code = program.module.code
    assert OnnxExporter().export(program, tmp_path / "model.onnx", {}).parity < 1e-5
    assert program.module.code == code


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "segmentation", "video", "timm", "transformers", "own"])
def test_the_whole_zoo(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "zoo.py", "--export", "--set", name, "--output", str(tmp_path / "zoo.md")]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)
    outcomes = [json.loads(line) for line in (tmp_path / "zoo.jsonl").read_text().splitlines()]
    assert outcomes
    assert [outcome["name"] for outcome in outcomes if outcome["failure"]] == []
