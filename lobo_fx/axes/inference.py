"""Axis inference: one pass over the graph, one rule per operator; what has no rule is locked, with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.axes.algebra import Axis, AxisError, Size, unify
from lobo_fx.axes.kinds import mark_linear_layers
from lobo_fx.axes.zeros import Sum, mark_inexact_zeros
from lobo_fx.errors import InvalidInput
from lobo_fx.operators import arguments
from lobo_fx.program import Program
from lobo_fx.provenance import describe

Axes = tuple[Axis, ...]
"""One axis for each dimension of a tensor."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator call, as a rule sees it.

    Attributes:
        inference: where axes are looked up and unified.
        node: the call.
        given: its arguments by schema name, defaults filled in.
    """

    inference: Inference
    node: fx.Node
    given: dict[str, Any]

    def axes(self, name: str) -> Axes:
        """Axes of a tensor argument."""
        return self.inference.of(self.given[name])

    def has(self, name: str) -> bool:
        """Whether a tensor argument was given."""
        return isinstance(self.given.get(name), fx.Node)

    def sizes(self, node: fx.Node | None = None) -> tuple[Size, ...]:
        """Sizes of the output (or of another node's)."""
        return sizes_of((node or self.node).meta["val"])

    def unify(self, first: Axis, second: Axis) -> Axis:
        """Makes two axes the same; where they can't be, both are locked."""
        return self.inference.unify(first, second, self.node)

    def counts(self, name: str, axes: Axis | Sequence[Axis]) -> None:
        """Declares that an argument holds the size of an axis (or a list of sizes), to be kept true."""
        self.inference.sizes.setdefault(self.node, {})[name] = axes

    def sums(self, axis: Axis, *operands: fx.Node) -> None:
        """Declares that the product of operands is summed over an axis."""
        self.inference.sums.append((self.node, axis, operands))

    def freeze(self, name: str, value: object) -> None:
        """Declares what a left-out argument means now, to be written out before sizes change."""
        self.inference.frozen.setdefault(self.node, {})[name] = value

    def fresh(self, size: Size) -> Axis:
        """A new leaf."""
        return Axis(size)

    def fixed(self, size: Size, reason: str) -> Axis:
        """A new locked leaf."""
        axis = Axis(size)
        axis.lock(reason)
        return axis


Rule = Callable[[Call], Any]
RULES: dict[object, Rule] = {}


def axis_rule(*targets: object) -> Callable[[Rule], Rule]:
    """Registers the rule of one or more operators.

    The rule gets a `Call`, unifies and locks axes of its arguments, and returns the output's axes: a tuple of
    one axis a dimension, or a list of such tuples where the operator gives several tensors. It must depend on
    axes and arguments only, never on weights.

    Raises:
        InvalidInput: an operator has a rule already.

    Example:
        ```python
        @axis_rule(torch.ops.mylib.scale.default)
        def scale(call):                      # x[..., c] * weight[c]
            *rest, channels = call.axes("x")
            return (*rest, call.unify(channels, call.axes("weight")[0]))
        ```
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise InvalidInput(f"{target} has an axis rule already: {RULES[target].__name__}")
            RULES[target] = rule
        return rule

    return register


def sizes_of(value: torch.Tensor) -> tuple[Size, ...]:
    """Sizes of a (fake) tensor; a free dimension as an expression."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


class Inference:
    """Axes of every value, parameter and buffer of a program.

    Attributes:
        program: what was inferred.
        values: by node; a tuple of axes, or a list of tuples where the node gives several tensors.
        stored: axes of parameters and buffers, by tensor identity, so that tied weights share them.
        unknown: operators without a rule, described.
        sizes: arguments that hold sizes of axes, by node and name.
        frozen: arguments to be written out before sizes change, by node and name.
        sums: where values are summed over an axis.
    """

    def __init__(self, program: Program, strict: bool = False) -> None:
        self.program = program
        self.strict = strict
        self.values: dict[fx.Node, Any] = {}
        self.stored: dict[int, Axes] = {}
        self.unknown: dict[str, str] = {}
        self.sizes: dict[fx.Node, dict[str, Axis | Sequence[Axis]]] = {}
        self.frozen: dict[fx.Node, dict[str, object]] = {}
        self.sums: list[Sum] = []

    def run(self) -> Inference:
        """Applies the rules in graph order.

        Raises:
            InvalidInput: `strict`, and an operator has no rule.
        """
        import lobo_fx.axes.rules  # noqa: F401  fills the table

        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._fixed_axes(node.meta.get("val"), "it is an input")
            elif node.op == "get_attr":
                self.values[node] = self._stored_axes(self.program.parameter(node))
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.lock_all(self.values.get(source), "it is an output")
            else:
                self.values[node] = self._apply(node)
        mark_inexact_zeros(self.program.graph, self.values, self.sums)
        mark_linear_layers(self.values, self.sums)
        return self

    def of(self, node: fx.Node) -> Axes:
        """Axes of a node's tensor."""
        axes: Axes = self.values[node]
        return axes

    def _stored_axes(self, tensor: Any) -> Axes | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        if id(tensor) not in self.stored:
            self.stored[id(tensor)] = tuple(Axis(size) for size in tensor.shape)
        return self.stored[id(tensor)]

    def _fixed_axes(self, value: Any, reason: str) -> Any:
        if isinstance(value, torch.Tensor):
            axes = tuple(Axis(size) for size in sizes_of(value))
            self.lock_all(axes, reason)
            return axes
        if isinstance(value, (tuple, list)):
            return [self._fixed_axes(entry, reason) for entry in value]
        return None

    def _apply(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return None
        rule = RULES.get(node.target) or family_rule(node)
        if rule is None:
            return self._unknown(node, f"{node.target} has no axis rule")
        try:
            axes = rule(Call(self, node, arguments(node)))
        except AxisError as error:
            return self._unknown(node, f"{node.target}: {error}", known=True)
        if isinstance(value, torch.Tensor):
            for axis, size in zip(axes, sizes_of(value), strict=True):
                assert axis.find().size == size, f"{describe(node)}: axis {axis} for size {size}"
                if not isinstance(size, int):
                    for leaf in axis.leaves():
                        if not isinstance(leaf.size, int):
                            leaf.lock("its size is free")
        return axes

    def _unknown(self, node: fx.Node, reason: str, known: bool = False) -> Any:
        """Locks whatever an operator touches."""
        where = describe(node)
        if not known:
            if self.strict:
                raise InvalidInput(f"{where} has no axis rule; register one with lobo_fx.axes.axis_rule")
            self.unknown[str(node.target)] = where
        for source in node.all_input_nodes:
            self.lock_all(self.values.get(source), f"{reason} ({where})")
        return self._fixed_axes(node.meta.get("val"), f"{reason} ({where})")

    def lock_all(self, axes: Any, reason: str) -> None:
        """Locks one axis, or all of a tensor or of several."""
        if isinstance(axes, Axis):
            axes.lock(reason)
        elif isinstance(axes, (tuple, list)):
            for axis in axes:
                self.lock_all(axis, reason)

    def unify(self, first: Axis, second: Axis, node: fx.Node) -> Axis:
        """Makes two axes the same; where they can't be, both are locked with the reason."""
        try:
            return unify(first, second)
        except AxisError as error:
            reason = f"{error} at {describe(node)}"
            first.lock(reason)
            second.lock(reason)
            return first

    def broadcast(self, node: fx.Node, tensors: Sequence[Axes]) -> Axes:
        """Unifies aligned dimensions, numpy-style: dimensions of size 1 are stretched."""
        rank = max(len(axes) for axes in tensors)
        output = []
        for position in range(-rank, 0):
            aligned = [axes[position] for axes in tensors if len(axes) >= -position]
            long = [axis for axis in aligned if axis.find().size != 1]
            result = long[0] if long else aligned[0]
            for other in long[1:]:
                result = self.unify(result, other, node)
            output.append(result)
        return tuple(output)


def family_rule(node: fx.Node) -> Rule | None:
    """The rule of an operator's family, by its tags."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise in node.target.tags:
        return pointwise
    return None


def pointwise(call: Call) -> Axes:
    """Every tensor argument is broadcast; each output element depends on one element of each."""
    tensors = [call.inference.of(node) for node in call.node.all_input_nodes if _is_tensor(node)]
    return call.inference.broadcast(call.node, tensors)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
