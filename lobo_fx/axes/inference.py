"""Axis inference: one pass over the graph, one rule per operator; axes around one without a rule are locked."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import lobo_fx.axes.rules  # noqa: F401  fills the table
from lobo_fx.axes.axis import Axis, AxisError
from lobo_fx.axes.call import Axes, Call, Findings, lock_all, rule_of, sizes_of, zeros_of
from lobo_fx.axes.kinds import mark_linear_layers
from lobo_fx.axes.plugged import load_plugged_rules
from lobo_fx.axes.zeros import mark_inexact_zeros
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.operators import arguments
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe, place

__all__ = ["Inference"]


class Inference:
    """Axes of every value, parameter and buffer of a program.

    Attributes:
        program: the inferred program.
        values: by node; a tuple of axes, or a list of tuples where the node gives several tensors.
        stored: axes of parameters and buffers, by tensor identity, so that tied weights share them.
        unknown: operators without a rule, with where they are called.
        findings: statements of rules other than the axes.
    """

    def __init__(self, program: Program, strict: bool = False) -> None:
        self.program = program
        self.strict = strict
        self.values: dict[fx.Node, Any] = {}
        self.stored: dict[int, Axes] = {}
        self.unknown: dict[str, str] = {}
        self.findings = Findings()

    def run(self) -> Inference:
        """Applies the rules in graph order.

        Raises:
            InvalidInput: `strict`, and an operator has no rule.
        """
        load_plugged_rules()
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._fixed_axes(node.meta.get("val"), "it is an input")
            elif node.op == "get_attr":
                self.values[node] = self._stored_axes(self.program.parameter(node))
            elif node.op == "output":
                for source in node.all_input_nodes:
                    lock_all(self.values.get(source), "it is an output")
            else:
                self.values[node] = self._apply(node)
        mark_inexact_zeros(self.program.graph, self.values, self.findings.sums, zeros_of)
        mark_linear_layers(self.values, self.findings.sums)
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
            lock_all(axes, reason)
            return axes
        if isinstance(value, (tuple, list)):
            return [self._fixed_axes(entry, reason) for entry in value]
        return None

    def _apply(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return None
        rule = rule_of(node)
        if rule is None:
            return self._unknown(node, f"{node.target} has no axis rule")
        call = Call(node, arguments(node), self.values, self.findings)
        try:
            axes = rule(call)
            if isinstance(value, torch.Tensor):
                _check_sizes(axes, value)
        except AxisError as error:
            return self._unknown(node, f"{node.target}: {error}", known=True)
        except Exception as error:  # a rule that fails must not end a pass
            if self.strict:
                raise
            free = [name for name, given in call.given.items() if _is_free(given)]
            why = f"its {free[0]} is a size that is not fixed" if free else f"{type(error).__name__}: {error}"
            return self._unknown(node, f"{node.target}: its axis rule fails ({why})", known=True)
        for source in node.all_input_nodes:
            if source not in call.seen:
                lock_all(self.values.get(source), f"{node.target} does not say what it does with it ({place(node)})")
        return axes

    def _unknown(self, node: fx.Node, reason: str, known: bool = False) -> Any:
        """Locks whatever an operator touches."""
        where = place(node)
        if not known:
            if self.strict:
                raise InvalidInput(f"{describe(node)} has no axis rule; register one with lobo_fx.axes.axis_rule")
            self.unknown[str(node.target)] = where
        for source in node.all_input_nodes:
            lock_all(self.values.get(source), f"{reason} ({where})")
        return self._fixed_axes(node.meta.get("val"), f"{reason} ({where})")


def _is_free(value: object) -> bool:
    """Whether an argument is a size that is computed from the inputs'."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymInt)


def _check_sizes(axes: Axes, value: torch.Tensor) -> None:
    """Checks the output's axes against its sizes, and locks leaves with a free size.

    Raises:
        AxisError: a rule gives an axis of another size.
    """
    for axis, size in zip(axes, sizes_of(value), strict=True):
        if axis.find().size != size:
            raise AxisError(f"its rule gives axis {axis} for size {size}")
        for leaf in axis.leaves() if not isinstance(size, int) else ():
            if not isinstance(leaf.size, int):
                leaf.lock("its size is free")
