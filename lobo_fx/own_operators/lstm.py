"""An LSTM layer whose matrix products are computed in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lobo_fx.own_operators.integers import integer_product

__all__ = ["DYNAMIC_LSTM", "dynamic_lstm", "lstm_flops"]


@torch.library.custom_op("lobo_fx::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, params: Sequence[torch.Tensor], directions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer of an LSTM with integer products: `x` is quantized to uint8 as a whole, hidden states in every step.

    Args:
        x: `[steps, rows, inputs]`.
        hidden: `[directions, rows, hidden]`; in each step, all rows share one range.
        cell: `[directions, rows, hidden]`.
        params: per direction: codes `[4 × hidden, inputs]` of the inputs' weight and their scale `[4 × hidden, 1]`,
            codes and scale of the states' weight, and both biases or none; gates in PyTorch's order.
        directions: 2 if bidirectional, else 1.

    Returns:
        As `torch.nn.LSTM`: all hidden states `[steps, rows, directions × hidden]`, the last hidden and cell states.
    """
    outputs, finals = [], []
    for direction, (codes, scale, state_codes, state_scale, *biases) in enumerate(_by_direction(params, directions)):
        gates = integer_product(x, codes, scale)
        state_codes = state_codes.double()  # once, not in every step
        h, c, bias, states = hidden[direction], cell[direction], sum(biases), []
        for step in gates.flip(0) if direction else gates:
            i, f, g, o = (step + integer_product(h, state_codes, state_scale) + bias).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        outputs.append(torch.stack(states[::-1] if direction else states))
        finals.append((h, c))
    last_hidden, last_cell = (torch.stack(last) for last in zip(*finals, strict=True))
    return torch.cat(outputs, 2), last_hidden, last_cell


def _by_direction(params: Sequence[Any], directions: int) -> list[Sequence[Any]]:
    count = len(params) // directions
    return [params[at : at + count] for at in range(0, len(params), count)]


@dynamic_lstm.register_fake
def _(
    x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, params: Sequence[torch.Tensor], directions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((*x.shape[:2], directions * hidden.shape[2]), hidden.shape, cell.shape)
    every, last_hidden, last_cell = (x.new_empty(shape) for shape in shapes)
    return every, last_hidden, last_cell


def _keep_lstm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, params, ctx.directions = inputs
    ctx.save_for_backward(*tensors, *params)


def _lstm_gradient(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
    """The gradient of a float LSTM with the decoded weights, straight through the rounding of inputs and states."""
    tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in ctx.saved_tensors]
    x, hidden, cell, *params = tensors
    with torch.enable_grad():
        weights: list[torch.Tensor] = []
        for codes, scale, state_codes, state_scale, *biases in _by_direction(params, ctx.directions):
            weights += [codes * scale.detach(), state_codes * state_scale.detach(), *biases]
        biased, both = len(params) == 6 * ctx.directions, ctx.directions == 2
        outputs = torch.lstm(x, (hidden, cell), weights, biased, 1, 0.0, False, both, False)
        sources = [tensor for tensor in tensors if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, sources, gradients, allow_unused=True))
    results = [next(found) if tensor.requires_grad else None for tensor in tensors]
    return (*results[:3], results[3:], None)


dynamic_lstm.register_autograd(_lstm_gradient, setup_context=_keep_lstm)


def lstm_flops(x: Any, hidden: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(x[:2]) * hidden[0] * 4 * hidden[2] * (x[2] + hidden[2]))


DYNAMIC_LSTM = torch.ops.lobo_fx.dynamic_lstm.default
