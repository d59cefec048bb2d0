"""Random networks, random removals: shapes stay right, and removing equals zeroing wherever that is promised.

`LOBO_FX_NETWORKS=5000 pytest tests/axes/test_networks.py` tries more of them; a seed that fails is in the test's name.
"""

from __future__ import annotations

import collections
import functools
import math
import os

import pytest
import torch
from network_generator import SIDE, RandomNet

from lobo_fx.axes import Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.removal import Removal
from lobo_fx.axes.surgery import remove, zero
from lobo_fx.capture.tracing import trace
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import has_free_dimension

NETWORKS = int(os.environ.get("LOBO_FX_NETWORKS", "60"))
QUICK = NETWORKS if "LOBO_FX_NETWORKS" in os.environ else 20
"""So many take every step at least once; the others run with the slow tests."""
TOLERANCE = 1e-9
"""In double precision: far above rounding, far below anything wrong."""

Tensor = torch.Tensor


def build(seed: int) -> tuple[RandomNet, Tensor]:
    torch.manual_seed(seed)
    net = RandomNet(seed).double().eval()
    return net, torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)


@functools.cache
def traced(seed: int) -> tuple[Program, Tensor]:
    """A free batch makes tracing three times slower, so one network in eight has it."""
    net, x = build(seed)
    return trace(net, x, "batch" if seed % 8 == 0 else None), x


def draw(inference: Inference, seed: int, exact: bool) -> Removal:
    """Any number of positions of some of the free leaves, at least one of which stays in each."""
    generator = torch.Generator().manual_seed(seed)
    removal: Removal = {}
    for leaf in members(inference):
        stay = int(torch.randint(1, leaf.size + 1, (1,), generator=generator))
        chosen = torch.randperm(leaf.size, generator=generator)[:stay]
        if stay < leaf.size and not (exact and leaf.inexact):
            removal[leaf] = torch.zeros(leaf.size, dtype=torch.bool).index_fill_(0, chosen, True)
    return removal


def numbers(program: Program) -> int:
    """How many numbers a program stores."""
    return sum(tensor.numel() for tensor in program.module.state_dict().values())


def compare(program: Program, x: Tensor, seed: int, exact: bool) -> int:
    """Removes and, where that is promised, compares with zeroing; returns how many axes got smaller."""
    program = program.clone()
    inference = Inference(program).run()
    assert not inference.unknown
    removal = draw(inference, seed, exact)
    zero(inference, removal)
    zeroed, stored = program.run(), numbers(program)
    remove(inference, removal)
    smaller = program.run()
    assert (numbers(program) < stored) == bool(removal)
    assert smaller.shape == zeroed.shape == (2, 5)
    if not any(leaf.inexact for leaf in removal):
        scale = float(zeroed.abs().max())
        assert math.isfinite(scale)
        assert float((smaller - zeroed).abs().max()) <= TOLERANCE * scale
        if has_free_dimension(next(iter(program.graph.nodes)).meta["val"]):
            more = program.run(Inputs((torch.cat((x, x[:1])),)))
            assert float((more[:2] - smaller).abs().max()) <= TOLERANCE * scale
    return len(removal)


@pytest.mark.parametrize(
    "seed", [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, NETWORKS))]
)
def test_network(seed: int) -> None:
    program, x = traced(seed)
    for mask in range(4):
        compare(program, x, mask, exact=mask < 3)


def test_networks_take_every_step() -> None:
    taken = collections.Counter(kind for seed in range(150) for kind in build(seed)[0].kinds)
    public = {name for name in vars(RandomNet) if not name.startswith("_")}
    assert public - taken.keys() == {"forward", "take", "own", "some_width", "conv", "activation", "features"}
    assert min(taken.values()) >= 5
    assert {kind for seed in range(QUICK) for kind in build(seed)[0].kinds} >= taken.keys()


def test_networks_have_something_to_remove() -> None:
    counts = []
    for seed in range(20):
        program, x = traced(seed)
        counts.append(compare(program, x, seed, exact=False))
    assert sum(count > 0 for count in counts) >= 18
    assert sum(counts) >= 40
