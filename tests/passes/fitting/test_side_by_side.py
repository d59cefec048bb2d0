"""Two programs in step: what both draw at random is the same."""

from __future__ import annotations

import torch
from torch import nn

from lobo_fx.capture.tracing import trace
from lobo_fx.graph.running import Runner
from lobo_fx.passes.fitting.side_by_side import Pairs, side_by_side

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Noisy(nn.Module):
    """Adds noise, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        found: torch.Tensor = self.second(x + torch.randn_like(x))
        return found


def test_a_program_and_its_copy_draw_alike_and_move_nobodys_generator() -> None:
    program = trace(Noisy().eval(), ROWS)
    copy = program.clone()
    state = torch.get_rng_state()
    seen = []
    with torch.no_grad(), Pairs(program.graph, copy.graph, [([ROWS], False)] * 2) as pairs:
        runners = Runner(program.module), Runner(copy.module)
        for node in side_by_side(*runners, pairs, lambda node: node.name.startswith("linear_1"), "", False):
            twin = next(other for other in program.graph.nodes if other.name == node.name)
            seen += [(pair.before[twin], pair.after[node.all_input_nodes[0]]) for pair in pairs]
    noisy = [after for _, after in seen]
    original = [before for before, _ in seen]
    layer = program.module.get_submodule("second")
    for before, after in zip(original, noisy, strict=True):
        expected = torch.nn.functional.linear(after, *layer.parameters())
        assert torch.allclose(before, expected, atol=1e-6)
    assert not torch.equal(noisy[0], noisy[1]), "the twin: each batch draws its own"
    assert torch.equal(torch.get_rng_state(), state)
