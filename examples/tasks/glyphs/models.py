"""A plain, a residual and an attention network for 28×28 images."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..layers import Layer, ResNet, conv_norm
from ..training import Recipe
from .data import CHARACTERS, SIZE

CLASSES = len(CHARACTERS)


def simple_cnn() -> nn.Module:
    """Three convolutions with batch norm, the first with a stride, the others with pooling; two linear layers."""
    return nn.Sequential(
        *(conv_norm(1, 32, 5, stride=2), nn.ReLU()),
        *(conv_norm(32, 48), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv_norm(48, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, CLASSES)),
    )


def small_resnet() -> nn.Module:
    """A stem and three residual blocks."""
    return ResNet((24, 48, 96), CLASSES, stem_stride=2)


class VisionTransformer(nn.Module):
    """Patches of 4×4 pixels, a learned position for each, layers of attention, the mean of all tokens."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, (SIZE // 4) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads, expansion=2) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return cast("torch.Tensor", self.head(self.norm(self.layers(tokens)).mean(1)))


def small_vit() -> nn.Module:
    """Three layers of four heads."""
    return VisionTransformer(64, heads=4, depth=3)


MODELS = {
    "SimpleCNN": Recipe(simple_cnn, epochs=6),
    "SmallResNet": Recipe(small_resnet, epochs=6),
    "SmallViT": Recipe(small_vit, epochs=10, rate=2e-3),
}
