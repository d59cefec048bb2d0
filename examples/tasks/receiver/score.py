"""How good a demapper is: the share of wrong bits at every signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..training import Split
from .channel import TEST_SNRS, exact_bits, is_pilot


def bit_loss(outputs: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the bits, pilots aside: what is missing to the capacity of the channel, in nats a bit."""
    data = ~is_pilot()
    return nn.functional.binary_cross_entropy_with_logits(outputs[..., data], bits[..., data])


def bit_error_rates(demap: Callable[[torch.Tensor], torch.Tensor], split: Split) -> dict[float, float]:
    """By signal-to-noise ratio in decibels, the share of wrong bits.

    Args:
        demap: from what a receiver knows to logits of the bits.
        split: slots, SNR by SNR.
    """
    if isinstance(demap, nn.Module):
        demap.eval()
    data = ~is_pilot()
    wrong = []
    with torch.no_grad():
        for inputs, bits in split.batches(500):
            errors = (demap(inputs)[..., data] > 0) != (bits[..., data] > 0.5)
            wrong.append(errors.float().mean((1, 2)))
    by_slot = torch.cat(wrong)
    snrs = [round(-10 * float(inputs[4, 0, 0]), 1) for inputs in split.inputs]
    rates = {snr: by_slot[torch.tensor([other == snr for other in snrs])] for snr in TEST_SNRS}
    return {snr: float(found.mean()) for snr, found in rates.items() if len(found)}


def bit_accuracy(module: nn.Module, split: Split) -> float:
    """Share of right bits over all ratios."""
    rates = bit_error_rates(module, split)
    return 1 - sum(rates.values()) / len(rates)


def exact_rates(split: Split) -> dict[float, float]:
    """What the exact demapper reaches."""
    return bit_error_rates(exact_bits, split)
