"""Where zeroed channels stay zero: what tells a removal that equals zeroing from one that does not.

Zeroing a channel zeroes every weight that makes or reads it. Where its values are summed with weights, that is
the same as removing it. Where values are summed without weights (attention, a plain sum), it is the same only
if they are still zero there: `relu(0)` is, `sigmoid(0)` is not, and neither is a sum with a value that the
channel does not run through.
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
    """An operator call, as a statement about zeros sees it.

    Attributes:
        node: the call.
        given: its arguments by schema name.
        zeros: by node before it, the leaves at whose zeroed positions its values are zero.
        carried: by node, the leaves that its axes are made of; the call's own among them.
    """

    node: fx.Node
    given: Mapping[str, Any]
    zeros: Mapping[fx.Node, Leaves]
    carried: Mapping[fx.Node, Leaves]

    def zero_in(self, name: str) -> Leaves:
        """The leaves at which an argument is zero: a number is zero at all of them, or at none."""
        value = self.given.get(name)
        if isinstance(value, fx.Node):
            return self.zeros[value]
        return self.carried[self.node] if value == 0 else _NO_LEAVES


Zeros = Callable[[Operands], Leaves]
"""A statement of an operator: the leaves at whose zeroed positions its output is zero."""


def any_of(*parts: str | Zeros) -> Zeros:
    """Zero wherever one of these arguments (or statements) is: a product. Of nothing: nowhere."""
    return lambda call: _NO_LEAVES.union(*(_zero_in(call, part) for part in parts))


def all_of(*parts: str | Zeros) -> Zeros:
    """Zero wherever each of these arguments (or statements) is: a sum; one left out adds nothing."""

    def zeros(call: Operands) -> Leaves:
        given = [part for part in parts if not isinstance(part, str) or call.given.get(part) is not None]
        return call.carried[call.node].intersection(*(_zero_in(call, part) for part in given))

    return zeros


def through(*names: str) -> Zeros:
    """Zero wherever each of these operands that the leaf runs through is; no names stand for all of them."""

    def zeros(call: Operands) -> Leaves:
        given = [call.given[name] for name in names] if names else call.node.all_input_nodes
        operands = [operand for operand in given if isinstance(operand, fx.Node)]
        somewhere = _NO_LEAVES.union(*(call.zeros[operand] for operand in operands))
        return somewhere.difference(*(call.carried[operand] - call.zeros[operand] for operand in operands))

    return zeros


MOVED = through()
"""Values only move: zero wherever every operand that the leaf runs through is."""
NOWHERE = any_of()
"""Whatever zeroed channels make of it, the output is finite, and not known to be zero."""


def elementwise(call: Operands) -> Leaves:
    """Each element is made of one element of each operand: the operator itself is asked what it makes of zeros.

    It is run on a handful of numbers, with zeros for the operands that are zero at a leaf. Where that is not
    finite (`log(0)`, `1 / 0`), or can't be run, zeroing a channel does not stand for removing it.
    """
    operands = [node for node in call.node.all_input_nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    leaves_of: dict[frozenset[fx.Node], set[Axis]] = defaultdict(set)
    for leaf in call.carried[call.node]:
        leaves_of[frozenset(node for node in operands if leaf in call.zeros[node])].add(leaf)
    found: set[Axis] = set()
    for zeroed, leaves in leaves_of.items():
        if not zeroed:
            continue  # some numbers say nothing of all others
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
    """Marks axes inexact that are summed where zeroed positions are not zero, or where nobody knows.

    Args:
        graph: in order.
        values: the axes of every node.
        sums: where values are summed.
        statement_of: where a call's outputs are zero; None where its operator does not say.
    """
    zeros: dict[fx.Node, Leaves] = {}
    carried: dict[fx.Node, Leaves] = {}
    for node in graph.nodes:
        carried[node] = frozenset(_leaves(values.get(node)))
        zeros[node] = carried[node] if node.op == "get_attr" else _NO_LEAVES
        if is_call(node, aten.sym_size.int):
            continue  # a size says nothing of values
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
"""What an operand may hold where it is not zeroed: of both signs, on both sides of one. Zero is tried apart."""


class _Gives(enum.Enum):
    """What an operator makes of zeros."""

    ZEROS = enum.auto()
    NUMBERS = enum.auto()
    UNKNOWN = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Stand:
    """What stands for an operand: numbers, or zeros; one after the other for an operand of no dimensions."""

    place: int
    dtype: torch.dtype
    alone: bool
    zeroed: bool

    def values(self, number: int, all_zero: bool, none_zero: bool) -> torch.Tensor:
        numbers = torch.tensor(_NUMBERS).roll(self.place)  # no two operands are alike
        numbers = (numbers > 0) if self.dtype == torch.bool else numbers.to(self.dtype)
        if all_zero or (self.zeroed and not none_zero):
            numbers = torch.zeros_like(numbers)
        return numbers[number] if self.alone else numbers


def _on_zeros(node: fx.Node, zeroed: frozenset[fx.Node]) -> _Gives:
    """What an operator gives where some of its operands are zero and the others are any numbers."""
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
    """Numbers in a row have no other layout."""
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
        if bool((~on_zeros.isfinite() & on_numbers.isfinite()).any()):  # infinite anyway is not the zeros' doing
            return _Gives.UNKNOWN
        # Where all operands happen to be zero, `0 / 0` is the data's own fault, but `0 == 0` is one.
        is_zero = is_zero and not on_zeros.any() and not run(number, all_zero=True).nan_to_num().any()
    return _Gives.ZEROS if is_zero else _Gives.NUMBERS
