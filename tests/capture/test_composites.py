"""Other spellings of known operators: they are written out, and what no rule knows is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lobo_fx
from lobo_fx import Program
from lobo_fx.axes.call import RULES, Entry, pointwise, rule_of
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten
from lobo_fx.passes import FoldWeights, PruneChannels, QuantizeDynamic

SPELLINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "narrow": lambda x: x.narrow(1, 2, 6),
    "moveaxis": lambda x: torch.moveaxis(x, 1, 2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "hstack": lambda x: torch.hstack([x, 2 * x]),
    "concatenate": lambda x: torch.concatenate([x, -x], -1),
    "negative": lambda x: x.negative(),
    "divide": lambda x: x.divide(3).greater(0.1).float(),
    "tensor_split": lambda x: torch.cat(torch.tensor_split(x, (3, 5), dim=1)[::-1], 1),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1)[1],
    "vecdot": lambda x: torch.linalg.vecdot(x, x.flip(1), dim=1),
    "norm": lambda x: torch.linalg.norm(x, dim=1),
    "vstack": lambda x: torch.vstack([x, x])[: x.shape[0]],
    "loss": lambda x: F.l1_loss(x, 2 * x, reduction="none"),
}


class Spelled(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv1d(4, 8, 1), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.first(x))


def unknown(program: Program) -> list[fx.Node]:
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor) and rule_of(node) is None
        if "getitem" not in str(node.target)
    ]


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_are_written_out(name: str) -> None:
    torch.manual_seed(0)
    model = Spelled(SPELLINGS[name]).eval()
    program = lobo_fx.trace(model, torch.randn(3, 4, 6))
    assert not unknown(program)
    called = program.module.code
    program.module.recompile()
    assert program.module.code == called, "what runs is the graph"
    assert program.signature.batch is not None
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-6, atol=1e-6)


def test_what_is_composed_of_unknown_operators_stays() -> None:
    model = Spelled(lambda x: F.cross_entropy(x, torch.zeros(3, 6, dtype=torch.long), reduction="none"))
    program = lobo_fx.trace(model.eval(), torch.randn(3, 4, 6))
    assert [node.target for node in unknown(program)] == [aten.cross_entropy_loss.default]


def test_what_is_composed_of_writes_in_place_stays() -> None:
    model = Spelled(lambda x: torch.isclose(x, x.round(), atol=0.1)).eval()
    result = lobo_fx.compile(model, example_inputs=torch.randn(3, 4, 6), progress=False)
    assert [node.target for node in unknown(result.program)] == [aten.isclose.default]


def test_an_operator_with_a_rule_of_its_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.negative.default, Entry(pointwise, MOVED))
    program = lobo_fx.trace(Spelled(SPELLINGS["negative"]).eval(), torch.randn(3, 4, 6))
    assert aten.negative.default in {node.target for node in program.graph.nodes}


def test_memory_layout_is_no_matter() -> None:
    weight = torch.randn(3, 8)
    model = Spelled(lambda x: torch.inner(x.transpose(1, 2), weight)).eval()
    program = lobo_fx.trace(model, torch.randn(3, 4, 6))
    assert not unknown(program)
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(program.module(x), model(x), rtol=1e-6, atol=1e-6)


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "inner": torch.inner,
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([-1], [1])),
    "linalg": lambda x, w: torch.linalg.matmul(x, w.mT),
}


class Product(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.weight, self.function = nn.Linear(12, 24), nn.Parameter(torch.randn(10, 24)), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(F.relu(self.first(x)), self.weight)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_weight_is_a_linear_layer(name: str) -> None:
    model, plain = Product(PRODUCTS[name]), Product(F.linear)
    data = torch.randn(64, 7, 12, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"example_inputs": data[:2], "calibration_data": [data], "progress": False}
    for passes in ([FoldWeights(), PruneChannels(0.5)], [QuantizeDynamic()]):
        found, expected = (lobo_fx.compile(one, passes, **settings) for one in (model, plain))
        torch.testing.assert_close(found.module(data), expected.module(data), rtol=1e-4, atol=1e-5)
        assert found.report.rows[-1].parameters == expected.report.rows[-1].parameters
