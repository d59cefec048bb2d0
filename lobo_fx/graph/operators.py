"""Facts about ATen operators that every stage needs: arguments by name, and named families."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = [
    "CONVOLUTIONS",
    "RECURRENT",
    "SPLITS",
    "TRANSPOSED_CONVOLUTIONS",
    "VALUE_PRESERVING",
    "arguments",
    "aten",
    "is_call",
    "is_inplace",
    "is_view",
    "named_values",
    "set_argument",
    "training_flag",
    "works_on_codes",
]

aten = torch.ops.aten
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
"""Convolutions, with explicit padding or with padding by name."""
CONVOLUTIONS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
TRANSPOSED_CONVOLUTIONS = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)
"""Transposed convolutions."""

SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unsafe_chunk.default,
        aten.tensor_split.sections,
    }
)
"""Operators that split a tensor into parts."""

RECURRENT = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
"""Recurrent layers."""

VALUE_PRESERVING = frozenset(
    {
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.max_pool2d.default,
        aten.dropout.default,
    }
)
"""Operators that move values without changing them: a quantized output keeps the scale and zero point of the input."""

_ON_CODES = ("quantized_decomposed", "lobo_fx")

_TRAINING_FLAGS = ("training", "train", "use_input_stats")


def is_call(node: object, *targets: object) -> bool:
    """Whether `node` calls one of `targets` (operator overloads)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator call by schema name, defaults filled in.

    Example:
        `arguments(conv)["stride"]` is `[1, 1]` where the graph says nothing of strides.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    given |= node.kwargs
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def named_values(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an operator's arguments by schema name, while it is run; arguments left out are missing."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def works_on_codes(node: fx.Node) -> bool:
    """Whether an operator quantizes, dequantizes, or reads weights as codes: torch's or our own."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _ON_CODES


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Sets one argument of an operator call by schema name, positional or keyword."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    index = next(i for i, argument in enumerate(schema) if argument.name == name)
    if schema[index].kwarg_only or name in node.kwargs:
        node.kwargs = {**node.kwargs, name: value}
        return
    values = list(node.args)
    values += [argument.default_value for argument in schema[len(values) : index + 1]]
    values[index] = value
    node.args = tuple(values)


def training_flag(node: fx.Node) -> str | None:
    """Name of the argument that switches `node` between training and inference, if it has one.

    None for norms without running statistics, which use the batch's in both modes.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = {argument.name for argument in node.target._schema.arguments}
    without = node.target is aten._native_batch_norm_legit.no_stats
    if without or ("running_mean" in names and arguments(node)["running_mean"] is None):
        return None
    return next((name for name in _TRAINING_FLAGS if name in names), None)


def is_inplace(node: fx.Node) -> bool:
    """Whether `node` writes into one of its arguments, by its schema."""
    return (
        node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    )


def is_view(node: fx.Node) -> bool:
    """Whether a call may give a view of its first argument, or of a part of it."""
    if isinstance(node.target, torch._ops.OpOverload):
        given = node.target._schema.arguments
        return bool(given) and given[0].alias_info is not None
    return is_call(node, operator.getitem)
