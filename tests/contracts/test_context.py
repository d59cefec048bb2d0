"""Calibration data in two parts: what a fit may see, and what judges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program


class Two(nn.Module):
    """Takes rows, a table that all rows share, and rows along the second dimension."""

    def forward(self, x: torch.Tensor, table: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        return x @ table + across.T


def program(dynamic_shapes: Any = None) -> Program:
    return trace(Two(), (torch.ones(6, 3), torch.ones(3, 2), torch.ones(2, 6)), dynamic_shapes)


def batch(rows: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Rows that say which they are."""
    numbers = torch.tensor(rows, dtype=torch.float)
    return numbers[:, None].expand(-1, 3), torch.ones(3, 2), numbers.expand(2, -1)


def split(made: Program, batches: list[Any]) -> dict[bool, list[int]]:
    """The numbers of the rows of each part."""
    found: dict[bool, list[int]] = {False: [], True: []}
    for inputs, held_out in Context(made.signature, batches, show_progress=False).split_batches():
        x, table, across = inputs.tensors
        assert torch.equal(table, torch.ones(3, 2))
        assert torch.equal(across[0], x[:, 0])
        found[held_out] += x[:, 0].int().tolist()
    return found


def free() -> Program:
    rows = torch.export.Dim("rows", min=1)
    return program({"x": {0: rows}, "table": None, "across": {1: rows}})


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [7] * 28 + [4], [64, 136]], ids=["one", "ones", "sevens", "two"])
def test_every_fourth_row_is_held_out_and_of_many_every_eighth(sizes: list[int]) -> None:
    numbers = iter(range(200))
    found = split(free(), [batch([next(numbers) for _ in range(size)]) for size in sizes])
    assert found[True] == [*range(1, 64, 4), *range(65, 200, 8)]
    assert sorted(found[False] + found[True]) == list(range(200))


def test_of_a_fixed_batch_whole_batches_are_held_out() -> None:
    found = split(program(), [batch(range(6 * at, 6 * at + 6)) for at in range(6)])
    assert found[True] == [*range(6, 12), *range(30, 36)]
    assert split(program(), [batch(range(6))]) == {False: list(range(6)), True: []}


def test_rows_of_a_computed_size_are_not_taken_apart() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y.reshape(-1, 2, 3).sum(1)

    rows = torch.export.Dim("rows", min=1, max=64)
    shapes = {"x": {0: rows}, "y": {0: 2 * rows}}
    made = trace(Halves(), (torch.ones(6, 3), torch.ones(12, 3)), shapes)
    assert made.signature.batch is None
    context = Context(made.signature, [(torch.ones(4, 3), torch.ones(8, 3))] * 2, show_progress=False)
    assert [(len(inputs.tensors[0]), held_out) for inputs, held_out in context.split_batches()] == [
        (4, False),
        (4, True),
    ]
