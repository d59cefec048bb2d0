"""What widths lose, by the model, against real removals and numpy's least squares."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import members
from lobo_fx.axes.surgery import zeroed
from lobo_fx.contracts.context import Context
from lobo_fx.graph.running import Runner
from lobo_fx.passes.goal.loss_model import LossModel, Noise, added
from lobo_fx.passes.pruning.second_order import Elimination, eliminations, output_weights


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measured(model: nn.Module, data: Any) -> tuple[LossModel, Inference, Context, Noise]:
    program = lobo_fx.trace(model.eval(), data[:2])
    context = Context(program.signature, calibration_data=[data], show_progress=False)
    noise = Noise(program, context.held_out_batches(10_000))
    inference = Inference(program).run()
    return LossModel.measure(inference, context, noise, members(inference)), inference, context, noise


def rows_of(context: Context, held_out: bool) -> torch.Tensor:
    return torch.cat([inputs.leaves[0] for inputs, part in context.split_batches() if part is held_out])


def test_widths_of_a_linear_network_lose_what_a_removal_and_a_refit_lose() -> None:
    first, second = nn.Linear(12, 8), nn.Linear(8, 6)
    data = draw(2048, 12) @ (torch.eye(12) + 0.3 * draw(12, 12, seed=1)) + 1
    found, _, context, _ = measured(nn.Sequential(first, second), data)
    (leaf,) = found.leaves
    fit, judge = (first(rows_of(context, part)).detach().double().numpy() for part in (False, True))
    weight, bias = second.weight.detach().double().numpy(), second.bias.detach().double().numpy()
    expected = []
    for width in range(1, 9):
        kept = found.scores[leaf].argsort(descending=True)[:width].numpy()
        columns = np.c_[fit[:, kept], np.ones(len(fit))]
        solution = np.linalg.lstsq(columns, fit @ weight.T + bias, rcond=None)[0]
        y = judge @ weight.T + bias
        errors = np.c_[judge[:, kept], np.ones(len(judge))] @ solution - y
        expected.append(float(np.square(errors).sum() / np.square(y - y.mean(0)).sum()))
    losses = found.losses[leaf].tolist()
    assert losses[8] == 0
    assert losses[4] == pytest.approx(added(expected[3]), rel=0.02)
    shares = [noise / expected[3] for noise in expected[:7]]  # what is measured is the height, at half of the width
    assert [loss / losses[4] for loss in losses[1:8]] == pytest.approx(shares, rel=0.1, abs=0.02)


def eliminated(inference: Inference, context: Context) -> dict[Axis, Elimination]:
    """Eliminations of the axes that layers read."""
    found = eliminations(inference, context, output_weights(inference.program, context))
    return {leaf: entry for leaf, entry in found if entry is not None}


class Reader(nn.Module):
    """Layers of all sorts, in a row; the groups themselves are an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 2, stride=2)
        self.into, self.out = nn.Parameter(draw(2, 10, 8, seed=2) / 3), nn.Parameter(draw(2, 8, 4, seed=3) / 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(self.first(x).relu()).tanh().mean((2, 3))
        return torch.bmm(torch.bmm(x.expand(2, -1, -1), self.into).relu(), self.out).sum(0)


def test_losses_fall_as_widths_rise_for_every_kind_of_layer() -> None:
    found, inference, context, _ = measured(Reader(), draw(256, 3, 8, 8) + 0.5)
    assert sorted(leaf.size for leaf in found.leaves) == [2, 8, 10, 12]
    for leaf in found.leaves:
        losses = found.losses[leaf].tolist()
        assert len(losses) == leaf.size + 1
        assert losses[-1] == 0 < losses[1] < math.inf
        assert all(narrow >= wide for narrow, wide in itertools.pairwise(losses))
        assert len(found.scores[leaf]) == leaf.size
    for leaf, entry in eliminated(inference, context).items():
        assert found.scores[leaf].tolist() == entry.scores.tolist()


class Experts(nn.Module):
    """Its last layer is a product with a matrix per group, whose outputs have no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(draw(2, 6, 8, seed=2) / 2), nn.Parameter(draw(2, 8, 4, seed=3))

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.expand(2, -1, -1), self.into).tanh()

    def forward(self, x: torch.Tensor) -> Any:
        return torch.bmm(self.inside(x), self.out).sum(0)


def test_the_height_is_what_the_network_loses_with_the_layer_replaced() -> None:
    model = Experts()
    found, inference, context, _ = measured(model, draw(512, 6) + 1)
    ((leaf, entry),) = eliminated(inference, context).items()
    (weight,) = entry.weights.values()
    x = rows_of(context, held_out=True)
    with torch.no_grad():
        errors = torch.bmm(model.inside(x), weight - model.out)
        errors = (errors - errors.mean(1, keepdim=True)).sum(0)
        y = model(x)
    expected = float(errors.square().sum() / (y - y.mean(0)).square().sum())
    assert float(found.losses[leaf][entry.halfway]) == pytest.approx(added(expected), rel=1e-3)


class Summed(nn.Module):
    """No layer reads the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Linear(6, 8), nn.Parameter(draw(8, seed=4))

    def forward(self, x: torch.Tensor) -> Any:
        return (self.first(x) * self.each).square().sum(1, keepdim=True)


def test_an_axis_that_no_layer_reads_loses_what_zeros_lose() -> None:
    model = Summed()
    found, _, context, _ = measured(model, draw(128, 6))
    (leaf,) = found.leaves
    energy = model.first.weight.square().sum(1) + model.first.bias.square() + model.each.square()
    assert found.scores[leaf].tolist() == pytest.approx(energy.tolist(), rel=1e-6)
    x = rows_of(context, held_out=True)
    with torch.no_grad():
        gone = energy.argsort()[:4]
        parts = (model.first(x) * model.each).square()
        y = parts.sum(1)
        expected = float(parts[:, gone].sum(1).square().sum() / (y - y.mean()).square().sum())
    assert float(found.losses[leaf][4]) == pytest.approx(added(expected), rel=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(found.losses[leaf].tolist()))


def test_noise_is_a_share_of_the_variance_over_all_batches() -> None:
    layer = nn.Linear(4, 3)
    model = nn.Sequential(layer).eval()
    program = lobo_fx.trace(model, draw(2, 4))
    data = [draw(5, 4), draw(3, 4, seed=1) + 2]
    noise = Noise(program, [program.signature.bind_batch(batch) for batch in data])
    assert noise(program) == 0
    other = program.clone()
    with torch.no_grad():
        other.module.get_parameter("0.weight")[1] *= 2
        y = model(torch.cat(data)).double()
        error = y[:, 1] - layer.bias[1]
    assert noise(other) == pytest.approx(float(error.square().sum() / (y - y.mean(0)).square().sum()), rel=1e-5)
    with torch.no_grad():
        other.module.get_parameter("0.bias")[0] = math.nan
    assert noise(other) == noise.of(Runner(other.module)) == math.inf


def test_noise_adds_up_by_how_much_is_left() -> None:
    assert added(0.0) == 0
    assert added(0.2) == pytest.approx(0.25)
    assert added(5.0) == 100
    assert added(math.inf) == math.inf


class TwoOutputs(nn.Module):
    """One output is a million times as large as the other."""

    def forward(self, x: torch.Tensor) -> Any:
        return x[:, :3], 1e6 * x[:, 3:]


def test_outputs_count_alike_however_large_they_are() -> None:
    x = draw(64, 6)
    program = lobo_fx.trace(TwoOutputs().eval(), x[:2])
    noise = Noise(program, [program.signature.bind((x,), {})])

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x[:, :3] * 1.1, 1e6 * x[:, 3:]

    wrong = lobo_fx.trace(Wrong().eval(), x[:2])
    small = x[:, :3].double()
    share = float((0.1 * small).square().sum() / (small - small.mean(0)).square().sum())
    assert noise(wrong) == pytest.approx(share / 2, rel=1e-5)
    assert noise(program) == 0


class Masked(nn.Module):
    """Two of its outputs are minus infinity, as those of forbidden tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x)
        return torch.cat([y, torch.full_like(y[:, :2], -torch.inf)], 1)


def test_outputs_that_are_infinite_do_not_hide_the_loss_of_the_others() -> None:
    torch.manual_seed(0)
    masked, data = Masked(), draw(512, 6)
    found, plain = (measured(model, data)[0] for model in (masked, masked.net))
    ((_, of_masked),), ((_, of_plain),) = found.losses.items(), plain.losses.items()
    assert float(of_masked[4]) == pytest.approx(float(of_plain[4]), rel=1e-5)  # the width whose loss is measured
    torch.testing.assert_close(of_masked, of_plain, rtol=0.1, atol=0)
    assert float(of_masked[1]) > 0.1


def test_noise_where_the_original_is_infinite_is_infinite_unless_it_is_the_same() -> None:
    program, other = (lobo_fx.trace(model.eval(), draw(2, 6)) for model in (Masked(), nn.Linear(6, 7)))
    noise = Noise(program, [program.example_inputs])
    assert noise(program) == 0
    assert noise(other) == math.inf


@pytest.mark.parametrize("reads", [nn.Linear, nn.Identity])
def test_an_axis_with_more_than_half_of_its_positions_dead_still_loses_by_the_others(reads: Any) -> None:
    torch.manual_seed(0)
    first = nn.Linear(6, 16)
    with torch.no_grad():
        first.weight[:10], first.bias[:10] = 0, -0.01
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 4)) if reads is nn.Linear else Summing(first)
    found = measured(model, draw(512, 6))[0]
    ((_, losses),) = found.losses.items()
    assert float(losses[1]) > 0.1
    assert float(losses[6]) < 0.1 * float(losses[1])


class Summing(nn.Module):
    """No layer reads the axis."""

    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> Any:
        return self.first(x).relu().sum(1)


def test_positions_are_zeroed_for_a_while_only() -> None:
    """The program is no copy; not even what goes wrong meanwhile leaves zeros behind."""
    program = lobo_fx.trace(Summed().eval(), draw(16, 6))
    inference = Inference(program).run()
    (leaf,) = members(inference)
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}

    def fail() -> None:
        with zeroed(inference, {leaf: torch.arange(leaf.size) < 3}):
            found = program.module.state_dict()
            assert not found["each"][3:].any()
            assert torch.equal(found["first.weight"][:3], before["first.weight"][:3])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    for name, tensor in program.module.state_dict().items():
        assert torch.equal(tensor, before[name])
