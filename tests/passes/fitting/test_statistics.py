"""Gradients over training data: exact, and of no more of it than a ranking needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.passes.fitting.statistics import gradients


@pytest.mark.parametrize(("batches", "rows", "read"), [(3, 4, 3), (40, 4, 40), (40, 64, 32), (300, 4, 256)])
def test_gradients_are_of_enough_batches_and_no_more(batches: int, rows: int, read: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    data = [(torch.randn(rows, 3), torch.randn(rows, 2)) for _ in range(batches)]
    program = lobo_fx.trace(layer, data[0][0])
    context = Context(program.signature, train_data=data, loss_fn=nn.functional.mse_loss, show_progress=False)
    first, second = gradients(Inference(program).run(), context)
    expected = []
    for inputs, labels in data[:read]:
        difference = inputs @ layer.weight.T + layer.bias - labels
        expected.append(difference.T @ inputs * 2 / difference.numel())
    weight = program.module.get_parameter("weight")
    torch.testing.assert_close(first[id(weight)], torch.stack(expected).mean(0).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        second[id(weight)], torch.stack(expected).square().mean(0).detach(), rtol=1e-4, atol=1e-5
    )
    assert [str(note) for note in context.notes] == (
        [f"gradients are of the first {read} batches of train_data, {read * rows} rows"] if read < batches else []
    )
