"""Replaces writes in place by new values, so that every node is a pure function of its arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lobo_fx.graph.notes import Note, note_of
from lobo_fx.graph.operators import arguments, aten, is_inplace
from lobo_fx.graph.program import ProgramModule
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.shapes import propagate, storage_of

__all__ = ["Inverse", "remove_inplace"]

Inverse = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]


def _reshape_back(graph: fx.Graph, parent: fx.Node, child: fx.Node, view: fx.Node) -> fx.Node:
    return graph.call_function(aten.reshape_as.default, (child, parent))


def _permute_back(graph: fx.Graph, parent: fx.Node, child: fx.Node, view: fx.Node) -> fx.Node:
    dims = arguments(view)["dims"]
    inverse = sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))
    return graph.call_function(aten.permute.default, (child, inverse))


def _swap_back(graph: fx.Graph, parent: fx.Node, child: fx.Node, view: fx.Node) -> fx.Node:
    return graph.call_function(view.target, (child, *view.args[1:]))  # type: ignore[arg-type]


def _slice_back(graph: fx.Graph, parent: fx.Node, child: fx.Node, view: fx.Node) -> fx.Node:
    at = arguments(view)
    return graph.call_function(
        aten.slice_scatter.default, (parent, child, at["dim"], at["start"], at["end"], at["step"])
    )


def _select_back(graph: fx.Graph, parent: fx.Node, child: fx.Node, view: fx.Node) -> fx.Node:
    at = arguments(view)
    return graph.call_function(aten.select_scatter.default, (parent, child, at["dim"], at["index"]))


# How a changed view is written back into the value it is a view of. Views not listed here can't be undone.
_INVERSES: dict[object, Inverse] = {
    aten.view.default: _reshape_back,
    aten.reshape.default: _reshape_back,
    aten.flatten.using_ints: _reshape_back,
    aten.unflatten.int: _reshape_back,
    aten.squeeze.default: _reshape_back,
    aten.squeeze.dim: _reshape_back,
    aten.squeeze.dims: _reshape_back,
    aten.unsqueeze.default: _reshape_back,
    aten.contiguous.default: _reshape_back,
    aten.alias.default: _reshape_back,
    aten.detach.default: _reshape_back,
    aten.dropout.default: _reshape_back,
    aten.permute.default: _permute_back,
    aten.transpose.int: _swap_back,
    aten.t.default: _swap_back,
    aten.slice.Tensor: _slice_back,
    aten.select.int: _select_back,
}


def remove_inplace(module: ProgramModule) -> list[Note]:
    """Replaces every write in place by a new value; later readers of the target, and of any view of it, are rewired.

    Cases: (1) `y = relu_(x)`: later readers of `x` read `relu(x)`. (2) `x` is a view of `b`: the new
    value is scattered into a new `b`. (3) another view `v` of `b` is read later: it is taken again from
    the new `b`. (4) `b` is a buffer: the new value is copied into it at the end of the graph.

    Returns:
        A note for each write that could not be removed.
    """
    if not any(is_inplace(node) for node in module.graph.nodes):
        return []
    storages: dict[fx.Node, object] = {}
    propagate(module, lambda node, value: storages.__setitem__(node, storage_of(value)))
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    owners: set[fx.Node] = set()
    saved: dict[fx.Node, fx.Node] = {}
    notes = []
    for node in [node for node in module.graph.nodes if is_inplace(node)]:
        if not _Write(module.graph, node, storages, order, owners, saved).replace():
            notes.append(note_of(node, "writes in place in a way that can't be removed; left as it is"))
    return notes


class _Write:
    """One write in place, and the values that share its memory.

    The new value takes over the identity of the memory; `owners` are the new values that are no view.
    """

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        storages: dict[fx.Node, object],
        order: dict[fx.Node, int],
        owners: set[fx.Node],
        saved: dict[fx.Node, fx.Node],
    ) -> None:
        self.saved = saved  # by buffer, the node that stores its last value
        self.graph, self.node, self.storages, self.order, self.owners = graph, node, storages, order, owners
        self.refreshed: dict[fx.Node, fx.Node] = {}

    def replace(self) -> bool:
        node, target = self.node, _functional(self.node)
        written = node.args[0] if node.args else None
        if target is None or not isinstance(written, fx.Node) or self.storages.get(written) is None:
            return False
        self.memory = self.storages[written]
        stale = [n for n in self.order if self._shares(n) and n not in (written, node) and self._readers(n)]
        chain = self._chain(written)
        self.buffer = next((n for n in self.order if n.op == "get_attr" and self.storages.get(n) == self.memory), None)
        if self.buffer is not None and chain[-1] is not self.buffer and chain[-1] not in self.owners:
            return False
        if stale or self.buffer is not None:
            needed = {ancestor for n in stale for ancestor in self._chain(n)[:-1]}
            if any(n.target not in _INVERSES for n in chain[:-1]) or any(self._parent(n) is None for n in needed):
                return False
            if {self._chain(n)[-1] for n in stale} - {chain[-1]}:
                return False
        with self.graph.inserting_after(node):
            value = self._insert(target, node.args, node.kwargs)
        value.meta["val"] = written.meta["val"]
        value = self._keep_dtype(value, written, target)
        if stale or self.buffer is not None:
            value = self._scatter(chain, value, stale)
        else:
            self._own(value)
        self._redirect(written, value)
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)
        self.order.pop(node)
        return True

    def _own(self, value: fx.Node) -> None:
        self.storages[value] = self.memory
        self.owners.add(value)

    def _shares(self, node: fx.Node) -> bool:
        return self.storages.get(node) == self.memory and self.order[node] < self.order[self.node]

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """Users of a node that come after the write."""
        return [user for user in node.users if self.order.get(user, -1) > self.order[self.node]]

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """The value that `node` is a view of: its first argument, if they share memory."""
        first = node.args[0] if node.op == "call_function" and node.args else None
        shares = isinstance(first, fx.Node) and self.storages.get(first) == self.memory
        return first if shares and node not in self.owners and not is_inplace(node) else None  # type: ignore[return-value]

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """`node`, the value that it is a view of, and so on up to the owner of the memory."""
        chain = [node]
        while (parent := self._parent(chain[-1])) is not None:
            chain.append(parent)
        return chain

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs or {})
        inherit(new, self.node)
        self.order[new] = self.order[self.node]
        return new

    def _keep_dtype(self, value: fx.Node, written: fx.Node, target: Any) -> fx.Node:
        """Casts the new value to the dtype of the write's target, if the functional form promotes it."""
        old = written.meta["val"].dtype
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), lambda n: n.meta["val"])
        with written.meta["val"].fake_mode:
            if target(*args, **kwargs).dtype == old:
                return value
        with self.graph.inserting_after(value):
            cast = self._insert(aten.to.dtype, (value, old))
        cast.meta["val"] = written.meta["val"]
        return cast

    def _scatter(self, chain: list[fx.Node], value: fx.Node, stale: list[fx.Node]) -> fx.Node:
        """Writes the new value back through `chain` into its owner, and takes every stale view again."""
        point, owner = value, chain[-1]
        for view, parent in itertools.pairwise(chain):
            with self.graph.inserting_after(point):
                point = _INVERSES[view.target](self.graph, parent, point, view)
                inherit(point, self.node)
                point.meta["val"] = parent.meta["val"]
                self.order[point] = self.order[self.node]
        self.refreshed[owner], self.last = point, point
        self._own(point)
        for node in [*stale, chain[0]]:
            self._refresh(node)
        for node in stale:
            self._redirect(node, self.refreshed[node])
        if self.buffer is not None:
            if (last := self.saved.pop(self.buffer, None)) is not None:
                self.graph.erase_node(last)
                self.order.pop(last)
            with self.graph.inserting_before(self.graph.output_node()):
                self.saved[self.buffer] = self._insert(aten.copy_.default, (self.buffer, point))
        return self.refreshed[chain[0]]

    def _refresh(self, node: fx.Node) -> fx.Node:
        """The same view, taken of the new owner."""
        if node not in self.refreshed:
            parent = self._parent(node)
            assert parent is not None
            source = self._refresh(parent)
            with self.graph.inserting_after(self.last):
                copy = self.graph.node_copy(node, lambda n: source if n is parent else n)
            self.order[copy], self.storages[copy], self.last = self.order[self.node], self.memory, copy
            self.refreshed[node] = copy
        return self.refreshed[node]

    def _redirect(self, old: fx.Node, new: fx.Node) -> None:
        for user in self._readers(old):
            user.replace_input_with(old, new)


def _functional(node: fx.Node) -> Any:
    """The functional overload of an in-place operator: `relu_` → `relu`, `__ior__` → `__or__`."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema
    if torch.Tag.inplace_view in node.target.tags and node.target is not aten.detach_.default:
        return None  # it changes the shape of its target, not its values
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    namespace, _, name = schema.name.partition("::")
    functional = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    if functional == name or written != [schema.arguments[0].name]:
        return None
    packet = getattr(getattr(torch.ops, namespace), functional, None)
    return getattr(packet, schema.overload_name or "default", None)
