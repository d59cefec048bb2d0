"""Decodes a weight from its codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lobo_fx.own_operators.formats import FORMATS, unpack

__all__ = ["DECODE", "decode"]


@torch.library.custom_op("lobo_fx::decode", mutates_args=())
def decode(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    format: str,
    shape: Sequence[int],
    block_size: int,
) -> torch.Tensor:
    """A float weight from its codes: `(value(code) − zero point) × scale`.

    Args:
        codes: the weight's rows (first dimension), each flattened and packed by `formats.pack`.
        scale: `[rows, blocks]`.
        zero_point: for int4 only; `[rows, blocks]` codes, packed like those of the weight.
        format: a key of `formats.FORMATS`.
        shape: shape of the weight.
        block_size: neighbours in a row that share a scale; the last block of a row may be shorter.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    number = FORMATS[format]
    values = number.decode(unpack(codes, number.bits, columns))
    if zero_point is not None:
        zeros = number.decode(unpack(zero_point, number.bits, scale.shape[1]))
        values = values - _spread(zeros, block_size, columns)
    return (values * _spread(scale, block_size, columns)).view(rows, *shape[1:])


def _spread(per_block: torch.Tensor, block_size: int, columns: int) -> torch.Tensor:
    """Repeats the entry of each block for each of its columns."""
    return per_block if per_block.shape[1] == 1 else per_block.repeat_interleave(block_size, 1)[:, :columns]


@decode.register_fake
def _(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    format: str,
    shape: Sequence[int],
    block_size: int,
) -> torch.Tensor:
    return scale.new_empty(tuple(shape))


DECODE = torch.ops.lobo_fx.decode.default
