"""A residual network over the grid of times and subcarriers."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..layers import ResidualBlock, conv_norm
from ..training import Recipe
from .channel import BITS


class Demapper(nn.Module):
    """About 98,000 parameters: a stem, two residual blocks, a convolution and a logit for each bit of each symbol."""

    def __init__(self, width: int = 46) -> None:
        super().__init__()
        self.stem = conv_norm(5, width)
        self.blocks = nn.Sequential(ResidualBlock(width, width), ResidualBlock(width, width))
        self.last = conv_norm(width, width)
        self.head = nn.Conv2d(width, BITS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.blocks(self.stem(x).relu())).relu()
        return cast("torch.Tensor", self.head(x))


MODELS = {"Demapper": Recipe(Demapper, epochs=20, rate=3e-3, decay=1e-4)}
