"""Layers that the tasks' models share."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.second = conv_norm(outputs, outputs)
        plain = inputs == outputs and stride == 1
        self.skip = nn.Identity() if plain else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.second(self.first(x).relu()) + self.skip(x)).relu()


class ResNet(nn.Module):
    """A stem and one residual block a stage; each stage after the first halves the image."""

    def __init__(self, widths: tuple[int, ...], classes: int, stem_stride: int) -> None:
        super().__init__()
        self.stem = conv_norm(1, widths[0], stride=stem_stride)
        stages = zip(widths[:1] + widths[:-1], widths, strict=True)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(stages)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.head(self.blocks(self.stem(x).relu()).mean((2, 3))))


class Attention(nn.Module):
    """Self-attention over all tokens, or over those before each.

    Args:
        width: of a token.
        heads: into which it is divided.
        is_causal: whether a token sees none of those after it.
    """

    def __init__(self, width: int, heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        return cast("torch.Tensor", self.out(mixed.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a skip connection.

    Args:
        width: of a token.
        heads: of the attention.
        expansion: how many times as wide the perceptron is inside.
        is_causal: whether a token sees none of those after it.
    """

    def __init__(self, width: int, heads: int, expansion: int, is_causal: bool = False) -> None:
        super().__init__()
        inner = expansion * width
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, is_causal))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return cast("torch.Tensor", x + self.perceptron(x))
