"""Runs two programs in step on several batches, so that layers of the second can be refitted to the first's outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.graph.randomness import calls_that_draw, seeded_by
from lobo_fx.graph.running import Runner, kept_buffers
from lobo_fx.terminal.progress import track

__all__ = ["Pair", "Pairs", "side_by_side"]

_BYTES = 1 << 30
"""Most bytes of all batches' activations in memory; activations of further batches wait on disk."""


@dataclasses.dataclass
class Pair:
    """A batch on its way through both programs: the values that are still to be read, and constants.

    Attributes:
        index: the batch's number.
        held_out: whether no fit may see it.
        before: values by node of the first program.
        after: values by node of the second program.
    """

    index: int
    held_out: bool
    before: MutableMapping[fx.Node, Any]
    after: MutableMapping[fx.Node, Any]


class Pairs:
    """Batches on their way through both programs; iterating gives one at a time and keeps what is changed in it.

    If all batches together take too much memory, some of them wait on disk.

    Args:
        first: the program to follow.
        second: the program that is refitted.
        batches: the leaves of each, and whether no fit may see it; read once.
    """

    def __init__(self, first: fx.Graph, second: fx.Graph, batches: Iterable[tuple[Sequence[Any], bool]]) -> None:
        self.constants: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})
        self.nodes = tuple({node.name: node for node in graph.nodes} for graph in (first, second))
        self._shelf = _Shelf()
        self._held_out: list[bool] = []
        places = [
            (side, node.name, index)
            for side, graph in enumerate((first, second))
            for index, node in enumerate(graph.find_nodes(op="placeholder"))
            if node.users
        ]
        for leaves, held_out in batches:
            values: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
            for side, name, index in places:
                values[side][name] = leaves[index]
            self._shelf.put(len(self._held_out), values)
            self._held_out.append(held_out)

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shelf.clear()

    def __iter__(self) -> Iterator[Pair]:
        for index, held_out in enumerate(self._held_out):
            own = [
                {nodes[name]: value for name, value in values.items()}
                for nodes, values in zip(self.nodes, self._shelf.take(index), strict=True)
            ]
            try:
                yield Pair(index, held_out, ChainMap(own[0], self.constants[0]), ChainMap(own[1], self.constants[1]))
            finally:
                self._shelf.put(index, tuple({node.name: value for node, value in values.items()} for values in own))
                del own

    def __len__(self) -> int:
        return len(self._held_out)

    def count(self, held_out: bool) -> int:
        """How many batches no fit may see, or how many it may."""
        return self._held_out.count(held_out)

    def fix(self, node: fx.Node, value: Any) -> None:
        """Sets the value of a node of the second program that is the same for all batches."""
        self.constants[1][node] = value


class _Shelf:
    """Values by number: in memory while there is room, else on disk."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Any, int]] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def put(self, index: int, values: Any) -> None:
        size = sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor))
        if sum(other for _, other in self.kept.values()) + size <= _BYTES:
            self.kept[index] = values, size
            return
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="lobo_fx_")
        # cloned, since torch.save writes the whole storage of a view
        torch.save(pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.clone(), values), self._file(index))

    def take(self, index: int) -> Any:
        if index in self.kept:
            return self.kept.pop(index)[0]
        return torch.load(self._file(index), weights_only=True)

    def clear(self) -> None:
        self.kept.clear()
        if self.folder is not None:
            self.folder.cleanup()

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return Path(self.folder.name, str(index))


def side_by_side(
    first: Runner,
    second: Runner,
    pairs: Pairs,
    stops: Callable[[fx.Node], bool],
    description: str,
    show_progress: bool,
) -> Iterator[fx.Node]:
    """Yields the nodes of the second program to stop at, each when its inputs are known and before it is run.

    Parameters that are changed at a stop hold for that node and the nodes after it. Between two stops, all nodes are
    run for one batch after the other. Random calls of both programs draw the same numbers for the same batch.

    Args:
        first: runs the program to follow; its nodes have the names of the second's, which may have more.
        second: runs the program that is refitted.
        pairs: the batches; values are added to them, and dropped after their last use.
        stops: tells which nodes to stop at.
        description: text of the progress bar.
        show_progress: whether to draw a progress bar.
    """
    twins = pairs.nodes[0]
    nodes, constants = _constants_late(second.graph)
    order = [(node, twins.get(node.name)) for node in nodes]  # a size computed anew has no twin
    last_use = {source: node for both in order for node in both if node for source in node.all_input_nodes}
    assert isinstance(second.module, fx.GraphModule)
    draws = calls_that_draw(second.module)
    random = {node: place for place, node in enumerate(nodes) if node in draws}
    ahead: list[Callable[[Pair], None]] = []

    def run(runner: Runner, node: fx.Node, side: int) -> None:
        if node in constants or (side == 0 and pairs.nodes[1].get(node.name) in constants):
            pairs.constants[side][node] = runner.evaluate(node, pairs.constants[side])
        elif node.op != "placeholder":
            place = random.get(pairs.nodes[1].get(node.name, node))

            def evaluate(pair: Pair) -> None:
                drawn = contextlib.nullcontext() if place is None else seeded_by(place * len(pairs) + pair.index)
                values = (pair.before, pair.after)[side]
                with drawn:
                    values[node] = runner.evaluate(node, values)

            ahead.append(evaluate)

    def drop(node: fx.Node, twin: fx.Node | None) -> None:
        def let_go(pair: Pair) -> None:
            for reader, values in ((node, pair.after), (twin, pair.before)):
                for source in reader.all_input_nodes if reader is not None else ():
                    if last_use.get(source) is reader and source in values.maps[0]:  # type: ignore[attr-defined]
                        del values[source]

        ahead.append(let_go)

    with contextlib.ExitStack() as stack:
        for runner in (first, second):
            stack.enter_context(kept_buffers(cast("fx.GraphModule", runner.module)))
        for node, twin in track(order, description, show_progress):
            if node.op == "output":
                return
            if twin is not None:
                run(first, twin, 0)
            if stops(node):
                for pair in pairs:
                    for step in ahead:
                        step(pair)
                ahead.clear()
                yield node
            run(second, node, 1)
            drop(node, twin)


def _constants_late(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes in order, with constants (no input reaches them) moved to their first reader; and the constants."""
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
