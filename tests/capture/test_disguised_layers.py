"""Products with stored weights are layers, however they are spelled; eager PyTorch is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import layers
from lobo_fx.graph.operators import aten

LINEAR, GROUPED = aten.linear.default, aten.bmm.default


class Written(nn.Module):
    """A function of an input and of stored tensors of given sizes."""

    def __init__(self, function: Callable[..., torch.Tensor], *sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.stored = nn.ParameterList([nn.Parameter(torch.randn(*size)) for size in sizes])

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.stored)


# By spelling: the function, sizes of its weights, the input's sizes after the batch, and the operator that it becomes.
SPELLINGS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int, ...], object]] = {
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), [(4, 6), (6,)], (4,), LINEAR),
    "addmm with factors": (lambda x, w, b: torch.addmm(b, x, w, alpha=0.5, beta=2), [(4, 6), (6,)], (4,), LINEAR),
    "addmm of a matrix": (lambda x, w, b: torch.addmm(b, x, w), [(4, 6), (1, 6)], (4,), LINEAR),
    "mm": (lambda x, w: x.mm(w), [(4, 6)], (4,), LINEAR),
    "matmul and a bias": (lambda x, w, b: x @ w + b, [(4, 6), (6,)], (5, 4), LINEAR),
    "a bias and matmul": (lambda x, w, b: b + x @ w, [(4, 6), (6,)], (5, 4), LINEAR),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), [(4, 6)], (4,), LINEAR),
    "einsum, weight first": (lambda x, w: torch.einsum("oi,bi->bo", w, x), [(6, 4)], (4,), LINEAR),
    "einsum with an ellipsis": (lambda x, w: torch.einsum("...i,oi->...o", x, w), [(6, 4)], (5, 4), LINEAR),
    "einsum without an arrow": (lambda x, w: torch.einsum("ab,bc", x, w), [(4, 6)], (4,), LINEAR),
    "einsum into heads": (lambda x, w: torch.einsum("bti,ihd->bhtd", x, w), [(4, 2, 3)], (5, 4), LINEAR),
    "einsum out of heads": (lambda x, w: torch.einsum("bhtd,hdo->bto", x, w), [(2, 3, 5)], (2, 4, 3), LINEAR),
    "weight on the left": (lambda x, w, b: (w @ x.t()).t() + b, [(6, 4), (6,)], (4,), LINEAR),
    "weight on the left of a batch": (lambda x, w: w @ x, [(6, 4)], (4, 5), LINEAR),
    "mv": (lambda x, w: w.mv(x.sum(0)), [(6, 4)], (4,), LINEAR),
    "a scaled weight": (lambda x, w: x @ (w / 16), [(4, 6)], (4,), LINEAR),
    "experts by einsum": (lambda x, w: torch.einsum("bhd,hde->bhe", x, w), [(2, 4, 6)], (2, 4), GROUPED),
    "experts by bmm": (lambda x, w: torch.bmm(x.transpose(0, 1), w), [(2, 4, 6)], (2, 4), GROUPED),
    "experts by matmul": (lambda x, w: x.transpose(0, 1) @ w, [(2, 4, 6)], (2, 4), GROUPED),
    "experts and a bias": (
        lambda x, w, b: torch.baddbmm(b, x.transpose(0, 1), w),
        [(2, 4, 6), (2, 1, 6)],
        (2, 4),
        GROUPED,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_a_layer_and_computes_the_same(name: str) -> None:
    function, sizes, shape, operator = SPELLINGS[name]
    model = Written(function, *sizes).eval()
    program = lobo_fx.trace(model, torch.randn(3, *shape))
    assert [layer.node.target for layer in layers(program.graph)] == [operator]
    assert dict(program.module.named_parameters()).keys() == dict(model.named_parameters()).keys()
    x = torch.randn(7, *shape)
    torch.testing.assert_close(program.run(Inputs((x,))), model(x), rtol=1e-5, atol=1e-5)


NO_LAYERS: dict[str, Callable[..., Any]] = {
    "two values that depend on inputs": lambda x, w: x @ (x * w.sum()).transpose(1, 2),
    "a diagonal": lambda x, w: torch.einsum("bii,ij->bi", x[:, :4, :4], w),
    "a sum over what only one has": lambda x, w: torch.einsum("bti,ij->b", x, w),
    "a weight made from an input": lambda x, w: torch.einsum("bti,ij->btj", x, w * x.mean()),
    "a broadcast sum": lambda x, w: torch.einsum("bti,ij->btj", x, w[:1]),
    "a broadcast group": lambda x, w: torch.einsum("bti,tij->btj", x, w[None]),
}


@pytest.mark.parametrize("name", NO_LAYERS)
def test_what_is_no_layer_stays_as_it_is(name: str) -> None:
    model = Written(NO_LAYERS[name], (4, 4)).eval()
    x = torch.randn(3, 5, 4)
    program = lobo_fx.trace(model, x)
    assert list(layers(program.graph)) == []
    torch.testing.assert_close(program.run(), model(x), rtol=1e-5, atol=1e-5)


def test_a_vector_that_something_else_reads_the_product_before_is_no_bias() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = F.linear(x, w)
        return (product + b) * product

    program = lobo_fx.trace(Written(forward, (6, 4), (6,)).eval(), torch.randn(3, 4))
    (layer,) = layers(program.graph)
    assert layer.bias is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_vector_of_another_dtype_is_no_bias(dtype: torch.dtype) -> None:
    model = Written(lambda x, w, b: x @ w + b.to(dtype), (4, 6), (6,)).eval()
    x = torch.randn(3, 4)
    program = lobo_fx.trace(model, x)
    (layer,) = layers(program.graph)
    assert layer.bias is None
    torch.testing.assert_close(program.run(), model(x))


def test_gradients_reach_the_stored_weight() -> None:
    model = Written(lambda x, w, b: x @ w + b, (4, 6), (6,))
    x = torch.randn(3, 4)
    program = lobo_fx.trace(model, x)
    program.module(x).square().sum().backward()
    found = program.module.get_parameter("stored.0").grad
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model.stored[0].grad)
