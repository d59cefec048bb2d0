"""Two programs run in step on several batches, so that a layer can be refitted to what the first one gave."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from lobo_fx.graph.randomness import calls_that_draw, seeded_by
from lobo_fx.graph.running import Runner
from lobo_fx.terminal.progress import track

__all__ = ["Pair", "side_by_side"]


@dataclasses.dataclass
class Pair:
    """A batch on its way through both programs: the values that are still to be read.

    Attributes:
        leaves: of the batch.
        held_out: whether no fit may see it.
        before: by node of the first program.
        after: by node of the second.
    """

    leaves: Sequence[Any]
    held_out: bool = False
    before: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    after: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)


def side_by_side(
    first: Runner, second: Runner, pairs: Sequence[Pair], description: str, show_progress: bool
) -> Iterator[fx.Node]:
    """Every node of the second program, once its inputs are known and before it is run itself.

    What is done to a node's parameters then is what the nodes after it see. Activations of all batches are in memory
    at once, as in a forward pass on all of them. What a call draws at random for a batch, its twin draws too.

    Args:
        first: runs the program to follow; its nodes have the names of the second's, which may have more.
        second: runs the program that is refitted.
        pairs: filled in and emptied on the way.
        description: of the progress bar.
        show_progress: whether to draw a progress bar.
    """
    twins = {node.name: node for node in first.graph.nodes}
    nodes, constants = _constants_late(second.graph)
    order = [(node, twins.get(node.name)) for node in nodes]  # a size computed anew has no twin
    last_use = {source: node for both in order for node in both if node for source in node.all_input_nodes}
    feeds = {node: index for index, node in enumerate(second.graph.find_nodes(op="placeholder"))}
    assert isinstance(second.module, fx.GraphModule)
    draws = calls_that_draw(second.module)
    random = {node: place for place, node in enumerate(nodes) if node in draws}

    def draws_of(at: fx.Node, batch: int) -> contextlib.AbstractContextManager[None]:
        return seeded_by(random[at] * len(pairs) + batch) if at in random else contextlib.nullcontext()

    def evaluate(runner: Runner, node: fx.Node, at: fx.Node, values: list[dict[fx.Node, Any]]) -> None:
        if at in feeds:
            found = [pair.leaves[feeds[at]] for pair in pairs]
        elif at in constants:
            found = [runner.evaluate(node, values[0])] * len(values)
        else:
            found = []
            for batch, own in enumerate(values):
                with draws_of(at, batch):
                    found.append(runner.evaluate(node, own))
        for own, value in zip(values, found, strict=True):
            own[node] = value

    for node, twin in track(order, description, show_progress):
        if node.op == "output":
            return
        if twin is not None:
            evaluate(first, twin, node, [pair.before for pair in pairs])
        yield node
        evaluate(second, node, node, [pair.after for pair in pairs])
        for pair in pairs:
            for source in node.all_input_nodes:
                if last_use.get(source, node) is node:  # a parameter that fitting made has no entry
                    pair.after.pop(source, None)
            for source in twin.all_input_nodes if twin is not None else ():
                if last_use[source] is twin:
                    del pair.before[source]


def _constants_late(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes, those that no input reaches only where they are read first; and which these are."""
    constants: set[fx.Node] = set()
    order: dict[fx.Node, None] = {}

    def emit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in constants and source not in order:
                emit(source)
        order[node] = None

    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and constants.issuperset(node.all_input_nodes):
            constants.add(node)
        else:
            emit(node)
    return list(order), constants
