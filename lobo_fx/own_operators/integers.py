"""Arithmetic that the integer operators share: ranges, rounding, and products of integers."""

from __future__ import annotations

import torch

__all__ = ["dynamic_range", "integer_product", "round_blocks"]


def round_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Rounds `x` to symmetric int8 with a scale for every `block_size` neighbours, and returns it as float."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block_size))
    blocks = padded.reshape(*padded.shape[:-1], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0).round()
    rounded: torch.Tensor = (steps * scale).flatten(-2)[..., :columns]
    return rounded


def integer_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], len(codes)))
    step, zero = dynamic_range(x)
    steps = (x / step).round() + zero
    # float64 holds the sums of products exactly, and is faster than integers in PyTorch
    sums = (steps.clamp(0, 255) - zero).double() @ codes.double().T
    return sums.float() * (step * scale.flatten())


def dynamic_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of uint8 over the range of `x`, including zero, as in ONNX's DynamicQuantizeLinear."""
    low, high = x.aminmax()
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, (-low / step).round().clamp(0, 255)
