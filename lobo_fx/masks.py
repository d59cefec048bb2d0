"""Masks: zeros in a weight that survive training.

A masked weight is `mul(weight, mask)` in the graph, the mask a buffer outside the state dict. The gradient of
a masked entry is exactly zero, so an optimizer that starts at zero stays there, and the mask can be taken
off again without changing anything.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import fx

from lobo_fx.operators import aten, is_call
from lobo_fx.program import Program, ProgramModule, fetch, register
from lobo_fx.provenance import inherit
from lobo_fx.quiet import quiet

_SUFFIX = "_mask"


def mask_weight(program: Program, name: str, mask: torch.Tensor) -> None:
    """Zeroes entries of a parameter and keeps them zero.

    Args:
        program: changed in place.
        name: dotted name of the parameter.
        mask: boolean, of the parameter's shape; False removes. Entries masked before stay so.
    """
    weight = fetch(program.module, name)
    known = masks(program)
    if name in known:
        mask = known[name].logical_and_(mask)
    with torch.no_grad():
        weight.mul_(mask)
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
    inherit(masked, next(iter(read.users)))
    read.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


def masks(program: Program) -> dict[str, torch.Tensor]:
    """The masks in force, by parameter name."""
    found = {}
    for node in program.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target.endswith(_SUFFIX) and any(_is_masked(user) for user in node.users):
            found[target.removesuffix(_SUFFIX)] = program.parameter(node)
    return found


def strip_masks(program: Program) -> None:
    """Takes all masks off; the zeros stay in the weights, nothing keeps them there any more."""
    for node in list(program.graph.nodes):
        if _is_masked(node):
            weight, mask = node.args
            with torch.no_grad():
                program.parameter(weight).mul_(program.parameter(mask))
            node.replace_all_uses_with(weight)
            program.graph.erase_node(node)
    for node in program.graph.find_nodes(op="get_attr"):
        if str(node.target).endswith(_SUFFIX) and not node.users:
            program.graph.erase_node(node)
    for name, _ in list(program.module.named_buffers()):
        if name.endswith(_SUFFIX):
            path, _, leaf = name.rpartition(".")
            delattr(program.module.get_submodule(path), leaf)
    program.module.recompile()


def without_masks(program: Program) -> Program:
    """The program without masks, sharing the weights; the program itself keeps them."""
    if not masks(program):
        return program
    with quiet():  # torch warns of its own pytree specifications
        graph = copy.deepcopy(program.graph)
    twin = ProgramModule(program.module, graph)
    twin.meta = program.module.meta
    bare = dataclasses.replace(program, module=twin)
    strip_masks(bare)
    return bare


def weight_node(value: object) -> fx.Node | None:
    """The `get_attr` node of a weight, seen through its mask; None where `value` is computed otherwise."""
    if isinstance(value, fx.Node) and _is_masked(value):
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "get_attr" else None


def _is_masked(node: fx.Node) -> bool:
    if not is_call(node, aten.mul.Tensor) or len(node.args) < 2:
        return False
    weight, mask = node.args[:2]
    both = isinstance(weight, fx.Node) and isinstance(mask, fx.Node) and weight.op == mask.op == "get_attr"
    return both and mask.target == f"{weight.target}{_SUFFIX}"  # type: ignore[union-attr]
