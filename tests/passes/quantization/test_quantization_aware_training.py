"""Prepare, train, convert apart: a plain PyTorch loop between them, and the result in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.passes import FoldBatchNorm, QuantizeStatic
from lobo_fx.passes.quantization.integers.calibration import convert, prepare
from lobo_fx.terminal.quiet import quiet

EPOCHS = 8


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1347], y[:1347], x[1347:], y[1347:]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, stride=2),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )


def train(module: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float) -> None:
    """A plain loop: Adam and cross-entropy."""
    optimizer = torch.optim.Adam(module.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((module(x).argmax(1) == y).double().mean())


def test_a_network_trains_between_prepare_and_convert(tmp_path: Path) -> None:
    x, y, test_x, test_y = digits()
    model = network()
    train(model, x, y, EPOCHS, 2e-3)
    model.eval()
    best = accuracy(model, test_x, test_y)
    assert best > 0.95

    result = lobo_fx.compile(model, [FoldBatchNorm()], example_inputs=x[:2], progress=False)
    context = Context(result.program.signature, show_progress=False)
    pass_ = QuantizeStatic(kernels="all")
    prepared = prepare(result.program, pass_.place(result.program, context), context, training=True)
    assert all(parameter.requires_grad for parameter in prepared.parameters())
    before = prepared.state_dict()["0.weight"].clone()
    train(prepared, x, y, 2, 5e-4)
    assert not torch.equal(prepared.state_dict()["0.weight"], before)
    faked = accuracy(prepared, test_x, test_y)

    result.program = convert(result.program, prepared)
    converted = accuracy(result.module, test_x, test_y)
    assert converted >= best - 0.005
    assert abs(converted - faked) <= 0.005
    artifact = result.export(tmp_path / "model.onnx")
    assert artifact.details["kernels"].get("QLinearConv") == 2
    with quiet():
        session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: test_x.numpy()})[0]
    with torch.no_grad():
        expected = result.module(test_x).numpy()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.998
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()
