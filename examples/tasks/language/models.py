"""A decoder: characters and positions, layers of causal attention, a logit for each character."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..training import Recipe
from .text import CONTEXT, VOCABULARY


class Attention(nn.Module):
    """Each character looks at those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast("torch.Tensor", self.out(mixed.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return cast("torch.Tensor", x + self.perceptron(x))


class Decoder(nn.Module):
    """A language model over characters.

    Args:
        width: of the residual stream.
        heads: of each attention.
        depth: layers.
    """

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Logits (rows, characters, vocabulary) of the next character, from codes (rows, characters)."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.characters(characters) + self.positions(positions)
        return cast("torch.Tensor", self.head(self.norm(self.layers(x))))


def decoder() -> nn.Module:
    """About 15.5 million parameters."""
    return Decoder(400, heads=10, depth=8)


MODELS = {"Decoder": Recipe(decoder, epochs=1, rate=1e-3, decay=0.1, batch=16)}
