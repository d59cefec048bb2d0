"""What modules hold: sums that are the program's, and parts of those that call several layers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.measures.modules import measure_modules
from lobo_fx.passes import Factorize, FoldBatchNorm, PruneChannels, QuantizeDynamic, QuantizeWeights


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x).mean((2, 3)))


class Bare(nn.Module):
    """Functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w1_bias, self.w1_2 = (nn.Parameter(torch.randn(*shape)) for shape in ((32, 16), (32,), (8, 32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.w1, self.w1_bias).relu(), self.w1_2)


IMAGES, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 16)


def compiled(model: nn.Module, example: torch.Tensor, *passes: Any) -> lobo_fx.Result:
    return lobo_fx.compile(model.eval(), list(passes), example_inputs=example, progress=False)


def test_modules_sum_up_to_the_program_and_have_its_widths() -> None:
    result = compiled(Network(), IMAGES, PruneChannels(0.5, round_to=1, minimum=1), FoldBatchNorm(), QuantizeWeights())
    rows = {row.name: row for row in result.report.modules}
    assert list(rows) == ["", "body", "body.0", "body.3", "head"]
    first, last = result.report.rows[0], result.report.rows[-1]
    for figures, row in ((rows[""].before, first), (rows[""].after, last)):
        assert figures is not None
        assert (figures.parameters, figures.nonzero, figures.bytes) == (row.parameters, row.nonzero, row.bytes)
    before, after = rows["body.0"].before, rows["body.0"].after
    assert before is not None
    assert after is not None
    assert (before.kind, before.width, after.width) == ("convolution", 16, 8)
    assert before.parameters == 3 * 16 * 9 + 16
    assert (after.stored, after.computed, after.microseconds) == ("int8", "float32", None)
    assert (before.stored, before.computed) == ("float32", "float32")


def test_layers_that_are_called_without_modules_are_named_by_their_weights() -> None:
    result = compiled(Bare(), ROWS, QuantizeWeights("int4", block_size=16))
    rows = {row.name: row for row in result.report.modules}
    assert list(rows) == ["", "w1", "w1_2"]
    assert rows["w1_2"].before is not None
    assert (rows["w1_2"].before.width, rows["w1_2"].before.parameters) == (8, 8 * 32)
    assert rows["w1_2"].after is not None
    assert (rows["w1_2"].after.stored, rows["w1_2"].after.computed) == ("int4", "float32")
    exported = torch.export.export(Bare(), (ROWS,))
    assert [row.name for row in lobo_fx.compile(exported, [], progress=False).report.modules] == ["", "w1", "w1_2"]


def test_a_layer_that_a_pass_made_has_no_before_and_integers_are_told() -> None:
    result = compiled(nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64), Factorize(0.3), QuantizeDynamic())
    rows = {row.name: row for row in result.report.modules}
    made = [row for row in rows.values() if row.before is None]
    assert len(made) == 2
    assert all(row.after is not None and row.after.computed == "int8" for row in made)


def test_a_model_without_layers_is_itself_alone() -> None:
    found = measure_modules(compiled(nn.ReLU(), ROWS).program)
    assert list(found) == [""]
    assert (found[""].parameters, found[""].stored) == (0, "")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.out = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.fc(self.embedding(x)))


@pytest.mark.parametrize("passes", [[], [QuantizeDynamic()]])
def test_a_shared_weight_counts_once_and_each_of_its_layers_has_its_own_width(passes: list[Any]) -> None:
    result = compiled(Tied(), torch.randint(0, 50, (2, 5)), *passes)
    rows = {row.name: row.after for row in result.report.modules}
    assert list(rows) == ["", "embedding", "fc", "out"]
    kinds = {name: (row.kind, row.width, row.parameters) for name, row in rows.items() if row is not None}
    assert kinds["embedding"] == ("lookup", 32, 50 * 32)
    assert kinds["out"] == ("linear layer", 50, 0)
    assert kinds[""][2] == 50 * 32 + 32 * 32 + 32
    assert rows["out"] is not None
    assert rows["out"].computed == ("int8" if passes else "float32")
    assert all(row.before is not None for row in result.report.modules)
