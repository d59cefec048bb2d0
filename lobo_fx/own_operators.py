"""Operators of our own: weights of few bits decoded on the fly, products that quantize their inputs, fused attention.

A graph calls them like ATen's; they survive `torch.export`, and an exporter writes each as operators of its format.
Their bodies here are the reference that a file is compared with.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.formats import FORMATS, unpack
from lobo_fx.program import fetch


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
        codes: the weight's rows (first dimension), the rest of it flattened; packed as `formats.pack` does.
        scale: `[rows, blocks]`.
        zero_point: of int4 only, packed like codes, `[rows, blocks]` of them.
        format: a key of `formats.FORMATS`.
        shape: of the weight.
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
    """One entry a column from one entry a block."""
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
        codes: as for `decode`, like all that follows but
        scale: see `decode`.
        zero_point: see `decode`.
        bias: `[shape[0]]`.
        format: see `decode`.
        shape: of the weight, outputs × inputs.
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


def round_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """`x` as symmetric int8 with a scale for every `block_size` neighbours, and back to float."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block_size))
    blocks = padded.reshape(*padded.shape[:-1], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scale > 0, blocks / scale, 0).round()
    rounded: torch.Tensor = (steps * scale).flatten(-2)[..., :columns]
    return rounded


@torch.library.custom_op("lobo_fx::dynamic_product", mutates_args=())
def dynamic_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """A linear layer in integers, `x` quantized to uint8 by its own range at run time.

    Args:
        x: `[…, inputs]`.
        codes: int8, `[outputs, inputs]`.
        scale: `[outputs, 1]`.
        bias: `[outputs]`.
    """
    result = _integer_product(x, codes, scale)
    return result if bias is None else result + bias


def _integer_product(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], len(codes)))
    step, zero = dynamic_range(x)
    steps = (x / step).round() + zero
    # float64 holds the sums of products exactly, and is faster than integers in PyTorch
    sums = (steps.clamp(0, 255) - zero).double() @ codes.double().T
    return sums.float() * (step * scale.flatten())


@dynamic_product.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def dynamic_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of uint8 over the range of `x` and zero, as ONNX defines DynamicQuantizeLinear."""
    low, high = x.aminmax()
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = (high - low) / 255
    step = torch.where(step == 0, torch.ones_like(step), step)
    return step, (-low / step).round().clamp(0, 255)


@torch.library.custom_op("lobo_fx::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor, params: Sequence[torch.Tensor], directions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer of an LSTM, its products in integers: `x` quantized to uint8 as a whole, hidden states step by step.

    Args:
        x: `[steps, rows, inputs]`.
        hidden: `[directions, rows, hidden]`; in each step the rows share one range.
        cell: `[directions, rows, hidden]`.
        params: per direction: codes `[4 × hidden, inputs]` of the inputs' weight and their scale `[4 × hidden, 1]`,
            codes and scale of the states' weight, and both biases or none; gates in PyTorch's order.
        directions: 2 where one more runs backwards.

    Returns:
        As `torch.nn.LSTM` does: all hidden states `[steps, rows, directions × hidden]`, the last, the last cells.
    """
    outputs, finals = [], []
    for direction, (codes, scale, state_codes, state_scale, *biases) in enumerate(_by_direction(params, directions)):
        gates = _integer_product(x, codes, scale)
        state_codes = state_codes.double()  # once, not in every step
        h, c, bias, states = hidden[direction], cell[direction], sum(biases), []
        for step in gates.flip(0) if direction else gates:
            i, f, g, o = (step + _integer_product(h, state_codes, state_scale) + bias).chunk(4, 1)
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
    """That of a float LSTM with the decoded weights: rounding of inputs and states is passed straight through."""
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
        value: `[batch, keys, heads × head_dim]`; the head dimension may be another, and is the output's.
        bias: added to the scores before softmax, `[batch or 1, heads or 1, queries, keys]`.
        heads: how many.
        scale: of the scores.
        is_causal: whether a query sees no key after its own place; then there are as many keys as queries.
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
    """Computed anew, as PyTorch differentiates it."""
    with torch.enable_grad():
        query, key, value, *bias = (t.detach().requires_grad_() for t in ctx.saved_tensors if t is not None)
        output = _attention(query, key, value, bias[0] if bias else None, *ctx.settings)
        found = torch.autograd.grad(output, [query, key, value, *bias], gradient)
    return (*found, *[None] * (7 - len(found)))


attention.register_autograd(_attention_gradient, setup_context=_keep_attention)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """What the gradient of a product needs: the weight's codes, and of the bias only that it is there."""
    if len(inputs) == 4:
        _, codes, scale, bias = inputs
        inputs = (None, codes, scale, None, bias, "int8", [*codes.shape], codes.shape[1], "int8")
    _, codes, scale, zero_point, bias, *layout, _ = inputs
    ctx.save_for_backward(codes, scale, zero_point)
    ctx.layout, ctx.has_bias = layout, bias is not None


def _linear_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """That of a linear layer: rounding of the inputs is passed straight through."""
    weight = decode(*ctx.saved_tensors, *ctx.layout)
    bias = gradient.flatten(0, -2).sum(0) if ctx.has_bias else None
    at, count = (3, 4) if len(ctx.needs_input_grad) == 4 else (4, 9)
    found: list[torch.Tensor | None] = [None] * count
    found[0], found[at] = gradient @ weight, bias
    return tuple(found)


product.register_autograd(_linear_gradient, setup_context=_keep_weight)
dynamic_product.register_autograd(_linear_gradient, setup_context=_keep_weight)

DECODE = torch.ops.lobo_fx.decode.default
PRODUCT = torch.ops.lobo_fx.product.default
DYNAMIC_PRODUCT = torch.ops.lobo_fx.dynamic_product.default
DYNAMIC_LSTM = torch.ops.lobo_fx.dynamic_lstm.default
ATTENTION = torch.ops.lobo_fx.attention.default
OWN = frozenset({DECODE, PRODUCT, DYNAMIC_PRODUCT, DYNAMIC_LSTM, ATTENTION})


def _product_flops(x: Any, codes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(x) * out_shape[-1])


def _lstm_flops(x: Any, hidden: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(x[:2]) * hidden[0] * 4 * hidden[2] * (x[2] + hidden[2]))


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * query[0] * query[1] * key[1] * (query[2] + value[2]))


FLOPS: dict[Any, Any] = {
    torch.ops.lobo_fx.product: _product_flops,
    torch.ops.lobo_fx.dynamic_product: _product_flops,
    torch.ops.lobo_fx.dynamic_lstm: _lstm_flops,
    torch.ops.lobo_fx.attention: _attention_flops,
}
"""What `torch.utils.flop_counter` can't know of them."""


def quantizes_inputs(target: object, args: Sequence[Any]) -> bool:
    """Whether a call rounds its activations, so that a rounding difference before it may grow into a step."""
    return target in (DYNAMIC_PRODUCT, DYNAMIC_LSTM) or (target is PRODUCT and args[-1] == "int8")


def packed_weights(module: fx.GraphModule) -> dict[str, Callable[[], torch.Tensor]]:
    """By the name of the codes, what gives the weights that they stand for."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in (DECODE, PRODUCT):
            continue
        codes, scale, zero_point = node.args[:3] if node.target is DECODE else node.args[1:4]
        layout = node.args[3:6] if node.target is DECODE else node.args[5:8]
        stored = [None if read is None else fetch(module, str(read.target)) for read in (codes, scale, zero_point)]
        found[str(codes.target)] = functools.partial(decode, *stored, *layout)
    return found
