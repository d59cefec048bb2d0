"""Masks: zeros in a weight that survive training.

A masked weight is `mul(weight, mask)` in the graph, the mask a buffer outside the state dict. The gradient of
a masked entry is exactly zero, so an optimizer that starts at zero stays there, and the mask can be taken
off again without changing anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lobo_fx.graph.node_facts import facts_of, mark
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.tensors import fetch, register

__all__ = [
    "mask_weight",
    "masks",
    "put_masks_back",
    "restore_masks",
    "strip_masks",
    "take_off_masks",
    "weight_node",
    "without_masks",
]

_SUFFIX = "_mask"


def mask_weight(program: Program, name: str, mask: torch.Tensor) -> None:
    """Zeroes entries of a parameter and keeps them zero.

    Args:
        program: changed in place.
        name: dotted name of the parameter.
        mask: boolean, in the parameter's shape; False removes. Entries that were masked before stay masked.
    """
    weight = fetch(program.module, name)
    known = masks(program)
    if name in known:
        mask = known[name].logical_and_(mask)
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)  # multiplying by the mask would leave negative zeros
    if name in known:
        return
    tied = [n for n, p in program.module.named_parameters(remove_duplicate=False) if p is weight]
    for read in [n for n in program.graph.find_nodes(op="get_attr") if n.target in tied]:
        _mask_read(program, read, mask)
    program.module.recompile()


def _mask_read(program: Program, read: fx.Node, mask: torch.Tensor) -> None:
    name = f"{read.target}{_SUFFIX}"
    register(program.module, name, mask, persistent=False)
    with program.graph.inserting_after(read):
        stored = program.graph.get_attr(name)
    with program.graph.inserting_after(stored):
        masked = program.graph.call_function(aten.mul.Tensor, (read, stored))
    mark(masked, masked=True)
    inherit(masked, next(iter(read.users)))
    read.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


def masks(program: Program) -> dict[str, torch.Tensor]:
    """The masks in force, by parameter name."""
    masked = [node for node in program.graph.nodes if _is_masked(node)]
    return {str(node.args[0].target): program.parameter(node.args[1]) for node in masked}


def restore_masks(program: Program) -> None:
    """Marks the masks of a program that was loaded or traced again: boolean buffers named after their weights."""
    for node in program.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        weight, mask = node.args[:2]
        if all(isinstance(n, fx.Node) and n.op == "get_attr" for n in (weight, mask)):
            named = mask.target == f"{weight.target}{_SUFFIX}"
            mark(node, masked=named and program.parameter(mask).dtype == torch.bool)


def strip_masks(program: Program) -> None:
    """Removes all masks. The zeros stay in the weights, but nothing keeps them zero any more."""
    for node in list(program.graph.nodes):
        if not _is_masked(node):
            continue
        weight, mask = node.args
        with torch.no_grad():
            program.parameter(weight).masked_fill_(~program.parameter(mask), 0)
        node.replace_all_uses_with(weight)
        program.graph.erase_node(node)
        if not mask.users:
            program.graph.erase_node(mask)
            path, _, leaf = str(mask.target).rpartition(".")
            owner = program.module.get_submodule(path)
            if hasattr(owner, leaf):
                delattr(owner, leaf)
    program.module.recompile()


def take_off_masks(program: Program) -> dict[str, torch.Tensor]:
    """Removes all masks, as `strip_masks`; returns them for `put_masks_back`."""
    taken = {name: mask.clone() for name, mask in masks(program).items()}
    strip_masks(program)
    return taken


def put_masks_back(program: Program, taken: Mapping[str, torch.Tensor]) -> None:
    """Puts masks back on parameters that are still there, in the shape that they had."""
    shapes = {name: parameter.shape for name, parameter in program.module.named_parameters()}
    for name, mask in taken.items():
        if shapes.get(name) == mask.shape:
            mask_weight(program, name, mask)


def without_masks(program: Program) -> Program:
    """A copy of the program without masks that shares its weights; the program itself keeps its masks."""
    if not masks(program):
        return program
    bare = program.lazy_clone()
    strip_masks(bare)
    return bare


def weight_node(value: object) -> fx.Node | None:
    """The `get_attr` node of a weight, before its mask; None where `value` is computed in another way."""
    if isinstance(value, fx.Node) and _is_masked(value):
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_masked(node: fx.Node) -> bool:
    return facts_of(node).masked
