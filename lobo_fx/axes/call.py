"""One operator call as an axis rule sees it, and the table of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from lobo_fx.axes.axis import Axis, AxisError, Size
from lobo_fx.axes.unification import unify
from lobo_fx.axes.zeros import Sum, Zeros, any_of, elementwise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.provenance import describe

__all__ = [
    "RULES",
    "Axes",
    "Call",
    "Entry",
    "Findings",
    "Rule",
    "axis_rule",
    "lock_all",
    "pointwise",
    "rule_of",
    "sizes_of",
    "zeros_of",
]

Axes = tuple[Axis, ...]
"""One axis for each dimension of a tensor."""


@dataclasses.dataclass
class Findings:
    """Statements of rules other than the axes of outputs.

    Attributes:
        sizes: by node and argument name, the axes whose sizes the argument holds.
        frozen: by node and argument name, values to write out before sizes change.
        sums: sums over an axis: the node, the axis, and the operands whose product is summed.
        products: axes whose sizes, multiplied, count the multiply-accumulates of a node; a node may have several.
    """

    sizes: dict[fx.Node, dict[str, Axis | Sequence[Axis]]] = dataclasses.field(default_factory=dict)
    frozen: dict[fx.Node, dict[str, object]] = dataclasses.field(default_factory=dict)
    sums: list[Sum] = dataclasses.field(default_factory=list)
    products: list[tuple[Axis, ...]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator call, as a rule sees it.

    Attributes:
        node: the call.
        given: its arguments by schema name, defaults filled in.
        known: the axes of all values before it, by node.
        findings: where the rule's statements are kept.
        seen: operands that the rule read; the axes of all others are locked.
    """

    node: fx.Node
    given: dict[str, Any]
    known: Mapping[fx.Node, Any]
    findings: Findings
    seen: set[fx.Node] = dataclasses.field(default_factory=set)

    def of(self, node: fx.Node) -> Axes:
        """Axes of an operand."""
        self.seen.add(node)
        axes: Axes = self.known[node]
        return axes

    def ignores(self, name: str) -> None:
        """Declares that only the dtype or shape of a tensor argument matters, so its positions may be removed."""
        if isinstance(node := self.given.get(name), fx.Node):
            self.seen.add(node)

    def integer(self, name: str) -> int:
        """An argument that must be a number here.

        Raises:
            AxisError: it is a computed size, or it was left out.
        """
        value = self.given[name]
        if not isinstance(value, int):
            raise AxisError(f"its '{name}' is {'left out' if value is None else 'computed'}")
        return value

    def axes(self, name: str) -> Axes:
        """Axes of a tensor argument."""
        return self.of(self.given[name])

    def has(self, name: str) -> bool:
        """Whether a tensor argument was given."""
        return isinstance(self.given.get(name), fx.Node)

    def sizes(self, node: fx.Node | None = None) -> tuple[Size, ...]:
        """Sizes of the output (or of another node's)."""
        return sizes_of((node or self.node).meta["val"])

    def unify(self, first: Axis, second: Axis) -> Axis:
        """Makes two axes the same; where they can't be, both are locked with the reason."""
        try:
            return unify(first, second)
        except AxisError as error:
            lock_all((first, second), f"{error} at {describe(self.node)}")
            return first

    def broadcast(self, tensors: Sequence[Axes]) -> Axes:
        """Unifies aligned dimensions, numpy-style: dimensions of size 1 are stretched."""
        rank = max(len(axes) for axes in tensors)
        output = []
        for position in range(-rank, 0):
            aligned = [axes[position] for axes in tensors if len(axes) >= -position]
            long = [axis for axis in aligned if axis.find().size != 1]
            result = long[0] if long else aligned[0]
            for other in long[1:]:
                result = self.unify(result, other)
            output.append(result)
        return tuple(output)

    def counts(self, name: str, axes: Axis | Sequence[Axis]) -> None:
        """Declares that an argument holds the size of an axis (or a list of sizes), which surgery must update."""
        self.findings.sizes.setdefault(self.node, {})[name] = axes

    def sums(self, axis: Axis, *operands: fx.Node) -> None:
        """Declares that the product of operands is summed over an axis."""
        self.findings.sums.append((self.node, axis, operands))

    def multiplies(self, *axes: Axis) -> None:
        """Declares multiply-accumulates: as many as the product of the sizes of these axes."""
        self.findings.products.append(axes)

    def freeze(self, name: str, value: object) -> None:
        """Declares what a left-out argument means now, to be written out before sizes change."""
        self.findings.frozen.setdefault(self.node, {})[name] = value

    def fresh(self, size: Size) -> Axis:
        """A new leaf."""
        return Axis(size)

    def fixed(self, size: Size, reason: str) -> Axis:
        """A new locked leaf."""
        axis = Axis(size)
        axis.lock(reason)
        return axis


Rule = Callable[[Call], Any]


class Entry(NamedTuple):
    """The registered rule of an operator, and its statement about zeros; None where it makes none."""

    rule: Rule
    zeros: Zeros | None


RULES: dict[object, Entry] = {}
"""By operator overload."""


def axis_rule(*targets: object, zeros: Zeros | str | None = None) -> Callable[[Rule], Rule]:
    """Registers the rule of one or more operators.

    The rule gets a `Call`, unifies and locks axes of its arguments, and returns the output's axes: a tuple of
    one axis a dimension, or a list of such tuples where the operator gives several tensors. It must depend on
    axes and arguments only, never on weights.

    Args:
        *targets: operator overloads.
        zeros: where the output is zero if channels of its operands are: a name ("x": wherever that operand is),
            `any_of("x", "weight")` (a product), `all_of("self", "other")` (a sum), `MOVED` (values only move),
            `elementwise` (the operator is run on zeros), or `NOWHERE` (finite, but not zero). Left out, nothing is
            known, not even that it is finite: removing a channel that it reads is reported as more than zeroing it.

    Raises:
        InvalidInput: an operator has a rule already.

    Example:
        ```python
        @axis_rule(torch.ops.mylib.scale.default, zeros=any_of("x", "weight"))
        def scale(call):                      # x[..., c] * weight[c]
            *rest, channels = call.axes("x")
            return (*rest, call.unify(channels, call.axes("weight")[0]))
        ```
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                known = RULES[target].rule
                raise InvalidInput(f"{target} has an axis rule already: {known.__name__} of {known.__module__}")
            RULES[target] = Entry(rule, any_of(zeros) if isinstance(zeros, str) else zeros)
        return rule

    return register


def sizes_of(value: torch.Tensor) -> tuple[Size, ...]:
    """Sizes of a (fake) tensor; a free dimension as an expression."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


def lock_all(axes: Any, reason: str) -> None:
    """Locks one axis, or all of a tensor or of several."""
    if isinstance(axes, Axis):
        axes.lock(reason)
    elif isinstance(axes, (tuple, list)):
        for axis in axes:
            lock_all(axis, reason)


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of an operator: its own, or its family's."""
    entry = _entry(node)
    return entry.rule if entry else None


def zeros_of(node: fx.Node) -> Zeros | None:
    """The statement about zeros of an operator: its own, or its family's."""
    entry = _entry(node)
    return entry.zeros if entry else None


def _entry(node: fx.Node) -> Entry | None:
    if node.target in RULES:
        return RULES[node.target]
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return Entry(pointwise, elementwise) if tagged else None


def pointwise(call: Call) -> Axes:
    """Every tensor argument is broadcast; each output element depends on one element of each."""
    tensors = [call.of(node) for node in call.node.all_input_nodes if _is_tensor(node)]
    return call.broadcast(tensors)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
