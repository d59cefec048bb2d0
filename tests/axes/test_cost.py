"""What a removal is said to cost, against what the cut network is counted to cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.axes import Inference
from lobo_fx.axes.cost import COSTS
from lobo_fx.axes.members import members
from lobo_fx.axes.surgery import remove
from lobo_fx.measures.counts import run_counted

IMAGES, SEQUENCES = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> Any:
        q, k, v = self.inside(x).view(x.shape[0], 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.outside(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Products(nn.Module):
    """Attention by einsum and by batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: torch.Tensor) -> Any:
        a, b = self.first(x), self.second(x)
        weights = torch.einsum("bik,bjk->bij", a, b).softmax(-1)
        return self.third(torch.bmm(weights, b))


class Pairs(nn.Module):
    """Multiplies the features of two layers, each with each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pairs = nn.Linear(12, 10), nn.Linear(12, 8), nn.Bilinear(10, 8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.pairs(self.first(x), self.second(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells, self.head = kind(12, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.cells(x)[0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.ConvTranspose2d(16, 6, 2, stride=2),
        nn.Conv2d(6, 3, 1),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "convolutions": (convolutions, IMAGES),
    "attention": (Attention, SEQUENCES),
    "products": (Products, SEQUENCES),
    "bilinear": (Pairs, SEQUENCES),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCES),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_costs_are_those_of_the_cut_network(kind: str) -> None:
    make, x = NETWORKS[kind]
    program = lobo_fx.trace(make().eval(), x)
    inference = Inference(program).run()
    generator = torch.Generator().manual_seed(0)
    assert COSTS["macs"](inference, {}) == run_counted(program)[1] != 0
    removal = {}
    for leaf in members(inference):
        removal[leaf] = torch.rand(leaf.size, generator=generator) < 0.6
        removal[leaf][0] = True
    assert removal
    foretold = {name: cost(inference, removal) for name, cost in COSTS.items()}
    remove(inference, removal)
    stored = {id(t): t for t in [*program.module.parameters(), *program.module.buffers()]}
    assert foretold["macs"] == run_counted(program)[1]
    assert foretold["parameters"] == sum(p.numel() for p in program.module.parameters())
    read = {id(program.parameter(node)) for node in program.graph.find_nodes(op="get_attr")}
    assert foretold["file_size"] == sum(t.numel() * t.element_size() for at, t in stored.items() if at in read)


def test_a_recurrent_network_costs_its_products() -> None:
    """Counted by hand: no counter sees inside a GRU."""
    program = lobo_fx.trace(Recurrent(nn.GRU).eval(), SEQUENCES)
    products = 5 * 2 * 3 * 6 * (12 + 6 + 12 + 6) + 5 * 12 * 3
    assert COSTS["macs"](Inference(program).run(), {}) == products


def test_projected_states_cost_all_three_products() -> None:
    """By hand, 5 steps: gates from 12 inputs, gates from 4 projected states, and the projection of 6."""
    program = lobo_fx.trace(nn.LSTM(12, 6, proj_size=4, batch_first=True).eval(), torch.randn(2, 5, 12))
    assert COSTS["macs"](Inference(program).run(), {}) == 5 * (4 * 6 * 12 + 4 * 6 * 4 + 4 * 6)
