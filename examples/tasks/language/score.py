"""How good a language model is: how many bits it needs to say the next character."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..training import Split


def character_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (rows, characters, vocabulary)."""
    return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def bits_per_character(module: nn.Module, split: Split, rows: int = 512) -> float:
    """Mean over the characters of some rows, spread evenly over the split."""
    module.eval()
    chosen = torch.linspace(0, len(split) - 1, min(rows, len(split))).long()
    part = Split(split.inputs[chosen], split.labels[chosen])
    with torch.no_grad():
        losses = [float(character_loss(module(inputs), labels)) * len(inputs) for inputs, labels in part.batches(32)]
    return sum(losses) / len(part) / math.log(2)


def negative_bits(module: nn.Module, split: Split) -> float:
    """So that higher is better."""
    return -bits_per_character(module, split)
