"""Attention over rows that hold all heads side by side."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ATTENTION", "attention", "attention_flops"]


@torch.library.custom_op("lobo_fx::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    """Softmax attention of rows that hold all heads side by side: `[batch, queries, heads × head_dim]`.

    Args:
        query: `[batch, queries, heads × head_dim]`.
        key: `[batch, keys, heads × head_dim]`.
        value: `[batch, keys, heads × head_dim]`; its head dimension may differ, and is the output's.
        bias: added to the scores before softmax, `[batch or 1, heads or 1, queries, keys]`.
        heads: number of heads.
        scale: factor of the scores.
        is_causal: whether a query attends to no key after its own position; requires as many keys as queries.
    """
    return _attention(query, key, value, bias, heads, scale, is_causal).contiguous()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    heads: int,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    q, k, v = (rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2) for rows in (query, key, value))
    result = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal, scale=scale)
    return result.transpose(1, 2).flatten(2)


@attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *settings: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    tensors, ctx.settings = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors)


def _attention_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient, by running the attention again under PyTorch's autograd."""
    with torch.enable_grad():
        query, key, value, *bias = (t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None)
        output = _attention(query, key, value, bias[0] if bias else None, *ctx.settings)
        found = torch.autograd.grad(output, [query, key, value, *bias], gradient)
    return (*found, *[None] * (7 - len(found)))


attention.register_autograd(_attention_gradient, setup_context=_keep_attention)


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * query[0] * query[1] * key[1] * (query[2] + value[2]))


ATTENTION = torch.ops.lobo_fx.attention.default
