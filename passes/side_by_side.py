"""Two programs run in step on several batches, so that a layer can be refitted to what the first one gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from lobo_fx.progress import track


@dataclasses.dataclass
class Pair:
    """A batch on its way through both programs: the values that are still to be read.

    Attributes:
        leaves: of the batch.
        before: by node of the first program.
        after: by node of the second.
    """

    leaves: Sequence[Any]
    before: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    after: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)


def side_by_side(
    first: fx.Interpreter, second: fx.Interpreter, pairs: Sequence[Pair], show_progress: bool
) -> Iterator[fx.Node]:
    """Every node of the second program, once its inputs are known and before it is run itself.

    What is done to a node's parameters then is what the nodes after it see. Activations of all batches are in memory
    at once, as in a forward pass on all of them.

    Args:
        first: runs the program to follow; its nodes have the names of the second's, which may have more.
        second: runs the program that is refitted.
        pairs: filled in and emptied on the way.
        show_progress: whether to draw a progress bar.
    """
    twins = {node.name: node for node in first.graph.nodes}
    nodes = list(second.graph.nodes)
    last_use = {source: node for graph in (first.graph, second.graph) for source, node in _ends(graph)}
    feeds = {node: index for index, node in enumerate(second.graph.find_nodes(op="placeholder"))}
    for node in track(nodes, "fit", show_progress):
        if node.op == "output":
            return
        twin = twins.get(node.name)  # a size computed anew has none
        for pair in pairs:
            if twin is not None:
                pair.before[twin] = pair.leaves[feeds[node]] if node in feeds else run(first, twin, pair.before)
        yield node
        for pair in pairs:
            pair.after[node] = pair.leaves[feeds[node]] if node in feeds else run(second, node, pair.after)
            for source in node.all_input_nodes:
                if last_use.get(source, node) is node:  # a parameter that fitting made has no entry
                    del pair.after[source]
            for source in twin.all_input_nodes if twin is not None else ():
                if last_use[source] is twin:
                    del pair.before[source]


def run(interpreter: fx.Interpreter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node, from those of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _ends(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each value with its readers, the last one last."""
    return ((source, node) for node in graph.nodes for source in node.all_input_nodes)
