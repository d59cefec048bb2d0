"""Lowers the rank of weights, then splits each of their layers into two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobo_fx.graph.layers import Layer, layers
from lobo_fx.graph.operators import arguments, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.rewriting import drop_unused, free_name
from lobo_fx.graph.tensors import register
from lobo_fx.passes.fitting.linear_problem import matrix_of, put_matrix
from lobo_fx.passes.low_rank.candidates import Candidate
from lobo_fx.passes.low_rank.spectrum import spectrum

__all__ = ["lower", "name_of_first", "split_layers"]


def lower(program: Program, chosen: Sequence[Candidate], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Replaces each chosen weight by the nearest weight of its new rank, by plain singular values.

    Args:
        program: changed in place.
        chosen: candidates of this program.
        ranks: ranks by name of the candidate.

    Returns:
        The weights before, under each of their names.
    """
    wholes: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for one in chosen:
            wholes |= dict.fromkeys(one.names, one.weight.detach().clone())
            nearest = spectrum(one.matrix).nearest(ranks[one.name])
            put_matrix(one.layers[0], one.weight, nearest.unsqueeze(0).to(one.weight.dtype))
    return wholes


def name_of_first(node: str) -> str:
    """Name of the first layer's node, after a split; the second layer keeps the node of the layer that was split."""
    return f"{node}_down"


def split_layers(program: Program, chosen: Sequence[Candidate], ranks: Mapping[str, int]) -> None:
    """Splits each layer whose weight has a lower rank into two layers."""
    named = {name: one for one in chosen for name in one.names}
    pairs: dict[str, tuple[str, str]] = {}
    for layer in list(layers(program.graph)):
        one = named.get(str(layer.read.target)) if layer.read is not None else None
        if one is None:
            continue
        assert layer.read is not None
        if one.name not in pairs:
            pairs[one.name] = _store(program, layer, one.name, ranks[one.name])
        _split(program, layer, *pairs[one.name])
    drop_dead(program.graph)
    drop_unused(program, named)
    program.graph.lint()
    program.module.recompile()


def _store(program: Program, layer: Layer, name: str, rank: int) -> tuple[str, str]:
    """Registers the two factors of a layer's weight; returns their names."""
    assert layer.read is not None
    weight = program.parameter(layer.read)
    up, down = spectrum(matrix_of(layer, weight)[0]).factors(rank)
    path, _, leaf = name.rpartition(".")
    places = [1] * layer.kind.spatial_dims
    stored = []
    for part, value in (("down", down), ("up", up)):
        made = f"{path}.{part}.weight" if leaf == "weight" else f"{name}_{part}"
        stored.append(free_name(program, made.lstrip(".")))
        value = value.to(weight.dtype).reshape(*value.shape, *places).contiguous()
        register(program.module, stored[-1], nn.Parameter(value, requires_grad=weight.requires_grad))
    return stored[0], stored[1]


def _split(program: Program, layer: Layer, down: str, up: str) -> None:
    """`layer(x, W, b)` → `layer(layer(x, down), up, b)`: the existing call becomes the second layer."""
    node, graph = layer.node, program.graph
    given: dict[str, Any] = arguments(node)
    with graph.inserting_before(node):
        reads = [graph.get_attr(name) for name in (down, up)]
        values = {**given, layer.kind.weight: reads[0], layer.kind.bias: None}.values()
        name = name_of_first(node.name)
        first = graph.create_node("call_function", node.target, tuple(values), name=name)
    for new in (*reads, first):
        inherit(new, node)
    set_argument(node, layer.kind.input, first)
    set_argument(node, layer.kind.weight, reads[1])
    if layer.kind.convolves:
        set_argument(node, "stride", [1] * layer.kind.spatial_dims)
        set_argument(node, "padding", "valid" if isinstance(given["padding"], str) else [0] * layer.kind.spatial_dims)
