"""A decoder: characters and positions, layers of causal attention, a logit for each character."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from ..layers import Layer
from ..training import Recipe
from .text import CONTEXT, VOCABULARY


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
        self.layers = nn.Sequential(*(Layer(width, heads, expansion=4, is_causal=True) for _ in range(depth)))
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


# Products in bfloat16 take two thirds of the time where the processor has instructions for them.
MODELS = {"Decoder": Recipe(decoder, epochs=1, rate=1e-3, decay=0.1, batch=16, mixed_precision="bf16")}
