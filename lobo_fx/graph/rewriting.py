"""Rewriting for pass authors: find a pattern of ATen nodes, replace it, keep its provenance.

Example:
    ```python
    pattern = Op(aten.relu.default, Op(aten.relu.default, name="inner"))
    rewrite(program, pattern, lambda match: match["inner"])   # relu(relu(x)) → relu(x)
    ```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, cast

import torch
from torch import fx, nn

from lobo_fx.graph.operators import arguments, is_call
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe, inherit
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.tensors import register

__all__ = [
    "Match",
    "Op",
    "Rejected",
    "Rule",
    "add_parameter",
    "call",
    "drop_unused",
    "erase_dead",
    "free_name",
    "rename",
    "replace_parameter",
    "replace_results",
    "rewrite",
]


class Op:
    """A pattern: a call of one of `targets` whose leading tensor arguments match `inputs`.

    Args:
        targets: an operator overload, or several.
        *inputs: patterns for the leading arguments; None matches anything.
        name: the key of the node in the match.
        shared: whether the node may have users outside the pattern (its result is then still needed).
    """

    def __init__(self, targets: object, *inputs: Op | None, name: str | None = None, shared: bool = False) -> None:
        self.targets = frozenset(targets) if isinstance(targets, (Set, tuple, list, Mapping)) else {targets}
        self.inputs, self.name, self.shared = inputs, name, shared


@dataclasses.dataclass
class Match:
    """A place where a pattern was found.

    Attributes:
        root: the node whose value the replacement gives.
        nodes: the named nodes.
    """

    root: fx.Node
    nodes: dict[str, fx.Node] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Node:
        return self.nodes[name]

    def arguments(self, name: str) -> dict[str, Any]:
        """Arguments of a named node by schema name, defaults filled in."""
        return arguments(self.nodes[name])


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A match that a rule left alone, and why."""

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        return f"{describe(self.node)} left alone: {self.reason}"


Rule = Callable[[Match], "fx.Node | Rejected"]
"""From a match to the node that replaces its root, or the reason for leaving it alone."""


def rewrite(program: Program, pattern: Op, rule: Rule) -> list[Rejected]:
    """Applies `rule` wherever `pattern` is found, in graph order.

    The rule runs with the graph's insertion point before the match's root, and returns the node to use in
    place of the root, or `Rejected`. New nodes inherit module and source line; dead nodes are removed.

    Returns:
        The matches that the rule rejected.
    """
    graph, rejected = program.graph, []
    live = set(graph.nodes)
    for root in list(graph.nodes):
        match = Match(root)
        if root not in live:
            continue
        if root.op != "call_function" or not _matches(pattern, root, match, is_root=True):
            continue
        known = set(graph.nodes)
        with graph.inserting_before(root):
            outcome = rule(match)
        if isinstance(outcome, Rejected):
            rejected.append(outcome)
            continue
        for node in graph.nodes:
            if node not in known:
                inherit(node, root)
        if outcome is not root:
            root.replace_all_uses_with(outcome, delete_user_cb=lambda user, kept=outcome: user is not kept)
            erase_dead(graph, root)
            live = set(graph.nodes)
    drop_dead(graph)
    program.module.recompile()
    return rejected


def erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Removes a node without users, and inputs that only it read, as dead users would prevent later matches."""
    if node.users or node.op == "placeholder" or node._erased:
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        erase_dead(graph, source)


def _matches(pattern: Op, node: object, match: Match, is_root: bool = False) -> bool:
    if not is_call(node, *pattern.targets):
        return False
    assert isinstance(node, fx.Node)
    if not is_root and not pattern.shared and len(node.users) > 1:
        return False
    values = list(arguments(node).values())
    if len(values) < len(pattern.inputs):
        return False
    for wanted, value in zip(pattern.inputs, values, strict=False):
        if wanted is not None and not _matches(wanted, value, match):
            return False
    if pattern.name:
        match.nodes[pattern.name] = node
    return True


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Inserts a call at the graph's insertion point, with its shape set at once, so that later rules can use it."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda source: source.meta["val"]))
    return node


def add_parameter(program: Program, name: str, value: Any) -> fx.Node:
    """Registers a parameter or buffer under a dotted name and returns the node that reads it.

    Call it inside a rule: the node goes to the graph's insertion point.
    """
    register(program.module, name, value)
    return program.graph.get_attr(name)


def replace_parameter(program: Program, read: fx.Node, value: torch.Tensor) -> None:
    """Stores a tensor in the place of one that a `get_attr` node reads; the old one, which others may hold, stays."""
    path, _, leaf = str(read.target).rpartition(".")
    old = program.parameter(read)
    made = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    setattr(program.module.get_submodule(path), leaf, made)


def free_name(program: Program, name: str) -> str:
    """`name`, or `name` with a number appended where the module already has something of that name."""
    module = program.module
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    taken = {known for known, _ in [*named, *module.named_modules()]}
    candidates = (name, *(f"{name}_{number}" for number in range(1, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def rename(program: Program, read: fx.Node, name: str) -> str:
    """Renames the tensor that a `get_attr` node reads; the new dotted name must be free. Returns that name."""
    old = str(read.target)
    tensor = program.parameter(read)
    path, _, leaf = old.rpartition(".")
    delattr(program.module.get_submodule(path), leaf)
    register(program.module, name, tensor)
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target == old:
            node.target = name
    return name


def drop_unused(program: Program, names: Iterable[str]) -> None:
    """Deletes parameters and buffers that no node reads any more, under all their names."""
    module = program.module
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensors = dict(named)
    read = {id(program.parameter(node)) for node in program.graph.find_nodes(op="get_attr")}
    dead = {id(tensors[name]) for name in names if name in tensors} - read
    for name, tensor in named:
        if id(tensor) in dead:
            path, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(path), leaf)


def replace_results(node: fx.Node, results: Sequence[fx.Node]) -> None:
    """Replaces a call of several results, each of which its readers take by position, and removes it."""
    for reader in list(node.users):
        reader.replace_all_uses_with(results[cast("int", reader.args[1])])
        node.graph.erase_node(reader)
    node.graph.erase_node(node)
