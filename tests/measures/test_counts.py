"""Counts and ratios, against formulas written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.measures.counts import Measures, measure, rows, run_counted
from lobo_fx.measures.fidelity import largest_error, signal_to_noise
from lobo_fx.passes import FoldBatchNorm, PruneWeights, QuantizeStatic

IMAGES = torch.randn(3, 4, 9, 7)
VECTORS = torch.randn(3, 10)
SEQUENCES = torch.randn(3, 6, 8)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


class Attention(nn.Module):
    """Self-attention by hand: four projections and `scaled_dot_product_attention`."""

    def __init__(self, width: int, heads: int, shared: int = 1, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.shared, self.causal = heads, shared, causal
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width // shared), nn.Linear(width, width // shared)

    def forward(self, x: torch.Tensor) -> Any:
        def split(y: torch.Tensor, heads: int) -> torch.Tensor:
            return y.reshape(*y.shape[:2], heads, -1).transpose(1, 2)

        q = split(self.query(x), self.heads)
        k, v = (split(layer(x), self.heads // self.shared) for layer in (self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.shared > 1)
        return self.out(y.transpose(1, 2).flatten(-2))


class Decomposed(Attention):
    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = (layer(x).reshape(*x.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2))


class HuggingFaceConv1D(nn.Module):
    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


PROJECTIONS, PRODUCTS = 4 * 6 * 8 * 8, 2 * 6 * 6 * 8


class Pairs(nn.Module):
    """Multiplies each feature with each."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(10, 10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pairs(x, x)  # type: ignore[no-any-return]


MACS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, int]] = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), IMAGES, (7 * 5) * 6 * 4 * 9),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGES, (5 * 4) * 6 * 4 * 9),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), IMAGES, (5 * 3) * 6 * 4 * 9),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGES, (9 * 7) * 6 * 4 * 9),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGES, (7 * 5) * 6 * 2 * 9),
    "depthwise": (lambda: nn.Conv2d(4, 8, (3, 1), groups=4), IMAGES, (7 * 7) * 8 * 1 * 3),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3), SEQUENCES, 6 * 5 * 6 * 3),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), torch.randn(3, 2, 4, 5, 6), (3 * 4 * 5) * 3 * 2 * 8),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGES, (9 * 7) * 4 * 6 * 9),
    "linear": (lambda: nn.Linear(10, 7), VECTORS, 70),
    "linear_no_bias": (lambda: nn.Linear(10, 7, bias=False), VECTORS, 70),
    "linear_3d": (lambda: nn.Linear(8, 5), SEQUENCES, 6 * 8 * 5),
    "addmm": (lambda: HuggingFaceConv1D(5, 8), SEQUENCES, 6 * 8 * 5),
    "matmul": (lambda: Function(lambda x: x @ x.transpose(1, 2)), SEQUENCES, 6 * 6 * 8),
    "einsum": (lambda: Function(lambda x: torch.einsum("bij,bkj->bik", x, x)), SEQUENCES, 6 * 6 * 8),
    "attention": (lambda: Attention(8, 2), SEQUENCES, PROJECTIONS + PRODUCTS),
    "causal": (lambda: Attention(8, 2, causal=True), SEQUENCES, PROJECTIONS + PRODUCTS),
    "grouped_query": (lambda: Attention(8, 4, shared=2), SEQUENCES, PROJECTIONS * 3 // 4 + PRODUCTS),
    "decomposed_attention": (lambda: Decomposed(8, 2), SEQUENCES, PROJECTIONS + PRODUCTS),
    "called_twice": (lambda: nn.Sequential(*[nn.Linear(10, 10)] * 2), VECTORS, 200),
    "embedding": (lambda: nn.Embedding(20, 8), torch.arange(6).view(3, 2), 0),
    "pointwise": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), IMAGES, 0),
    "bilinear": (Pairs, VECTORS, 4 * 10 * 10),
    "lstm": (lambda: nn.LSTM(8, 5, batch_first=True), SEQUENCES, 6 * 4 * 5 * (8 + 5)),
}


@pytest.mark.parametrize("kind", MACS)
def test_multiply_accumulates_of_a_row_are_those_of_the_formula(kind: str) -> None:
    make, x, expected = MACS[kind]
    model = make().eval()
    program = lobo_fx.trace(model, x)
    outputs, macs = run_counted(program)
    assert macs == expected
    assert rows(program) == 3
    found, reference = (torch.utils._pytree.tree_leaves(value)[0] for value in (outputs, model(x)))
    assert torch.allclose(found, reference, atol=1e-5), "counting must not change what is computed"


def test_a_row_is_a_row_in_any_batch() -> None:
    model = nn.Conv2d(4, 6, 3)
    macs = [run_counted(lobo_fx.trace(model, images))[1] for images in (IMAGES, IMAGES[:1])]
    assert macs == [7 * 5 * 6 * 4 * 9] * 2


def test_a_fixed_batch_is_one_row() -> None:
    program = lobo_fx.trace(nn.Linear(10, 7), VECTORS, dynamic_shapes=None)
    assert rows(program) == 1
    assert run_counted(program)[1] == 3 * 70


def test_branches_are_not_counted_and_nothing_fails(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 10)

        def forward(self, x: torch.Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.linear(x), lambda x: x - 1, (x,))

    result = lobo_fx.compile(Branches(), [FoldBatchNorm()], example_inputs=VECTORS, progress=False)
    assert [row.macs for row in result.report.rows] == [None, None]
    result.export(tmp_path / "model.onnx")


def test_quantization_and_zeros_change_no_count() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 35, 5)).eval()
    passes = [PruneWeights(0.5), QuantizeStatic(kernels="all")]
    result = lobo_fx.compile(model, passes, example_inputs=IMAGES, calibration_data=[IMAGES], progress=False)
    assert [row.macs for row in result.report.rows] == [(7 * 5) * 6 * 4 * 9 + 6 * 35 * 5] * 3


# Parameters and memory.


def measured(model: nn.Module, x: torch.Tensor, *passes: Any) -> list[Measures]:
    """Measures of the original and after every pass, as the compiler takes them."""
    result = lobo_fx.compile(model.eval(), passes, example_inputs=x, calibration_data=[x], progress=False)
    return [Measures(r.parameters, r.nonzero, r.macs, r.bytes) for r in result.report.rows]


def test_parameters_zeros_and_bytes_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 35, 5))
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = 0
        model.get_parameter("3.bias").zero_()
    (found,) = measured(model, IMAGES)
    parameters = 6 * 4 * 9 + 6 + 6 + 6 + 6 * 35 * 5 + 5
    zeros = 4 * 9 + 6 + 5  # a channel of the convolution, the norm's fresh shift, the last bias
    assert found.parameters == parameters
    assert found.nonzero == parameters - zeros
    assert found.sparsity == pytest.approx(zeros / parameters, rel=1e-12)
    assert found.bytes == 4 * (parameters + 6 + 6) + 8, "running statistics, and a counter in int64"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.lm_head.weight = self.embedding.weight
        self.block = nn.Linear(8, 8, bias=False)
        self.register_buffer("table", torch.ones(5, 8))
        self.register_buffer("same_table", self.get_buffer("table"))

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embedding(tokens) + self.get_buffer("table") + self.get_buffer("same_table")
        return self.lm_head(self.block(self.block(x)))


def test_what_is_shared_counts_once() -> None:
    (found,) = measured(Tied(), torch.arange(10).view(2, 5))
    assert found.parameters == 20 * 8 + 20 + 8 * 8
    assert found.bytes == 4 * (found.parameters + 5 * 8)


def test_a_model_without_parameters_measures_zero() -> None:
    (found,) = measured(nn.ReLU(), VECTORS)
    assert (found.parameters, found.nonzero, found.sparsity, found.bytes) == (0, 0, 0.0, 0)


def test_masks_are_no_weights_and_quantized_weights_are() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 35, 5))
    original, pruned, quantized = measured(model, IMAGES, PruneWeights(0.5), QuantizeStatic(kernels="all"))
    weights, biases = 6 * 4 * 9 + 6 * 35 * 5, 6 + 5
    assert original.parameters == original.nonzero == weights + biases
    assert pruned.parameters == original.parameters
    assert pruned.nonzero == biases + (6 * 4 * 9) // 2 + (6 * 35 * 5) // 2
    assert pruned.bytes == original.bytes == 4 * (weights + biases)
    assert quantized.parameters == original.parameters
    assert quantized.nonzero <= pruned.nonzero
    # weights 1 byte, biases 4; a scale (4) and a zero point (8 for weights, 4 for biases) per output
    assert quantized.bytes == weights + 4 * biases + biases * (4 + 8) + biases * (4 + 4)


def test_parameters_that_a_pass_made_count_also_when_quantized() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    original, folded, quantized = measured(model, IMAGES, FoldBatchNorm(), QuantizeStatic(kernels="all"))
    assert original.parameters == 6 * 4 * 9 + 12
    assert folded.parameters == 6 * 4 * 9 + 6
    assert quantized.parameters == folded.parameters


def test_measuring_changes_nothing() -> None:
    program = lobo_fx.trace(nn.Linear(10, 7), VECTORS)
    before = program.run()
    assert measure(program, 5) == measure(program, 5)
    assert measure(program, None).macs is None
    assert torch.equal(program.run(), before)


# Ratios.


def test_signal_to_noise_is_the_formula_over_all_outputs() -> None:
    generator = np.random.default_rng(0)
    reference = [generator.standard_normal((4, 5)), 30 * generator.standard_normal(7)]
    outputs = [array + 0.01 * generator.standard_normal(array.shape) for array in reference]
    signal = sum(float((array**2).sum()) for array in reference)
    noise = sum(float(((r - o) ** 2).sum()) for r, o in zip(reference, outputs, strict=True))
    one, other = ([torch.from_numpy(array) for array in arrays] for arrays in (reference, outputs))
    expected = 10 * math.log10(signal / noise)
    assert signal_to_noise(one, other) == pytest.approx(expected, abs=1e-9)
    nested = {"a": one[0], "b": (one[1], None, torch.arange(3))}, {"a": other[0], "b": (other[1], None, torch.ones(3))}
    integers = {"a": other[0], "b": (other[1], None, torch.zeros(3, dtype=torch.int64))}
    assert signal_to_noise(nested[0], integers) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("factor", "decibels"), [(0.9, 20.0), (1.1, 20.0), (0.0, 0.0), (1.001, 60.0), (2.0, 0.0)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_signal_to_noise_is_relative(factor: float, decibels: float, size: float) -> None:
    x = size * torch.randn(100, dtype=torch.float64)
    assert signal_to_noise(x, factor * x) == pytest.approx(decibels, abs=1e-6)


def test_signal_to_noise_at_the_ends() -> None:
    x = torch.randn(10)
    assert signal_to_noise(x, x.clone()) == math.inf
    assert signal_to_noise(torch.zeros(10), torch.zeros(10)) == math.inf
    assert signal_to_noise(torch.zeros(10), x) == -math.inf
    with pytest.raises(ValueError, match="zip"):
        signal_to_noise((x, x), (x,))


def test_signal_to_noise_of_equal_infinities_is_that_of_the_rest() -> None:
    """Masked scores are minus infinity before and after; that is no noise."""
    x = torch.randn(10).masked_fill(torch.arange(10) < 3, -math.inf)
    assert signal_to_noise(x, x.clone()) == math.inf
    assert signal_to_noise(x, x * 1.01) == pytest.approx(40.0, abs=1e-3)
    assert signal_to_noise(x, x.nan_to_num(neginf=0.0)) == -math.inf


def test_largest_error_is_a_share_of_each_output() -> None:
    small, large = torch.tensor([0.001, -0.002]), torch.tensor([100.0, 50.0])
    assert largest_error((small, large), (small + 0.0005, large)) == pytest.approx(0.25, rel=1e-5)
    assert largest_error((small, large), (small, large - 1)) == pytest.approx(0.01, rel=1e-5)
    assert largest_error(torch.zeros(2), torch.full((2,), 0.3)) == pytest.approx(0.3)
    assert largest_error(torch.zeros(0), torch.zeros(0)) == 0
    assert largest_error((small, torch.arange(2)), (small, torch.arange(2))) == 0


def test_largest_error_is_not_hidden_by_what_is_not_finite() -> None:
    x = torch.tensor([-math.inf, 1.0, 2.0])
    assert largest_error(x, x.clone()) == 0
    assert largest_error(x, torch.tensor([-math.inf, 1.0, 3.0])) > 0.1
    assert largest_error(x, torch.tensor([0.0, 1.0, 2.0])) > 0.1
    assert not largest_error(x, torch.tensor([-math.inf, 1.0, math.nan])) <= 0.1
