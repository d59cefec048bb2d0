"""Stores quantized weights under the names of their parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx, nn

from lobo_fx.graph.layers import is_constant
from lobo_fx.graph.node_facts import facts_of, mark
from lobo_fx.graph.operators import aten, is_call, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.rewriting import drop_unused, free_name
from lobo_fx.graph.tensors import fetch, register
from lobo_fx.own_operators.decode import DECODE

__all__ = ["look_up_codes", "name_weights", "stored_operands"]

_COARSE = 0.01
"""Largest error of a lookup in codes, as a share of the row's largest value: that of 7 bits, and a little more."""


def stored_operands(prepared: fx.GraphModule) -> dict[tuple[str, int], str]:
    """Which parameter each operator reads through an observer, by operator and argument position."""
    found = {}
    for node in prepared.graph.nodes:
        for position, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "call_module":
                read = _read_behind(argument.args[0])
                if read is not None:
                    found[node.name, position] = str(read.target)
    return found


def _read_behind(value: object) -> fx.Node | None:
    """The read of the parameter that a value is made of, dimensions swapped or not; None for any other value."""
    while isinstance(value, fx.Node) and value.op == "call_function" and value.meta["val"].dim() == 2:
        if len(value.all_input_nodes) != 1 or not is_constant(value):
            return None
        value = value.all_input_nodes[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def name_weights(module: fx.GraphModule, sources: dict[tuple[str, int], str]) -> None:
    """Stores each quantized weight under its parameter's name, its scale and zero point beside it."""
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    stored: dict[str, torch.Tensor] = {}
    for (operator, position), name in sources.items():
        dequantize = nodes[operator].args[position]
        reads = [n for n in dequantize.args[:3] if isinstance(n, fx.Node) and n.op == "get_attr"]
        if not reads or reads[0] is not dequantize.args[0]:
            continue  # not folded: the weight stays float
        values = [fetch(module, str(read.target)).detach() for read in reads]
        still_float = any(node.target == name for node in graph.find_nodes(op="get_attr"))
        if still_float if name not in stored else not torch.equal(stored[name], values[0]):
            mark(reads[0], tied=name)
            name = f"{name}_{operator}_int8"  # a shared parameter: others read it as float, or at another scale
        stored[name] = values[0]
        for read, suffix, value in zip(reads, ("", "_scale", "_zero_point"), values, strict=False):
            read.target = _replace(module, name + suffix, value)
    read_names = {node.target for node in graph.find_nodes(op="get_attr")}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        if name not in read_names:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)
    module.recompile()


def look_up_codes(program: Program, left: Collection[str]) -> None:
    """Lets lookups in a table that products read as int8 read the same codes, so that the file has the table once.

    Left alone: lookups that are `left` float, tables that something else reads too, and codes that are too coarse,
    since the scale of a row whose product has a large bias is wider than the row.
    """
    graph = program.graph
    for dequantize in graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_channel.default
    ):
        codes, scale, _, axis, *_ = dequantize.args
        tied = [node for node in graph.find_nodes(op="get_attr") if node.target == facts_of(codes).tied]
        readers = [user for read in tied for user in read.users]
        if not readers or axis or not all(is_call(user, aten.embedding.default) for user in readers):
            continue
        stored, scales, table = (fetch(program.module, str(node.target)).detach() for node in (codes, scale, tied[0]))
        largest = table.abs().amax(1, keepdim=True)
        if any(user.name in left for user in readers) or bool(
            ((stored * scales[:, None] - table).abs() > _COARSE * largest).any()
        ):
            continue
        columns = free_name(program, f"{codes.target}_column_scale")
        register(program.module, columns, scales.unsqueeze(1))
        for lookup in readers:
            with graph.inserting_before(lookup):
                reads = [graph.get_attr(str(codes.target)), graph.get_attr(columns)]
                weight = graph.call_function(DECODE, (*reads, None, "int8", list(stored.shape), stored.shape[1]))
            inherit(weight, lookup)
            set_argument(lookup, "weight", weight)
        for read in tied:
            graph.erase_node(read)
        drop_unused(program, [str(read.target) for read in tied])
        for suffix in ("_scale", "_zero_point", ""):  # nothing else has the parameter's name any more
            _rename(program, f"{codes.target}{suffix}", f"{tied[0].target}{suffix}")


def _rename(program: Program, old: str, new: str) -> None:
    """Gives a buffer that the graph reads another name."""
    reads = [node for node in program.graph.find_nodes(op="get_attr") if node.target == old]
    if reads:
        _replace(program.module, new, fetch(program.module, old).detach())
        for read in reads:
            read.target = new
        drop_unused(program, [old])


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> str:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    register(module, name, value)
    return name
