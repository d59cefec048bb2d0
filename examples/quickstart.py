"""Quickstart: train a small CNN on scikit-learn's digits, compile it, export it, compare. Takes seconds.

python examples/quickstart.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.plugins.registry import RUNTIMES

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def digits(batch: int = 64) -> tuple[Batches, Batches]:
    """Training and test batches: 8×8 images in [0, 1], labels 0 to 9."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return (
        list(zip(torch.split(train_x, batch), torch.split(train_y, batch), strict=True)),
        list(zip(torch.split(test_x, batch), torch.split(test_y, batch), strict=True)),
    )


def network() -> nn.Module:
    """Two convolutions with batch norm, and a classifier."""
    return nn.Sequential(
        *(nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10)),
    )


def train(model: nn.Module, data: Batches, epochs: int = 12) -> None:
    """Plain training with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def accuracy(model: nn.Module, data: Batches) -> float:
    """Share of test images classified correctly."""
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data)
    return hits / sum(len(labels) for _, labels in data)


def onnx_accuracy(path: Path, data: Batches) -> float:
    """The same, computed by ONNX Runtime from the exported file."""
    session = RUNTIMES.get("onnxruntime")().load(path, threads=1)
    name = session.inputs[0].name
    hits = sum(int((session.run({name: x.numpy()})[0].argmax(1) == y.numpy()).sum()) for x, y in data)
    return hits / sum(len(labels) for _, labels in data)


def main(folder: Path) -> None:
    """Trains, compiles, exports and compares."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train_data, test_data = digits()
    model = network()
    train(model, train_data)
    result = lobo_fx.compile(
        model,
        passes=[passes.PruneWeights(0.3), passes.QuantizeStatic()],
        example_inputs=test_data[0][0][:1],
        calibration_data=train_data[:4],
        evaluate=lambda module: accuracy(module, test_data),
    )
    result.export_original(folder / "original.onnx")
    result.export(folder / "model.onnx")
    result.benchmark()
    result.report.save(folder)
    print(result)
    for name in ("original.onnx", "model.onnx"):
        print(f"{name}: accuracy in ONNX Runtime {onnx_accuracy(folder / name, test_data):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/quickstart"))
