"""Small networks that kits try plug-ins on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["networks"]


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        found: torch.Tensor = self.head((x + self.branch(x)).mean((2, 3)))
        return found


def networks() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Name, model and example inputs of a linear network, a convolutional one and a residual one; weights are fixed."""
    random = torch.Generator().manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for name, model, shape in (
        ("linear layers", layers, (4, 6)),
        ("convolutions", images, (4, 3, 8, 8)),
        ("residual", _Residual(), (4, 3, 8, 8)),
    ):
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():  # variances are positive
                drawn = torch.empty_like(tensor).uniform_(0.5, 1.5, generator=random)
                signs = torch.empty_like(tensor).bernoulli_(0.5, generator=random) * 2 - 1
                tensor.copy_(drawn * signs / 4 if tensor.dim() > 1 else drawn)
        yield name, model.eval(), torch.randn(shape, generator=random)
