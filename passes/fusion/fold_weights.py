"""Folds weights that are computed from parameters alone into parameters of their own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.layers import LAYERS, LOOKUPS, is_constant, layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.node_facts import facts_of
from lobo_fx.graph.operators import RECURRENT, arguments, is_call, works_on_codes
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.rewriting import add_parameter, drop_unused, free_name, rename
from lobo_fx.graph.running import Runner

__all__ = ["FoldWeights", "fold_weights"]

_PARTS = re.compile(r"parametrizations\.(\w+)\.original\d*$|(\w+)_(?:v|g|orig)$")
"""Names of the tensors from which torch's parametrizations (weight norm, spectral norm), old or new, make a weight."""


@dataclasses.dataclass(frozen=True)
class FoldWeights(Pass):
    """A weight that the graph computes from stored tensors at every call is computed once, and stored.

    Before: `linear(x, g · v / ‖v‖, b)`; after: `linear(x, W, b)`. Cases: (1) weight norm, spectral norm, weight
    standardisation; (2) `w / 16`, `w.t()`, a view of another parameter; (3) low-rank updates, `w + b @ a` (LoRA).

    Passes that need stored weights (quantization, refitting) fold by themselves. The tensors that the weight was
    computed from are no longer parameters, so fold after training. A weight that depends on an input, or on random
    numbers, is not constant and stays.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        if not fold_weights(program):
            context.note("fold_weights found no weight that is computed from parameters alone")
        return program


def fold_weights(program: Program, swapped: bool = True) -> list[str]:
    """Folds constant expressions that layers, recurrent layers and lookups read as weights, in place.

    Args:
        program: shapes propagated.
        swapped: whether a weight that is stored as inputs × outputs, and read through a permute, is stored as outputs
            × inputs instead, where nothing reads it otherwise.

    Returns:
        Names of the parameters that were made.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for operand in _weight_operands(node):
            if weight_node(operand) is not None or not is_constant(operand):
                continue
            whole = not any(works_on_codes(inner) or facts_of(inner).masked for inner in _between(operand))
            if whole and (swapped or not _is_swap(node, operand)):
                found.setdefault(operand, node)
    made = [name for operand, reader in found.items() if (name := _fold(program, operand, reader))]
    if made:
        program.graph.lint()
        program.module.recompile()
    return made


def _weight_operands(node: fx.Node) -> list[fx.Node]:
    """What a call reads as its weights."""
    if node.op != "call_function":
        return []
    given = arguments(node)
    if node.target in LAYERS:
        return [given[LAYERS[node.target].weight]]
    if is_call(node, *LOOKUPS):
        return [given["weight"]]
    return list(given["params"]) if is_call(node, *RECURRENT) else []


def _is_swap(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a layer reads a stored weight whose dimensions are swapped, and nothing else happens to it."""
    layer = layer_of(node)
    return layer is not None and layer.read is not None and layer.weight is operand


def _fold(program: Program, operand: fx.Node, reader: fx.Node) -> str:
    """Puts a parameter in the place of an expression; returns its name, empty where that would store it twice."""
    graph = program.graph
    inside = _between(operand)
    reads = [
        source for source in dict.fromkeys(n for i in inside for n in i.all_input_nodes) if source.op == "get_attr"
    ]
    if any(user not in inside for read in reads for user in read.users) and _is_swap(reader, operand):
        return ""  # the weight is read both ways: one of them goes on through the permute
    with torch.no_grad():
        value = _evaluate(program, operand, inside).detach().clone(memory_format=torch.contiguous_format)
    stored = [program.parameter(read) for read in reads]
    if any(isinstance(tensor, nn.Parameter) for tensor in stored):
        value = nn.Parameter(value, requires_grad=any(tensor.requires_grad for tensor in stored))
    names = [str(read.target) for read in reads]
    largest = max(reads, key=lambda read: program.parameter(read).numel())
    with graph.inserting_before(operand):
        new = add_parameter(program, free_name(program, "folded"), value)
    new.meta["val"] = operand.meta["val"]
    operand.replace_all_uses_with(new)
    drop_dead(graph)
    drop_unused(program, names)  # which frees the name that the weight is to have
    return rename(program, new, free_name(program, _name(str(largest.target))))


def _between(operand: fx.Node) -> list[fx.Node]:
    """The operators of an expression of stored tensors, in no order."""
    found: dict[fx.Node, None] = {}
    ahead = [operand]
    while ahead:
        node = ahead.pop()
        if node not in found and node.op != "get_attr":
            found[node] = None
            ahead += node.all_input_nodes
    return list(found)


def _evaluate(program: Program, operand: fx.Node, inside: Collection[fx.Node]) -> torch.Tensor:
    """The value of an expression of stored tensors."""
    runner, values = Runner(program.module), dict[fx.Node, object]()
    for node in program.graph.nodes:
        if node in inside or (node.op == "get_attr" and any(user in inside for user in node.users)):
            values[node] = runner.evaluate(node, values)
    result = values[operand]
    assert isinstance(result, torch.Tensor)
    return result


def _name(largest: str) -> str:
    """Name of a folded weight: that of its largest part; for a parametrization, that of the parametrized weight."""
    if match := _PARTS.search(largest):
        return f"{largest[: match.start()]}{match[1] or match[2]}"
    return largest
