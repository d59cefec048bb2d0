"""An operator of one's own: what it computes, the shape of its output, and its gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SCALED_TANH", "scaled_tanh"]


@torch.library.custom_op("lobo_fx_example::scaled_tanh", mutates_args=())
def scaled_tanh(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`tanh(x) · weight`.

    Args:
        x: `[…, channels]`.
        weight: `[channels]`.
    """
    return x.tanh() * weight


@scaled_tanh.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = ctx.saved_tensors
    bent = x.tanh()
    return gradient * weight * (1 - bent.square()), (gradient * bent).flatten(0, -2).sum(0)


scaled_tanh.register_autograd(_gradient, setup_context=_keep)

SCALED_TANH = torch.ops.lobo_fx_example.scaled_tanh.default
"""As it stands in graphs."""
