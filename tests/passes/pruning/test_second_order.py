"""Second-order elimination against numpy's least squares with columns removed, and against exact Jacobians."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lobo_fx
from lobo_fx.axes import Axis, Inference
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import layers
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.passes import PruneChannels
from lobo_fx.passes.pruning.criteria import CRITERIA, SecondOrder, resolve
from lobo_fx.passes.pruning.second_order import Elimination, eliminations, output_weights

Rows = np.ndarray[Any, Any]
SIZE = 7
"""Positions of the axis in each network here."""


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-4, abs=1e-9)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(rows: int, columns: int) -> torch.Tensor:
    """Rows about a mean that is not zero, whose columns are alike."""
    return draw(rows, columns) @ (torch.eye(columns) + 0.5 * draw(columns, columns, seed=1)) + 1


class Readers(nn.Module):
    """Linear layers that read one hidden axis."""

    def __init__(self, *outputs: int) -> None:
        super().__init__()
        self.hidden: Any = nn.Linear(5, SIZE)
        self.readers: Any = nn.ModuleList(nn.Linear(SIZE, width) for width in outputs)

    def inside(self, x: torch.Tensor) -> list[Rows]:
        return [self.hidden(x).tanh().detach().numpy()[None]] * len(self.readers)

    @property
    def matrices(self) -> list[Rows]:
        return [reader.weight.detach().numpy()[None] for reader in self.readers]

    def forward(self, x: torch.Tensor) -> Any:
        inside = self.hidden(x).tanh()
        return tuple(reader(inside) for reader in self.readers)


class Swapped(Readers):
    """Weights stored as inputs × outputs."""

    def __init__(self) -> None:
        super().__init__(4)
        self.weight = nn.Parameter(self.readers[0].weight.detach().T.contiguous())

    def forward(self, x: torch.Tensor) -> Any:
        return F.linear(self.hidden(x).tanh(), self.weight.t())


class Beside(Readers):
    """The layer reads other inputs beside the axis."""

    def __init__(self) -> None:
        super().__init__(4)
        self.out = nn.Linear(SIZE + 5, 4)

    def inside(self, x: torch.Tensor) -> list[Rows]:
        return [torch.cat([self.hidden(x).tanh(), x], 1).detach().numpy()[None]]

    @property
    def matrices(self) -> list[Rows]:
        return [self.out.weight.detach().numpy()[None]]

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(torch.cat([self.hidden(x).tanh(), x], 1))


class Windows(nn.Module):
    """A convolution reads the axis through a window."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, SIZE, 1), nn.Conv2d(SIZE, 3, (2, 3), stride=2, padding=1)

    def inside(self, x: torch.Tensor) -> list[Rows]:
        windows = F.unfold(self.first(x).tanh(), (2, 3), stride=2, padding=1)
        return [windows.mT.flatten(0, 1).detach().numpy()[None]]

    @property
    def matrices(self) -> list[Rows]:
        return [self.second.weight.detach().flatten(1).numpy()[None]]

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x).tanh())


class Spread(nn.Module):
    """A linear layer reads each channel at several places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, SIZE, 3), nn.Linear(4 * SIZE, 3)

    def inside(self, x: torch.Tensor) -> list[Rows]:
        return [self.first(x).tanh().flatten(1).detach().numpy()[None]]

    @property
    def matrices(self) -> list[Rows]:
        return [self.second.weight.detach().numpy()[None]]

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x).tanh().flatten(1))


class Experts(nn.Module):
    """A matrix per group, all over one hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(draw(3, 5, SIZE, seed=2) / 2), nn.Parameter(draw(3, SIZE, 4, seed=3))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.unsqueeze(0).expand(3, -1, -1), self.into).tanh()

    def inside(self, x: torch.Tensor) -> list[Rows]:
        return [self.hidden(x).detach().numpy()]

    @property
    def matrices(self) -> list[Rows]:
        return [self.out.detach().mT.numpy()]

    def forward(self, x: torch.Tensor) -> Any:
        return torch.bmm(self.hidden(x), self.out).sum(0)


NETWORKS: dict[str, tuple[Callable[[], Any], torch.Tensor]] = {
    "linear": (lambda: Readers(4), skewed(200, 5)),
    "two readers": (lambda: Readers(4, 3), skewed(200, 5)),
    "beside other inputs": (Beside, skewed(200, 5)),
    "swapped": (Swapped, skewed(200, 5)),
    "convolution with a window": (Windows, draw(40, 2, 7, 6) + 1),
    "linear over places": (Spread, draw(200, 2, 4, 4) + 1),
    "grouped experts": (Experts, skewed(200, 5)),
}


def analysed(model: nn.Module, data: torch.Tensor) -> tuple[Inference, Context, torch.Tensor]:
    """Axes of a network, its context, and the rows that fits see."""
    program = lobo_fx.trace(model.eval(), data[:2])
    context = Context(program.signature, calibration_data=[data], show_progress=False)
    return Inference(program).run(), context, torch.cat([inputs.leaves[0] for inputs in context.fitting_batches()])


def the_axis(found: Iterable[tuple[Axis, Elimination | None]], size: int = SIZE) -> Elimination:
    """What was found of the one axis."""
    (entry,) = (entry for leaf, entry in found if leaf.size == size)
    assert entry is not None
    return entry


def damped(rows: Rows) -> Rows:
    """Second moments of centred rows, shrunk by how few they are (OAS)."""
    count, columns = rows.shape
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    sums = centred.T @ centred
    trace = np.trace(sums)
    square = np.square(sums).sum()
    share = min(1.0, (square + trace**2) / ((count + 1) * (square - trace**2 / columns)))
    shrunk: Rows = ((1 - share) * sums + share * trace / columns * np.eye(columns)) / count
    return shrunk


class Oracle:
    """Errors of a network's readers with positions left out, by numpy's least squares on rows that have the moments."""

    def __init__(self, model: Any, rows: torch.Tensor, weights: Sequence[Rows] | None = None) -> None:
        self.problems: list[tuple[Rows, Rows, Rows]] = []
        for at, (inside, matrices) in enumerate(zip(model.inside(rows), model.matrices, strict=True)):
            moments = [damped(group) for group in inside]
            energy = sum(np.trace(m @ s @ m.T) for m, s in zip(matrices.astype(np.float64), moments, strict=True))
            for group, (matrix, sums) in enumerate(zip(matrices.astype(np.float64), moments, strict=True)):
                ridge = 1e-3 * np.trace(sums) / len(sums)
                factor = np.linalg.cholesky(sums + ridge * np.eye(len(sums))).T
                own = np.trace(matrix @ sums @ matrix.T) if model.__class__ is Experts else energy
                counts = np.full(len(matrix), 1 / own) if weights is None else weights[at][group]
                self.problems.append((factor, matrix, counts))

    def solution(self, gone: Sequence[int]) -> tuple[float, list[Rows]]:
        """The error of the best weights without some positions, and these weights."""
        error, found = 0.0, []
        for factor, matrix, counts in self.problems:
            each = matrix.shape[1] // SIZE
            left = [at for at in range(matrix.shape[1]) if at // each not in gone]
            best = np.zeros_like(matrix)
            if left:
                best[:, left] = np.linalg.lstsq(factor[:, left], factor @ matrix.T, rcond=None)[0].T
            error += float((np.square(factor @ (matrix - best).T).sum(0) * counts).sum())
            found.append(best)
        return error, found


@pytest.mark.parametrize("name", NETWORKS)
def test_errors_are_those_of_least_squares_without_the_positions(name: str) -> None:
    make, data = NETWORKS[name]
    model = make()
    inference, context, rows = analysed(model, data)
    found, oracle = the_axis(eliminations(inference, context)), Oracle(model, rows)
    order = found.order.tolist()
    assert sorted(order) == list(range(SIZE))
    expected = [oracle.solution(order[:gone])[0] for gone in range(SIZE + 1)]
    assert found.errors.tolist() == near(expected)
    single = [oracle.solution([position])[0] for position in range(SIZE)]
    assert order[0] == int(np.argmin(single))
    second = [oracle.solution([order[0], p])[0] if p != order[0] else np.inf for p in range(SIZE)]
    assert order[1] == int(np.argmin(second))


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_halfway_are_those_of_least_squares(name: str) -> None:
    make, data = NETWORKS[name]
    model = make()
    inference, context, rows = analysed(model, data)
    found, oracle = the_axis(eliminations(inference, context)), Oracle(model, rows)
    assert found.halfway == (SIZE + 1) // 2
    _, expected = oracle.solution(found.order[: SIZE - found.halfway].tolist())
    weights = [weight.numpy() for weight in found.weights.values()]
    assert len(weights) == len(model.matrices)
    if name == "grouped experts":
        assert weights[0].shape == (3, SIZE, 4)
        weights = [group.T for group in weights[0]]
    for weight, matrix in zip(weights, expected, strict=True):
        assert weight.reshape(matrix.shape) == pytest.approx(matrix, abs=2e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_count_as_much_as_is_said(name: str) -> None:
    make, data = NETWORKS[name]
    model = make()
    inference, context, rows = analysed(model, data)
    readers = [layer.node for layer in layers(inference.program.graph)][-len(model.matrices) :]
    given = [draw(*matrix.shape[:2], seed=9 + at).abs() for at, matrix in enumerate(model.matrices)]
    weights: dict[fx.Node, torch.Tensor] = {layer.node: torch.ones(64) for layer in layers(inference.program.graph)}
    weights |= {node: counts.flatten() for node, counts in zip(readers, given, strict=True)}
    found = the_axis(eliminations(inference, context, weights))
    oracle = Oracle(model, rows, [counts.double().numpy() for counts in given])
    order = found.order.tolist()
    expected = [oracle.solution(order[:gone])[0] for gone in range(SIZE + 1)]
    assert found.errors.tolist() == near(expected)


@pytest.mark.parametrize("name", ["linear", "convolution with a window"])
def test_the_order_is_near_the_best_of_all_sets(name: str) -> None:
    make, data = NETWORKS[name]
    model = make()
    inference, context, rows = analysed(model, data)
    found, oracle = the_axis(eliminations(inference, context)), Oracle(model, rows)
    for gone in range(1, SIZE):
        best = min(oracle.solution(chosen)[0] for chosen in itertools.combinations(range(SIZE), gone))
        assert best * (1 - 1e-6) <= float(found.errors[gone]) <= 1.25 * best


def test_scores_rank_as_positions_go() -> None:
    model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 5))
    inference, context, _ = analysed(model, skewed(400, 6))
    found = the_axis(eliminations(inference, context), 80)
    assert found.scores.argsort().tolist() == found.order.tolist()
    assert len(set(found.scores.tolist())) == 80
    assert bool((found.errors.diff() >= 0).all())
    assert (len(found.errors), float(found.errors[0])) == (81, 0.0)


def test_a_position_that_another_one_equals_goes_first_and_costs_next_to_nothing() -> None:
    model = Readers(4)
    with torch.no_grad():
        for parameter in (model.hidden.weight, model.hidden.bias):
            parameter *= 4  # so that none is nearly a sum of others
            parameter[5] = parameter[2]
        model.readers[0].weight[:, [2, 5]] *= 2  # large: no magnitude would choose them
    inference, context, _ = analysed(model, draw(4096, 5))
    found = the_axis(eliminations(inference, context))
    assert int(found.order[0]) in (2, 5)
    assert float(found.errors[1]) < 0.005 * float(found.errors[-1])


class Pairs(nn.Module):
    """Hidden units 8 to 15 are what 0 to 7 are; the last four pairs are read with large weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(12, 16), nn.Linear(16, 6)
        with torch.no_grad():
            self.hidden.weight[8:], self.hidden.bias[8:] = self.hidden.weight[:8], self.hidden.bias[:8]
            self.out.weight[:, [4, 5, 6, 7, 12, 13, 14, 15]] *= 3

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.hidden(x).tanh())


def test_as_a_criterion_it_keeps_one_of_each_pair_where_l2_keeps_both() -> None:
    model, data = Pairs().eval(), draw(4096, 12)
    decibels, kept = {}, {}
    for importance in ("l2", "second_order"):
        pruning = PruneChannels(0.5, importance=importance, round_to=1)
        given: dict[str, Any] = {"example_inputs": data[:2], "calibration_data": [data], "progress": False}
        result = lobo_fx.compile(model, [pruning], **given)
        fresh = draw(128, 12, seed=5)
        decibels[importance] = signal_to_noise(model(fresh), result.module(fresh))
        kept[importance] = {int(at) for at in result.kept_indices["hidden.bias"][0]}
    assert {at % 8 for at in kept["second_order"]} == set(range(8))
    assert len({at % 8 for at in kept["l2"]}) < 6
    assert decibels["second_order"] > 40
    assert decibels["second_order"] > decibels["l2"] + 20


def test_it_has_a_name_and_asks_for_data() -> None:
    assert CRITERIA["second_order"] == resolve("second_order") == SecondOrder()
    model, data = Pairs().eval(), draw(8, 12)
    with pytest.raises(lobo_fx.InvalidInput, match="prune_channels needs calibration_data="):
        lobo_fx.compile(model, [PruneChannels(0.5, importance="second_order")], example_inputs=data, progress=False)


class Summed(nn.Module):
    """No layer reads the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Linear(6, 8), nn.Parameter(draw(8, seed=4))

    def forward(self, x: torch.Tensor) -> Any:
        return (self.first(x) * self.each).square().sum(1, keepdim=True)


def test_where_no_layer_reads_an_axis_it_is_l2() -> None:
    data = draw(64, 6)
    inference, context, _ = analysed(Summed(), data)
    assert [found for _, found in eliminations(inference, context)] == [None]
    plans = [
        PruneChannels(0.5, importance=name, round_to=1).plan_for(inference.program.clone(), context)
        for name in ("second_order", "l2")
    ]
    assert plans[0].cuts
    assert [cut.kept for cut in plans[0].cuts] == [cut.kept for cut in plans[1].cuts]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> Any:
        inside = self.second(self.first(x).tanh()).sigmoid().mean((2, 3))
        return inside, self.out(inside)


def exact_weights(after: Callable[[torch.Tensor], Any], inside: torch.Tensor, signal: float, dim: int) -> torch.Tensor:
    """The energy of the Jacobian's columns, by channel (and group), from its whole."""
    found: Any = torch.func.jacrev(after)(inside)
    parts = [part.detach() for part in (found if isinstance(found, tuple) else (found,))]
    total = torch.zeros(inside.shape)
    for part in parts:
        total += part.square().sum(list(range(part.dim() - inside.dim())))
    return total.sum([at for at in range(inside.dim()) if at not in ((dim,) if dim >= 0 else (0, 2))]) / signal


def signal_of(outputs: Sequence[torch.Tensor]) -> float:
    return sum(float((y - y.mean(0)).square().sum().detach()) for y in outputs)


def held_out(context: Context) -> torch.Tensor:
    return torch.cat([inputs.leaves[0] for inputs in context.held_out_batches()])


def test_weights_of_outputs_are_the_energies_of_an_exact_jacobian() -> None:
    model, data = Images().eval(), draw(64, 2, 4, 4)
    inference, context, _ = analysed(model, data)
    found = list(output_weights(inference.program, context, probes=600).values())
    x = held_out(context)
    signal = signal_of(model(x))

    def after_second(value: torch.Tensor) -> Any:
        inside = value.sigmoid().mean((2, 3))
        return inside, model.out(inside)

    expected = [
        exact_weights(lambda value: after_second(model.second(value.tanh())), model.first(x).detach(), signal, 1),
        exact_weights(after_second, model.second(model.first(x).tanh()).detach(), signal, 1),
        torch.full((2,), len(x) / signal),
    ]
    assert [tuple(weights.shape) for weights in found] == [(4,), (3,), (2,)]
    for weights, exact in zip(found, expected, strict=True):
        assert weights.numpy() == pytest.approx(exact.numpy(), rel=0.05)


def test_weights_of_outputs_of_experts_are_those_of_each_group() -> None:
    model, data = Experts().eval(), skewed(64, 5)
    inference, context, _ = analysed(model, data)
    into, out = output_weights(inference.program, context, probes=600).values()
    x = held_out(context)
    signal = signal_of([model(x)])
    inside = torch.bmm(x.expand(3, -1, -1), model.into).detach()
    exact = exact_weights(lambda value: torch.bmm(value.tanh(), model.out).sum(0), inside, signal, -1)
    assert into.view(3, SIZE).numpy() == pytest.approx(exact.numpy(), rel=0.05)
    assert out.numpy() == pytest.approx(np.full(12, len(x) / signal), rel=0.05)
    assert float(the_axis(eliminations(inference, context, output_weights(inference.program, context))).errors[-1]) > 0


def test_wide_layers_in_single_precision_are_as_those_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(256, 6)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5))
    found: list[Elimination] = []
    for wide in (1024, 8):
        monkeypatch.setattr("lobo_fx.passes.pruning.second_order._WIDE", wide)
        inference, context, _ = analysed(model, data)
        found.append(the_axis(eliminations(inference, context), 24))
    double, single = found
    assert double.order[:12].tolist() == single.order[:12].tolist()
    torch.testing.assert_close(single.errors, double.errors, rtol=1e-3, atol=1e-6)
