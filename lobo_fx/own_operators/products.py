"""Linear layers that read their weight as codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lobo_fx.own_operators.decode import decode
from lobo_fx.own_operators.integers import integer_product, round_blocks

__all__ = ["ACCURACY_LEVELS", "DYNAMIC_PRODUCT", "PRODUCT", "dynamic_product", "product", "product_flops"]

ACCURACY_LEVELS = {"float32": 1, "int8": 4}
"""ONNX Runtime's accuracy level of MatMulNBits, by the type in which `product` computes activations."""


@torch.library.custom_op("lobo_fx::product", mutates_args=())
def product(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    shape: Sequence[int],
    block_size: int,
    compute: str,
) -> torch.Tensor:
    """`linear(x, decode(codes, …), bias)`; with compute "int8", `x` is rounded to int8 in blocks first.

    Args:
        x: `[…, shape[1]]`.
        codes: see `decode`.
        scale: see `decode`.
        zero_point: see `decode`.
        bias: `[shape[0]]`.
        format: see `decode`.
        shape: shape of the weight, outputs × inputs.
        block_size: see `decode`.
        compute: `float32` or `int8`.
    """
    weight = decode(codes, scale, zero_point, format, shape, block_size)
    x = round_blocks(x, block_size) if compute == "int8" else x
    return torch.nn.functional.linear(x, weight, bias)


@product.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    shape: Sequence[int],
    block_size: int,
    compute: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("lobo_fx::dynamic_product", mutates_args=())
def dynamic_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A linear layer in integers; `x` is quantized to uint8 by its own range at run time.

    Args:
        x: `[…, inputs]`.
        codes: int8, `[outputs, inputs]`.
        scale: `[outputs, 1]`.
        bias: `[outputs]`.
    """
    result = integer_product(x, codes, scale)
    return result if bias is None else result + bias


@dynamic_product.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Saves what the gradient of a product needs: the weight's codes, and whether there is a bias."""
    if len(inputs) == 4:
        _, codes, scale, bias = inputs
        inputs = (None, codes, scale, None, bias, "int8", [*codes.shape], codes.shape[1], "int8")
    _, codes, scale, zero_point, bias, *layout, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point)
    ctx.layout, ctx.has_bias = layout, bias is not None


def _linear_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradient of a linear layer; rounding of the inputs is passed straight through."""
    weight = decode(*ctx.saved_tensors, *ctx.layout)
    bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias else None
    at, count = (3, 4) if len(ctx.needs_input_grad) == 4 else (4, 9)
    found: list[torch.Tensor | None] = [None] * count
    found[0], found[at] = gradient @ weight, bias
    return tuple(found)


product.register_autograd(_linear_gradient, setup_context=_keep_weight)

dynamic_product.register_autograd(_linear_gradient, setup_context=_keep_weight)

PRODUCT = torch.ops.lobo_fx.product.default
DYNAMIC_PRODUCT = torch.ops.lobo_fx.dynamic_product.default


def product_flops(x: Any, codes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(x) * out_shape[-1])
