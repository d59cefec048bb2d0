"""One network written in eight ways gives every pass the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.contracts.passbase import Pass
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import signal_to_noise

Spelling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Each takes rows x, a weight w stored as inputs x outputs (or what `STORED` makes of it), and a bias b.
SPELLINGS: dict[str, Spelling] = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "linear of a transposed weight": lambda x, w, b: F.linear(x, w.t(), b),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "matmul": lambda x, w, b: x @ w + b,
    "einsum": lambda x, w, b: torch.einsum("bi,io->bo", x, w) + b,
    "weight on the left": lambda x, w, b: (w @ x.t()).t() + b,
    "scaled": lambda x, w, b: F.linear(x, w / 16, b),
    "normalised": lambda x, w, b: F.linear(x, w / w.square().sum(1, True).sqrt() * w.square().sum(1, True).sqrt(), b),
}
STORED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda w: w,
    "weight on the left": lambda w: w,
    "scaled": lambda w: w * 16,
    "normalised": lambda w: w,
}


def _inputs_first(weight: torch.Tensor) -> torch.Tensor:
    return weight.T


class Network(nn.Module):
    """A norm and three layers, all products in one spelling."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.spelling = SPELLINGS[name]
        stored = STORED.get(name, _inputs_first)
        generator = torch.Generator().manual_seed(3)
        self.norm = nn.LayerNorm(16)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in ((16, 64), (64, 48), (48, 8)):
            weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
            self.weights.append(nn.Parameter(stored(weight).contiguous()))
            self.biases.append(nn.Parameter(torch.randn(outputs, generator=generator) / 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = self.spelling(x, weight, bias)
            x = x.relu() if index < 2 else x
        return x


PASSES: dict[str, Callable[[], list[Pass]]] = {
    "prune": lambda: [passes.PruneChannels(0.5, compensation="none")],
    "prune and refit": lambda: [passes.PruneChannels(0.5)],
    "prune by activations": lambda: [passes.PruneChannels(0.5, importance="activation", compensation="bias")],
    "prune by second order": lambda: [passes.PruneChannels(0.5, importance="second_order")],
    "prune weights": lambda: [passes.PruneWeights(0.5)],
    "2:4": lambda: [passes.PruneWeights(pattern="2:4")],
    "equalize": lambda: [passes.EqualizeLayers()],
    "smooth": lambda: [passes.SmoothActivations()],
    "static": lambda: [passes.QuantizeStatic(kernels="all")],
    "static, compensated": lambda: [passes.QuantizeStatic(kernels="all", rounding="compensated")],
    "dynamic": lambda: [passes.QuantizeDynamic()],
    "weights": lambda: [passes.QuantizeWeights(format="int4", compute="float32")],
    "mixed": lambda: [passes.MixedPrecision(decibels=25, quantizer=passes.QuantizeStatic(kernels="all"))],
    "factorize": lambda: [passes.Factorize(0.25, round_to=2)],
}
DATA = torch.randn(256, 16, generator=torch.Generator().manual_seed(5))
FRESH = torch.randn(128, 16, generator=torch.Generator().manual_seed(6))


@functools.cache
def traced(spelling: str) -> Program:
    return lobo_fx.trace(Network(spelling).eval(), FRESH[:2])


def compressed(spelling: str, chosen: str) -> Any:
    return lobo_fx.compile(traced(spelling), PASSES[chosen](), calibration_data=[DATA], progress=False)


def _some(chosen: str) -> list[str]:
    """Plain layers and another spelling: all of them have their turn with one pass or another."""
    others = [name for name in SPELLINGS if name != "linear"]
    return ["linear", others[(list(PASSES).index(chosen) + 3) % len(others)]]


LIKE_OTHERS = {"prune and refit", "static, compensated"}
"""What they do beside pruning and rounding runs on layers that pruning and rounding found."""


@pytest.mark.parametrize(
    ("chosen", "spellings"),
    [
        *(pytest.param(c, _some(c), marks=[pytest.mark.slow] * (c in LIKE_OTHERS)) for c in PASSES),
        *(pytest.param(chosen, list(SPELLINGS), marks=pytest.mark.slow) for chosen in PASSES),
    ],
)
def test_every_pass_treats_every_spelling_alike(chosen: str, spellings: list[str]) -> None:
    expected = Network("linear").eval()(FRESH)
    found = {}
    for name in spellings:
        if name in ("scaled", "normalised") and chosen in ("prune", "prune weights", "2:4"):
            continue  # what these cut is what the weight is computed from
        result = compressed(name, chosen)
        found[name] = (result.report.rows[-1].parameters, signal_to_noise(expected, result.module(FRESH)))
    assert len(found) > 1
    counts = {count for count, _ in found.values()}
    noises = [noise for _, noise in found.values()]
    assert len(counts) == 1, found
    assert max(noises) - min(noises) <= 0.5 or min(noises) > 100, found
