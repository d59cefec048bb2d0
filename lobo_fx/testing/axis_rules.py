"""Test kit for axis rules: removes positions from every axis that a rule leaves free, and compares with zeroing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lobo_fx.axes.axis import Axis
from lobo_fx.axes.inference import Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate

__all__ = ["check_axis_rule"]

_TOLERANCE = 1e-9
"""Largest error, as a share of the output, in float64."""


class _Around(nn.Module):
    """Calls an operator on stored operands, and sums its output with or without weights."""

    def __init__(self, call: Callable[..., Any], operands: Sequence[torch.Tensor], weighted: bool) -> None:
        super().__init__()
        self.call = call
        self.operands = nn.ParameterList(operands)
        found = call(*operands)
        self.shares = nn.Parameter(torch.rand_like(found) + 0.5) if weighted else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.call(*(operand * x for operand in self.operands))
        total: torch.Tensor = (found if self.shares is None else found * self.shares).sum()
        return total * x


def check_axis_rule(call: Callable[..., torch.Tensor], *operands: torch.Tensor, free: Sequence[int]) -> None:
    """Removes half of every axis that the rule leaves free, and compares with zeroing the same half.

    The output is summed twice: with weights, where removal must equal zeroing on every free axis; and without weights,
    where it must on the axes of which `zeros=` says that zeros stay zeros. A twin that must not match is a call with
    `free=()`.

    Args:
        call: calls the operator on tensors, and returns one tensor.
        *operands: float tensors; converted to float64.
        free: sizes of the axes that may be cut, in any order; the rule must leave exactly these free.
    """
    for weighted in (True, False):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = _Around(call, [operand.double() for operand in operands], weighted).eval()
            program = trace(model, torch.ones(1, dtype=torch.float64), None)
            inference = Inference(program).run()
            assert not inference.unknown, f"no axis rule: {', '.join(inference.unknown)}"
            leaves = list(members(inference))
            if weighted:
                sizes = sorted(leaf.size for leaf in leaves)
                locks = {lock for axes in inference.stored.values() for axis in axes for lock in axis.find().locks}
                assert sizes == sorted(free), f"axes of {sizes} are free, not of {sorted(free)}; {'; '.join(locks)}"
            for index, leaf in enumerate(leaves):
                if weighted or not leaf.inexact:
                    _compare(program, index, str(leaf), weighted)


def _compare(program: Program, index: int, name: str, weighted: bool) -> None:
    twin = program.clone()
    inference = Inference(twin).run()
    leaf: Axis = list(members(inference))[index]
    kept = torch.ones(leaf.size, dtype=torch.bool)
    kept[torch.randperm(leaf.size)[: leaf.size // 2]] = False
    zero(inference, {leaf: kept})
    expected = twin.run()
    remove(inference, {leaf: kept})
    try:
        propagate(twin.module)
        found = twin.run()
    except Exception as error:
        raise AssertionError(f"axis {name} is free, but the operator fails without half of it: {error}") from error
    off = float((found - expected).abs() / expected.abs().clamp_min(1e-12))
    how = "where its outputs are weighted" if weighted else "so that zeros= says too much"
    assert off <= _TOLERANCE, f"without half of axis {name} the output is off by {off:.1e}, {how}"
