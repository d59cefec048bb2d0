"""Normalises a graph once, right after tracing: no autograd wrappers, no writes in place, no asserts, no aliases.

After that, every node is a pure function of its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lobo_fx.capture.writes_in_place import remove_inplace
from lobo_fx.graph.notes import Note, note_of
from lobo_fx.graph.operators import arguments, aten, is_call, is_inplace
from lobo_fx.graph.program import ProgramModule
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.rewriting import replace_results
from lobo_fx.graph.tensors import fetch

__all__ = ["choose_by_mask", "drop_aliases", "inline_modes", "name_squeezed", "normalize", "take_what_is_copied"]

_ASSERTS = frozenset(
    {
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
        torch._check,
    }
)

_ALIASES = frozenset({aten.alias.default, aten.lift_fresh_copy.default, aten.detach_.default})
_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def normalize(module: ProgramModule) -> list[Note]:
    """Normalises a freshly traced graph in place.

    Returns:
        Notes about what had to be left as it was.
    """
    notes = inline_modes(module)
    _drop_asserts(module.graph)
    notes += remove_inplace(module)
    take_what_is_copied(module.graph)
    drop_aliases(module.graph)
    name_squeezed(module.graph)
    choose_by_mask(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return notes


def name_squeezed(graph: fx.Graph) -> None:
    """Makes `squeeze()` name its dimensions, so that it does not drop others that a pass makes 1 long."""
    for node in graph.find_nodes(op="call_function", target=aten.squeeze.default):
        source = node.args[0].meta.get("val")
        if isinstance(source, torch.Tensor):
            node.target = aten.squeeze.dims
            node.args = (
                node.args[0],
                [d for d, size in enumerate(source.shape) if isinstance(size, int) and size == 1],
            )


def take_what_is_copied(graph: fx.Graph) -> None:
    """Replaces `copy(x, y)`, which is y in the shape and dtype of x, by y itself: the operator has no derivative."""
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        whole, copied = node.args[:2]
        into, source = (part.meta.get("val") for part in (whole, copied))
        if into is None or source is None:
            continue
        with graph.inserting_before(node):
            if source.dtype != into.dtype:
                copied = graph.call_function(aten.to.dtype, (copied, into.dtype))
                inherit(copied, node)
            if source.shape != into.shape:
                copied = graph.call_function(aten.expand_as.default, (copied, whole))
                inherit(copied, node)
        copied.meta.setdefault("val", into)
        node.replace_all_uses_with(copied)
        graph.erase_node(node)


def choose_by_mask(graph: fx.Graph) -> None:
    """Rewrites `x[mask] = number` to the pointwise `where(mask, number, x)`, which needs no index of unknown size."""
    for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
        given = arguments(node)
        x, value = given["self"], given["values"]
        masks = [index for index in given["indices"] if index is not None]
        if len(masks) != 1 or given["accumulate"] or given["indices"][0] is None:
            continue
        kept, number, mask = (operand.meta.get("val") for operand in (x, value, masks[0]))
        if kept is None or number is None or mask is None:
            continue
        if mask.dtype == torch.bool and number.dim() == 0 and number.dtype == kept.dtype:
            with graph.inserting_before(node):
                aligned = masks[0]
                for _ in range(kept.dim() - mask.dim()):
                    aligned = graph.call_function(aten.unsqueeze.default, (aligned, -1))
                    inherit(aligned, node)
                chosen = graph.call_function(aten.where.self, (aligned, value, x))
            inherit(chosen, node)
            chosen.meta["val"] = kept  # read where another mask is assigned to after this one
            node.replace_all_uses_with(chosen)


def inline_modes(module: ProgramModule) -> list[Note]:
    """Inlines regions under a mode as plain nodes.

    Cases: (1) `with torch.no_grad():`; its results stay detached. (2) `with torch.autocast(...)` that is disabled, or
    for another device than the CPU. An active one stays, as it decides the dtypes inside.

    Returns:
        A note for each write under `no_grad` to a value that trains: its gradient differs from eager mode's.
    """
    notes: list[Note] = []
    inlined: set[str] = set()
    while wrappers := [node for node in module.graph.nodes if is_call(node, _SET_GRAD) or _idle_autocast(node)]:
        for node in wrappers:
            if node.target is _SET_GRAD:
                enabled, body_node, *operands = node.args
            else:
                _, _, _, _, body_node, *operands = node.args
                enabled = True
            detach = not enabled and any(_trains(n) for n in node.all_input_nodes)
            if detach:
                notes += _writes_without_gradient(module, body_node, operands)
            inlined.add(str(body_node.target))
            _inline(module, node, body_node, operands, detach=detach)
    for name in inlined - {str(node.target) for node in module.graph.find_nodes(op="get_attr")}:
        module.delete_submodule(name)
    return notes


def _trains(node: fx.Node) -> bool:
    """Whether `node` depends on something that requires a gradient."""
    seen: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        source = ahead.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.op in ("get_attr", "placeholder") and getattr(source.meta.get("val"), "requires_grad", False):
            return True
        ahead += source.all_input_nodes
    return False


def _writes_without_gradient(module: ProgramModule, body_node: fx.Node, operands: list[Any]) -> list[Note]:
    body = fetch(module, str(body_node.target))
    inside = [n for n in body.graph.nodes if n.op == "placeholder"]
    outer = dict(zip(inside, operands, strict=True))
    notes = []
    for inner in body.graph.nodes:
        base = inner.args[0] if is_inplace(inner) and inner.args else None
        while isinstance(base, fx.Node) and base.op == "call_function" and base.args:
            base = base.args[0]
        if isinstance(base, fx.Node) and base in outer and _trains(outer[base]):
            notes.append(note_of(inner, "writes where gradients are off: in training its gradient is lost"))
    return notes


def _idle_autocast(node: fx.Node) -> bool:
    """Whether `node` is an autocast region that has no effect on CPU."""
    if not is_call(node, _AUTOCAST):
        return False
    device, _, enabled, *_ = node.args
    return device != "cpu" or not enabled


def _inline(module: ProgramModule, node: fx.Node, body_node: fx.Node, operands: list[Any], detach: bool) -> None:
    graph, body = module.graph, fetch(module, str(body_node.target))
    inside = [n for n in body.graph.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(inside, operands, strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copies[inner] = graph.node_copy(inner, lambda n: copies[n])
        outputs = [copies[n] for n in body.graph.output_node().args[0]]
        if detach:
            outputs = [graph.call_function(aten.detach.default, (value,)) for value in outputs]
    replace_results(node, outputs)
    if not body_node.users:
        graph.erase_node(body_node)


def _drop_asserts(graph: fx.Graph) -> None:
    """Removes run-time assertions; the program checks its inputs itself."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in _ASSERTS and not node.users:
            graph.erase_node(node)


def drop_aliases(graph: fx.Graph) -> None:
    """Removes nodes that only alias a value."""
    writes = any(is_inplace(node) and not _saves_buffer(node) for node in graph.nodes)
    for node in list(graph.nodes):
        if writes and is_call(node, aten.lift_fresh_copy.default):
            node.target = aten.clone.default  # writes must not change the constant itself
        elif is_call(node, *_ALIASES):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _saves_buffer(node: fx.Node) -> bool:
    return is_call(node, aten.copy_.default) and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
