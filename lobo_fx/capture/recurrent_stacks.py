"""Splits recurrent calls of several layers into one call per layer, so that each layer has its own hidden width."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from lobo_fx.graph.operators import RECURRENT, arguments, aten, is_call
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.recurrent import Recurrent

__all__ = ["separate_layers"]


def separate_layers(graph: fx.Graph) -> bool:
    """Splits every recurrent call of several layers; returns whether there was one.

    `lstm(x, [h, c], params of n layers)` becomes n calls: each runs on the outputs of the one before, with its slice of
    `h` and `c`, and with dropout between layers as a node. Initial states of zeros are created for each layer, as
    slices of one tensor would all have the same width. Projected layers stay as they are.
    """
    stacks = [node for node in graph.nodes if is_call(node, *RECURRENT) and _is_plain_stack(node)]
    for node in stacks:
        _Stack(graph, node).take_apart()
    return bool(stacks)


def _is_plain_stack(node: fx.Node) -> bool:
    """Whether a call has several layers without projection, and its results are read one by one."""
    given = Recurrent.of(node)
    return (
        not given.is_projected and not given.is_single and all(is_call(user, operator.getitem) for user in node.users)
    )


class _Stack:
    """One recurrent call of several layers."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph, self.node, self.given = graph, node, Recurrent.of(node)

    def take_apart(self) -> None:
        with self.graph.inserting_before(self.node):
            every, finals = self._calls()
            for user in list(self.node.users):
                index = user.args[1]
                assert isinstance(index, int)
                result = every if index == 0 else self._new(aten.cat.default, finals[index - 1])
                user.replace_all_uses_with(result)
                self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _calls(self) -> tuple[fx.Node, list[list[fx.Node]]]:
        """The last layer's outputs, and for each state the final states of all layers."""
        given, directions = self.given, self.given.directions
        x, finals = given.input, [[] for _ in given.states]  # type: ignore[var-annotated]
        for layer in range(given.num_layers):
            if layer and given.dropout:
                x = self._new(aten.dropout.default, x, given.dropout, given.train)
            start = [self._state(state, layer) for state in given.states]
            cells = given.cells[layer * directions : (layer + 1) * directions]
            one = dataclasses.replace(
                given,
                input=x,
                hx=start if isinstance(given.hx, Sequence) else start[0],
                params=[parameter for cell in cells for parameter in cell],
                num_layers=1,
                dropout=0.0,
            )
            call = self._new(self.node.target, *(getattr(one, field.name) for field in dataclasses.fields(one)))
            x = self._new(operator.getitem, call, 0)
            for index, of_layers in enumerate(finals):
                of_layers.append(self._new(operator.getitem, call, index + 1))
        return x, finals

    def _state(self, state: fx.Node, layer: int) -> fx.Node:
        """The initial state of one layer: `[directions, rows, hidden]`."""
        if is_call(state, aten.zeros.default):
            sizes = list(arguments(state)["size"])[1:]
            return self.graph.call_function(aten.zeros.default, ([self.given.directions, *sizes],), dict(state.kwargs))
        first = layer * self.given.directions
        return self._new(aten.slice.Tensor, state, 0, first, first + self.given.directions)

    def _new(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        inherit(node, self.node)
        return node
