"""Our own operators as one ONNX node each, in a domain of our own, until `lowering` writes them out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnxscript
import torch

from lobo_fx.own_operators.attention import ATTENTION
from lobo_fx.own_operators.decode import DECODE
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT, PRODUCT
from lobo_fx.own_operators.table import OWN

__all__ = ["DOMAIN", "translations"]

DOMAIN = "lobo_fx"


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export`: each of our operators becomes a node of the same name and arguments."""
    return {
        DECODE: _decode,
        PRODUCT: _product,
        DYNAMIC_PRODUCT: _dynamic_product,
        DYNAMIC_LSTM: _dynamic_lstm,
        ATTENTION: _attention,
    }


def _decode(  # type: ignore[no-untyped-def]
    codes, scale, zero_point=None, format: str = "", shape: Sequence[int] = (), block_size: int = 0
):
    return _node_of("decode")(codes, scale, zero_point, format=format, shape=shape, block_size=block_size)


def _product(  # type: ignore[no-untyped-def]
    x,
    codes,
    scale,
    zero_point=None,
    bias=None,
    format: str = "",
    shape: Sequence[int] = (),
    block_size: int = 0,
    compute: str = "",
):
    attributes = {"format": format, "shape": shape, "block_size": block_size, "compute": compute}
    return _node_of("product")(x, codes, scale, zero_point, bias, **attributes)


def _dynamic_product(x, codes, scale, bias=None):  # type: ignore[no-untyped-def]
    return _node_of("dynamic_product")(x, codes, scale, bias)


def _dynamic_lstm(x, hidden, cell, params, directions: int = 0):  # type: ignore[no-untyped-def]
    return _node_of("dynamic_lstm")(x, hidden, cell, *params, directions=directions)


def _attention(  # type: ignore[no-untyped-def]
    query, key, value, bias=None, heads: int = 0, scale: float = 0.0, is_causal: bool = False
):
    return _node_of("attention")(query, key, value, bias, heads=heads, scale=scale, is_causal=is_causal)


@functools.cache
def _node_of(name: str) -> Any:
    """An onnxscript operator with the schema of our PyTorch operator."""
    schema_class = onnx.defs.OpSchema
    types = {torch.StringType: "STRING", torch.IntType: "INT", torch.SymIntType: "INT", torch.ListType: "INTS"}
    types |= {torch.FloatType: "FLOAT", torch.BoolType: "INT"}
    tensors = torch.ListType.ofTensors()
    (schema,) = (overload._schema for overload in OWN if overload._schema.name == f"{DOMAIN}::{name}")
    inputs: list[Any] = []
    attributes = []
    for argument in schema.arguments:
        kind = type(argument.real_type)
        if kind in types and argument.real_type != tensors:
            attribute_type = getattr(schema_class.AttrType, types[kind])
            attributes.append(schema_class.Attribute(argument.name, attribute_type, required=True))
        else:
            options = schema_class.FormalParameterOption
            option = {torch.OptionalType: options.Optional, torch.ListType: options.Variadic}.get(kind, options.Single)
            if option is options.Variadic:
                inputs.clear()  # onnxscript gives such an input every argument, also those before it
            name_and_type = (argument.name, f"T{len(inputs)}")
            inputs.append(schema_class.FormalParameter(*name_and_type, param_option=option, is_homogeneous=False))
    outputs = [schema_class.FormalParameter(f"output{at}", f"U{at}") for at in range(len(schema.returns))]
    every = ["tensor(float)", "tensor(uint8)", "tensor(int8)"]
    constraints = [(parameter.type_str, every, "") for parameter in [*inputs, *outputs]]
    made = schema_class(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=outputs,
        type_constraints=constraints,
        attributes=attributes,
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, made)
