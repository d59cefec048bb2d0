"""Operators that draw random numbers: finds them, says what they draw, and makes runs draw the same numbers.

Two runs of a program that draws can only be compared if both draw the same numbers. The compiler must not affect the
user's own random numbers, so its runs never advance the global generators.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.graph.node_facts import facts_of
from lobo_fx.graph.operators import arguments, training_flag
from lobo_fx.graph.shapes import dimension_names, tensor_specs
from lobo_fx.graph.tensors import fetch
from lobo_fx.process import Shared

__all__ = [
    "Draw",
    "calls_that_draw",
    "drawing",
    "drawn",
    "draws",
    "drop_dead",
    "made_of_draws",
    "may_draw",
    "own_generators",
    "own_generators_kept",
    "random_state_kept",
    "seeded",
    "seeded_by",
]

Draw = tuple[str, ...]
"""What determines how many numbers a call draws, and in which order: its operator, and the shapes around it."""

_SHARES = ("dropout", "dropout_p")
"""Arguments that hold the share of values that an operator drops."""
_LOCK = threading.RLock()


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


random_state_kept = Shared(_global_generators_kept)
"""A context that restores the global generators of torch, numpy and Python when it is left."""


def own_generators(data: object) -> list[torch.Generator]:
    """The generators from which a DataLoader draws the order of its rows, where it has its own."""
    holders = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextlib.contextmanager
def own_generators_kept(data: object) -> Iterator[None]:
    """Restores these generators when the context is left."""
    generators = own_generators(data)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def may_draw(node: fx.Node) -> bool:
    """Whether an operator's result is random in any mode."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def draws(node: fx.Node) -> bool:
    """Whether an operator draws in inference; dropout does so only if it is always in training mode."""
    if not may_draw(node) or (training_flag(node) is not None and not facts_of(node).always_training):
        return False
    return all(arguments(node).get(share) != 0 for share in _SHARES)


def drop_dead(graph: fx.Graph) -> None:
    """Deletes operators whose results nobody reads, and that draw no random numbers.

    By their tags alone, PyTorch keeps all that could draw: attention, recurrent layers, and dropout in inference.
    """
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=draws(node)))


def drawing(module: fx.GraphModule) -> list[fx.Node]:
    """The operators that draw in inference, in a graph and its branches."""
    return [node for inside in _calls(module).values() for node in inside]


def made_of_draws(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes of a graph whose values depend on random numbers."""
    found = set(_calls(module))
    for node in module.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _calls(module: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """By call that draws, the operators that draw: the call itself, or operators of its branch."""
    found = {}
    for node in module.graph.nodes:
        stored = [fetch(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"]
        inside = [n for branch in stored if isinstance(branch, fx.GraphModule) for n in drawing(branch)]
        if operators := [node] * draws(node) + inside:
            found[node] = operators
    return found


def drawn(module: fx.GraphModule) -> tuple[Draw, ...]:
    """What a run in inference draws, by the shapes last propagated; equal for graphs that draw the same numbers."""
    names = dimension_names(module.graph)

    def draw(call: fx.Node) -> Draw:
        values = pytree.tree_leaves([n.meta.get("val") for n in (*call.all_input_nodes, call)])
        return (str(call.target), *map(str, tensor_specs([""] * len(values), values, names)))

    return tuple(map(draw, _calls(module)))


@contextlib.contextmanager
def seeded(module: fx.GraphModule) -> Iterator[None]:
    """Within this context, runs of a module in inference draw the same numbers and leave the global generator alone."""
    with seeded_by(0) if _calls(module) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def seeded_by(seed: int) -> Iterator[None]:
    """Within this context, random numbers follow from the seed, and the global generator is restored."""
    with _LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def calls_that_draw(module: fx.GraphModule) -> set[fx.Node]:
    """The calls of a graph that draw in inference, directly or in a branch."""
    return set(_calls(module))
