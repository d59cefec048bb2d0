"""The table of our own operators, their costs, and the weights that they store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.tensors import fetch
from lobo_fx.own_operators.attention import ATTENTION, attention_flops
from lobo_fx.own_operators.decode import DECODE, decode
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM, lstm_flops
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT, PRODUCT, product_flops

__all__ = ["FLOPS", "OWN", "packed_weights", "quantizes_inputs"]

OWN = frozenset({DECODE, PRODUCT, DYNAMIC_PRODUCT, DYNAMIC_LSTM, ATTENTION})

FLOPS: dict[Any, Any] = {
    torch.ops.lobo_fx.product: product_flops,
    torch.ops.lobo_fx.dynamic_product: product_flops,
    torch.ops.lobo_fx.dynamic_lstm: lstm_flops,
    torch.ops.lobo_fx.attention: attention_flops,
}
"""Floating-point operations of our operators, for `torch.utils.flop_counter`."""


def quantizes_inputs(target: object, args: Sequence[Any]) -> bool:
    """Whether a call rounds its activations, so that a tiny difference before it may grow to a whole step."""
    return target in (DYNAMIC_PRODUCT, DYNAMIC_LSTM) or (target is PRODUCT and args[-1] == "int8")


def packed_weights(module: fx.GraphModule) -> dict[str, Callable[[], torch.Tensor]]:
    """Functions that decode the packed weights of a graph, by the name of the codes."""
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in (DECODE, PRODUCT):
            continue
        codes, scale, zero_point = node.args[:3] if node.target is DECODE else node.args[1:4]
        layout = node.args[3:6] if node.target is DECODE else node.args[5:8]
        stored = [None if read is None else fetch(module, str(read.target)) for read in (codes, scale, zero_point)]
        found[str(codes.target)] = functools.partial(decode, *stored, *layout)
    return found
