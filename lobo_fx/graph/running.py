"""Runs graphs node by node, to observe values as data runs through a program, or to replace some of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.operators import arguments, is_inplace, is_view
from lobo_fx.graph.randomness import seeded
from lobo_fx.graph.tensors import fetch

__all__ = ["AS_IT_IS", "Runner", "kept_buffers", "watch", "written_buffers"]

See = Callable[[fx.Node, Any], None]
Instead = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

AS_IT_IS = object()
"""Returned by a replacement where the node is to be computed as the graph says."""


class Runner(fx.Interpreter):
    """Runs a graph without gradients; values are freed after their last use.

    Args:
        module: holds the graph and its tensors.
        see: called with every node and its value, in order.
        instead: called with every node and its arguments before it is computed; returns its value, or `AS_IT_IS`.
    """

    def __init__(self, module: fx.GraphModule, see: See | None = None, instead: Instead | None = None) -> None:
        super().__init__(module)
        self.see, self.instead = see, instead

    def __call__(self, inputs: Inputs) -> Any:
        """The outputs for one batch, flat.

        Random numbers are the same in every run, and buffers that the graph writes to are restored.
        """
        assert isinstance(self.module, fx.GraphModule)
        with torch.no_grad(), kept_buffers(self.module), seeded(self.module):
            return self.run(*inputs.leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node, from those before it."""
        value = self.evaluate(n, self.env)
        if self.see is not None:
            self.see(n, value)
        return value

    def evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Computes one node from given values of its inputs; a placeholder takes the next input of the call."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
        found = AS_IT_IS if self.instead is None else self.instead(node, args, kwargs)
        return getattr(self, node.op)(node.target, args, kwargs) if found is AS_IT_IS else found


@contextlib.contextmanager
def differentiated(module: nn.Module) -> Iterator[None]:
    """Lets gradients pass through everything, frozen parameters too."""
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def kept_buffers(module: fx.GraphModule) -> Iterator[None]:
    """Restores buffers that the graph writes to when the context is left; those of modules that it calls stay."""
    buffers = [fetch(module, name) for name in written_buffers(module.graph)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.detach_().copy_(value)  # without the history of a backward pass


def written_buffers(graph: fx.Graph) -> list[str]:
    """Names of the buffers that a graph writes to, also through views: its state from one call to the next."""
    written = [value for node in filter(is_inplace, graph.nodes) for value in _written(node)]
    return list(dict.fromkeys(str(node.target) for node in written if node.op == "get_attr"))


def _written(node: fx.Node) -> list[fx.Node]:
    """What the values are views of, if anything, that a call writes into."""
    given, schema = arguments(node), cast("torch._ops.OpOverload", node.target)._schema
    into = [given[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [_viewed(value) for value in pytree.tree_leaves(into) if isinstance(value, fx.Node)]


def _viewed(node: fx.Node) -> fx.Node:
    """What a value is a view of; itself if it is none."""
    while is_view(node):
        node = cast("fx.Node", node.args[0])
    return node


def watch(
    module: fx.GraphModule, batches: Iterable[Inputs], watchers: Mapping[fx.Node, Callable[[torch.Tensor], None]]
) -> None:
    """Runs batches through a graph and shows the values of some nodes, one batch in memory at a time.

    Args:
        module: holds the graph and its tensors.
        batches: inputs of the program.
        watchers: by node, a function that is called with its value.
    """

    def see(node: fx.Node, value: Any) -> None:
        if node in watchers:
            watchers[node](value)

    runner = Runner(module, see)
    for inputs in batches:
        runner(inputs)
