"""Turns integer regions back to float, where they turn out slower than was estimated."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.rewriting import add_parameter, drop_unused, free_name, rename
from lobo_fx.graph.tensors import fetch
from lobo_fx.own_operators.decode import DECODE
from lobo_fx.terminal.quiet import quiet

__all__ = ["ComputeInFloat"]


@dataclasses.dataclass(frozen=True)
class ComputeInFloat(Pass):
    """Statically quantized operators compute in float again; their weights stay int8 and are decoded at load.

    Before: `q(conv(dq(q(x)), dq(W₈), dq(b₃₂)))`; after: `conv(x, decode(W₈), b)`. A file keeps its size and gets the
    speed of float.
    """

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def run(self, program: Program, context: Context) -> Program:
        with quiet():
            from torch.ao.quantization.fx import _decomposed  # noqa: F401  declares the operators
        ops = torch.ops.quantized_decomposed
        graph, named, made = program.graph, [], dict[str, fx.Node]()
        for node in list(graph.nodes):
            if node.target is ops.dequantize_per_channel.default and weight_node(node.args[0]) is not None:
                named += [str(read.target) for read in node.all_input_nodes]
                node.replace_all_uses_with(_decoded(program, node, made))
            elif node.target is ops.dequantize_per_tensor.default:
                source = node.args[0]
                if source.target is ops.quantize_per_tensor.default:
                    node.replace_all_uses_with(source.args[0])
        drop_dead(graph)
        drop_unused(program, named)
        for name, read in made.items():  # now that the old tensors are gone
            rename(program, read, free_name(program, name))
        program.module.set_facts(estimated=False)
        program.module.recompile()
        return program


def _decoded(program: Program, node: fx.Node, made: dict[str, fx.Node]) -> fx.Node:
    """The float value of a dequantized weight, as decoded codes, or of a dequantized bias, as floats.

    Adds the reads of new tensors to `made`, by the names that they are to have.
    """
    graph, (read, scales, _, axis) = program.graph, node.args[:4]
    assert isinstance(read, fx.Node)
    assert isinstance(scales, fx.Node)
    assert isinstance(axis, int)
    name = str(read.target)
    codes, scale = (fetch(program.module, str(n.target)).detach() for n in (read, scales))

    def registered(name: str, value: torch.Tensor) -> fx.Node:
        if name in made:  # of a tied weight
            new: fx.Node = graph.get_attr(str(made[name].target))
        else:
            new = made[name] = add_parameter(program, free_name(program, "in_float"), value)
        new.meta["val"] = value
        return new

    with graph.inserting_before(node):
        if codes.dim() < 2:
            return registered(name, codes * scale)
        rows = codes.movedim(axis, 0).contiguous()
        stored = [read] if axis == 0 else [registered(name, rows)]
        stored.append(registered(f"{name}_scale", scale.unsqueeze(1)))
        value = graph.call_function(DECODE, (*stored, None, "int8", [*rows.shape], rows[0].numel()))
        inherit(value, node)
        if axis:
            order = [*range(1, axis + 1), 0, *range(axis + 1, rows.dim())]
            value = graph.call_function(aten.permute.default, (value, order))
            inherit(value, node)
        return value
