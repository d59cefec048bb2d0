"""Surgery that puts codes in the place of a weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.rewriting import call, free_name
from lobo_fx.graph.tensors import register
from lobo_fx.graph.weight_names import mark_weights
from lobo_fx.own_operators.decode import DECODE
from lobo_fx.own_operators.formats import Format, pack
from lobo_fx.passes.quantization.codes.rounding import Rounded
from lobo_fx.passes.quantization.codes.weights import Weight

__all__ = ["Stored", "decode_for_readers", "replace_reader", "store"]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight in codes, in the graph.

    Attributes:
        codes: the node that reads the codes.
        scale: the node that reads the scales.
        zero_point: the node that reads the zero points; None if the format has a fixed one.
        factor: the node that reads what decoded columns are multiplied by; None if columns were not evened.
        number: the format.
        shape: shape of the weight as it is stored.
        block_size: neighbours that share a scale.
    """

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    factor: fx.Node | None
    number: Format
    shape: list[int]
    block_size: int

    @property
    def layout(self) -> tuple[Any, ...]:
        """The arguments that tell our operators how to read the codes."""
        return (self.number.name, self.shape, self.block_size)


def store(
    program: Program,
    weight: Weight,
    rounded: Rounded,
    number: Format,
    block_size: int,
    factor: torch.Tensor | None = None,
) -> Stored:
    """Registers codes in place of a parameter; the parameter's readers stay as they are.

    Args:
        program: the program that has the weight.
        weight: the weight to store.
        rounded: its codes.
        number: the format.
        block_size: neighbours in a row that share a scale.
        factor: the factors that its columns were multiplied by before they were rounded, (columns,).
    """
    mark_weights(program.module)
    for name in weight.names:
        path, _, leaf = name.rpartition(".")
        delattr(program.module.get_submodule(path), leaf)
    values = {"": rounded.codes.view(weight.shape) if number.bits == 8 else pack(rounded.codes, number.bits)}
    values["_scale"] = rounded.scale
    if rounded.zero_point is not None:
        values["_zero_point"] = pack(rounded.zero_point, number.bits)
    if factor is not None:
        values["_columns"] = factor.reciprocal().view(1, *weight.shape[1:])
    nodes = {}
    with program.graph.inserting_before(weight.reads[0]):
        for suffix, value in values.items():
            name = free_name(program, weight.name + suffix)
            register(program.module, name, value)
            nodes[suffix] = program.graph.get_attr(name)
            nodes[suffix].meta["val"] = value
    read = nodes.get
    return Stored(nodes[""], nodes["_scale"], read("_zero_point"), read("_columns"), number, weight.shape, block_size)


def decode_for_readers(program: Program, weight: Weight, stored: Stored) -> None:
    """Lets the remaining readers of the parameter read its decoded values, and removes the reads of the parameter."""
    graph = program.graph
    readers = [user for read in weight.reads for user in read.users]
    if readers:
        with graph.inserting_before(weight.reads[0]):
            value = graph.call_function(DECODE, (stored.codes, stored.scale, stored.zero_point, *stored.layout))
            inherit(value, readers[0])
            value.meta["val"] = weight.reads[0].meta["val"].new_empty(weight.shape)
            if stored.factor is not None:
                value = call(graph, aten.mul.Tensor, value, stored.factor)
                inherit(value, readers[0])
            value = weight.restored(graph, value)
            inherit(value, readers[0])
    for read in weight.reads:
        if read.users:
            read.replace_all_uses_with(value)
        graph.erase_node(read)
    program.module.recompile()


def replace_reader(program: Program, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Puts a call of `target` in the place of `node`."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(target, args)
    inherit(new, node)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    program.graph.erase_node(node)
