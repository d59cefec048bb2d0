"""A small CNN and a small residual network for 8×8 images."""

from __future__ import annotations

from torch import nn

from ..layers import ResNet, conv_norm
from ..training import Recipe

CLASSES = 10


def small_cnn() -> nn.Module:
    """Two convolutions with batch norm and pooling, two linear layers."""
    return nn.Sequential(
        *(conv_norm(1, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(conv_norm(32, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )


def small_resnet() -> nn.Module:
    """A stem and two residual blocks."""
    return ResNet((40, 64), CLASSES, stem_stride=1)


MODELS = {"SmallCNN": Recipe(small_cnn, epochs=20), "SmallResNet": Recipe(small_resnet, epochs=20)}
