"""Whatever data a pass runs, the buffers that the model writes in forward are as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.graph.running import written_buffers


class Averages(nn.Module):
    """Keeps a running mean of its activations, a count of its calls, and the last value in a part of a buffer."""

    mean: torch.Tensor
    calls: torch.Tensor
    last: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.register_buffer("mean", torch.ones(16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(2, 3))
        self.register_buffer("shift", torch.ones(16))

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x) + self.get_buffer("shift")
        self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
        self.calls += 1
        self.last[0].copy_(hidden[0, :3])
        return self.second((hidden * self.mean).relu())


PASSES = (
    passes.PruneChannels(0.5),
    passes.PruneChannels(0.5, importance="taylor"),
    passes.PruneChannels(0.5, importance="second_order"),
    passes.SmoothActivations(),
    passes.QuantizeStatic(kernels="all"),
    passes.QuantizeStatic(kernels="all", rounding="compensated"),
    passes.QuantizeWeights("int4"),
    passes.Factorize(0.5),
)


@pytest.mark.parametrize("pass_", PASSES, ids=str)
def test_buffers_are_as_they_were(pass_: lobo_fx.Pass) -> None:
    torch.manual_seed(0)
    model, data = Averages(), [(torch.randn(3, 6), torch.tensor([0, 1, 2])) for _ in range(3)]
    result = lobo_fx.compile(
        model,
        [pass_],
        example_inputs=data[0][0],
        calibration_data=[x for x, _ in data],
        train_data=data,
        loss_fn=nn.functional.cross_entropy,
        progress=False,
    )
    for name in written_buffers(result.program.graph):
        kept = result.module.get_buffer(name)
        before = model.get_buffer(name)
        assert torch.equal(kept, before if kept.shape == before.shape else torch.ones_like(kept))


def test_buffers_that_are_written_through_views_are_known() -> None:
    program = lobo_fx.trace(Averages(), torch.randn(3, 6))
    assert sorted(written_buffers(program.graph)) == ["calls", "last", "mean"]
