"""Finds where zeroed channels stay zero, to tell removals that equal zeroing from those that do not.

Zeroing a channel zeroes every weight that produces or reads it. Where its values are summed with weights, that equals
removing it. Where values are summed without weights (attention, a plain sum), it does so only if they are still zero
there: `relu(0)` is zero, but `sigmoid(0)` is not, nor is the sum with a value that the channel does not run through.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.axis import Axis
from lobo_fx.graph.operators import arguments, aten, is_call

__all__ = [
    "MOVED",
    "NOWHERE",
    "Leaves",
    "Operands",
    "Sum",
    "Zeros",
    "all_of",
    "any_of",
    "elementwise",
    "mark_inexact_zeros",
    "through",
]

Sum = tuple[fx.Node, Axis, tuple[fx.Node, ...]]
"""A node that sums over an axis, and the operands whose product is summed."""
Leaves = frozenset[Axis]
_NO_LEAVES: Leaves = frozenset()


@dataclasses.dataclass(frozen=True)
class Operands:
    """An operator call, as passed to a statement about zeros.

    Attributes:
        node: the call.
        given: its arguments by schema name.
        zeros: by node, the leaves at whose zeroed positions its values are zero.
        carried: by node, including the call, the leaves that its axes are made of.
    """

    node: fx.Node
    given: Mapping[str, Any]
    zeros: Mapping[fx.Node, Leaves]
    carried: Mapping[fx.Node, Leaves]

    def zero_in(self, name: str) -> Leaves:
        """The leaves at which an argument is zero; for a number, all leaves of the call if it is 0, else none."""
        value = self.given.get(name)
        if isinstance(value, fx.Node):
            return self.zeros[value]
        return self.carried[self.node] if value == 0 else _NO_LEAVES


Zeros = Callable[[Operands], Leaves]
"""An operator's statement about zeros: the leaves at whose zeroed positions its output is zero."""


def any_of(*parts: str | Zeros) -> Zeros:
    """Zero wherever any of these arguments (or statements) is, as in a product; without arguments, nowhere."""
    return lambda call: _NO_LEAVES.union(*(_zero_in(call, part) for part in parts))


def all_of(*parts: str | Zeros) -> Zeros:
    """Zero wherever all of these arguments (or statements) are, as in a sum; arguments left out don't count."""

    def zeros(call: Operands) -> Leaves:
        given = [part for part in parts if not isinstance(part, str) or call.given.get(part) is not None]
        return call.carried[call.node].intersection(*(_zero_in(call, part) for part in given))

    return zeros


def through(*names: str) -> Zeros:
    """Zero wherever all of these operands that carry the leaf are zero; without names, all operands count."""

    def zeros(call: Operands) -> Leaves:
        given = [call.given[name] for name in names] if names else call.node.all_input_nodes
        operands = [operand for operand in given if isinstance(operand, fx.Node)]
        somewhere = _NO_LEAVES.union(*(call.zeros[operand] for operand in operands))
        return somewhere.difference(*(call.carried[operand] - call.zeros[operand] for operand in operands))

    return zeros


MOVED = through()
"""For operators that only move values: zero wherever all operands that carry the leaf are."""
NOWHERE = any_of()
"""The output is finite for zeroed channels, but not known to be zero."""


def elementwise(call: Operands) -> Leaves:
    """For pointwise operators: runs the operator itself on zeros to find whether its output is zero.

    It is run on a few numbers, with zeros for the operands that are zero at a leaf. If the result is not finite
    (`log(0)`, `1 / 0`) or the operator can't be run, the leaf is marked inexact.
    """
    operands = [node for node in call.node.all_input_nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    leaves_of: dict[frozenset[fx.Node], set[Axis]] = defaultdict(set)
    for leaf in call.carried[call.node]:
        leaves_of[frozenset(node for node in operands if leaf in call.zeros[node])].add(leaf)
    found: set[Axis] = set()
    for zeroed, leaves in leaves_of.items():
        if not zeroed:
            continue  # sample numbers prove nothing for all others
        gives = _on_zeros(call.node, zeroed)
        if gives is _Gives.ZEROS:
            found |= leaves
        elif gives is _Gives.UNKNOWN:
            for leaf in leaves:
                leaf.mark_inexact(f"{call.node.target} is not finite for a zeroed channel, or can't be run on one")
    return frozenset(found)


def mark_inexact_zeros(
    graph: fx.Graph, values: Mapping[fx.Node, Any], sums: list[Sum], statement_of: Callable[[fx.Node], Zeros | None]
) -> None:
    """Marks leaves inexact that are summed where their zeroed positions are not zero, or not known to be.

    Args:
        graph: the graph, in execution order.
        values: the axes of every node.
        sums: where values are summed.
        statement_of: the statement of a call's operator about zeros; None where it makes none.
    """
    zeros: dict[fx.Node, Leaves] = {}
    carried: dict[fx.Node, Leaves] = {}
    for node in graph.nodes:
        carried[node] = frozenset(_leaves(values.get(node)))
        zeros[node] = carried[node] if node.op == "get_attr" else _NO_LEAVES
        if is_call(node, aten.sym_size.int):
            continue  # a size does not depend on values
        if node.op != "call_function" or not any(carried[operand] for operand in (node, *node.all_input_nodes)):
            continue
        if statement := statement_of(node):
            zeros[node] = statement(Operands(node, arguments(node), zeros, carried)) & carried[node]
            continue
        for leaf in _NO_LEAVES.union(*(carried[operand] for operand in node.all_input_nodes)):
            leaf.mark_inexact(f"{node.target} does not say what it makes of zeroed channels")
    for node, axis, operands in sums:
        zero = _NO_LEAVES.union(*(zeros.get(operand, _NO_LEAVES) for operand in operands))
        for leaf in axis.leaves():
            if leaf not in zero:
                leaf.mark_inexact(f"{node.target} sums values over it that are not zero for a zeroed channel")


def _zero_in(call: Operands, part: str | Zeros) -> Leaves:
    return call.zero_in(part) if isinstance(part, str) else part(call)


def _leaves(axes: Any) -> Iterator[Axis]:
    """The leaves of a tensor's axes, or of several tensors'."""
    if isinstance(axes, Axis):
        yield from axes.leaves()
    elif isinstance(axes, (tuple, list)):
        for axis in axes:
            yield from _leaves(axis)


_NUMBERS = (-2.5, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0, 7.0)
"""Values of an operand that is not zeroed: both signs, below and above one. Zero is tried separately."""


class _Gives(enum.Enum):
    """The output of an operator on zeros."""

    ZEROS = enum.auto()
    NUMBERS = enum.auto()
    UNKNOWN = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Stand:
    """A placeholder for an operand: sample numbers, or zeros; a scalar operand takes one number per run."""

    place: int
    dtype: torch.dtype
    alone: bool
    zeroed: bool

    def values(self, number: int, all_zero: bool, none_zero: bool) -> torch.Tensor:
        numbers = torch.tensor(_NUMBERS).roll(self.place)  # so that no two operands are equal
        numbers = (numbers > 0) if self.dtype == torch.bool else numbers.to(self.dtype)
        if all_zero or (self.zeroed and not none_zero):
            numbers = torch.zeros_like(numbers)
        return numbers[number] if self.alone else numbers


def _on_zeros(node: fx.Node, zeroed: frozenset[fx.Node]) -> _Gives:
    """Whether an operator gives zeros when some operands are zero and the others are sample numbers."""
    places = {operand: place for place, operand in enumerate(node.all_input_nodes)}

    def stand(operand: fx.Node) -> Any:
        value = operand.meta.get("val")
        if isinstance(value, torch.Tensor):
            return _Stand(places[operand], value.dtype, value.dim() == 0, operand in zeroed)
        return 3  # a size

    args = tuple(map(_plain_layout, fx.map_arg(node.args, stand)))
    kwargs = tuple((name, _plain_layout(value)) for name, value in sorted(fx.map_arg(node.kwargs, stand).items()))
    try:
        return _probed(node.target, args, kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return _Gives.UNKNOWN


def _plain_layout(argument: Any) -> Any:
    """Replaces memory formats: the sample numbers are a vector, which has no other."""
    return torch.contiguous_format if isinstance(argument, torch.memory_format) else argument


@functools.lru_cache(maxsize=1024)
def _probed(target: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> _Gives:
    stands = [argument for argument in (*args, *dict(kwargs).values()) if isinstance(argument, _Stand)]

    def run(number: int, all_zero: bool = False, none_zero: bool = False) -> torch.Tensor:
        def value(argument: Any) -> Any:
            return argument.values(number, all_zero, none_zero) if isinstance(argument, _Stand) else argument

        with torch.random.fork_rng(devices=[]):
            made: torch.Tensor = target(*map(value, args), **{name: value(own) for name, own in kwargs})
        return made

    is_zero = True
    for number in range(len(_NUMBERS) if any(stand.alone for stand in stands) else 1):
        on_zeros, on_numbers = run(number), run(number, none_zero=True)
        if bool((~on_zeros.isfinite() & on_numbers.isfinite()).any()):  # only if the zeros made it infinite
            return _Gives.UNKNOWN
        # With all operands zero, `0 / 0` is the fault of the data, but `0 == 0` gives one.
        is_zero = is_zero and not on_zeros.any() and not run(number, all_zero=True).nan_to_num().any()
    return _Gives.ZEROS if is_zero else _Gives.NUMBERS
