"""Moments of what weights are multiplied with, against numpy and cells run step by step; what they cost in memory."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.passes.fitting import layer_grams
from lobo_fx.passes.fitting.gram import Gram, RowsOrSums
from lobo_fx.passes.fitting.layer_grams import Role, collect_energies, collect_grams, roles_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grams(model: nn.Module, x: torch.Tensor) -> dict[str, Gram]:
    """By the name of the weight; nothing is held out of a single row of batches of the program's size."""
    program = lobo_fx.trace(model.eval(), x, dynamic_shapes=None)
    context = Context(program.signature, calibration_data=[x], show_progress=False)
    roles = [role for read in program.graph.find_nodes(op="get_attr") for role in roles_of(read)]
    found = collect_grams(program, roles, context)
    return {str(role.read.target): gram for role, gram in found.items()}


def squares(rows: Any) -> Any:
    flat = np.asarray(rows.detach().double()).reshape(-1, rows.shape[-1])
    return flat.T @ flat


CELLS = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


@pytest.mark.parametrize(("kind", "first"), [(nn.LSTM, True), (nn.LSTM, False), (nn.GRU, True), (nn.RNN, False)])
def test_recurrent_weights_are_multiplied_with_inputs_and_with_states(kind: Any, first: bool) -> None:
    torch.manual_seed(0)
    layer, x = kind(6, 5, batch_first=first, bidirectional=True), draw(3, 7, 6)
    found = grams(layer, x)
    steps = x.transpose(0, 1) if first else x
    for suffix, order in (("", range(len(steps))), ("_reverse", reversed(range(len(steps))))):
        cell = CELLS[kind](6, 5)
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        cell.load_state_dict({name: layer.get_parameter(f"{name}_l0{suffix}").detach() for name in names})
        state: Any = torch.zeros(steps.shape[1], 5)
        state = (state, state) if kind is nn.LSTM else state
        begun = []
        for step in order:
            begun.append(state[0] if kind is nn.LSTM else state)
            state = cell(steps[step], state)
        np.testing.assert_allclose(found[f"weight_ih_l0{suffix}"].sums[0], squares(x), rtol=1e-5)
        np.testing.assert_allclose(found[f"weight_hh_l0{suffix}"].sums[0], squares(torch.stack(begun)), rtol=1e-4)
    assert not np.allclose(found["weight_hh_l0"].sums, found["weight_hh_l0_reverse"].sums, rtol=1e-2)


def test_a_linear_layer_after_a_convolution_has_its_own_moments() -> None:
    """Their sizes are the same: eight columns each."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(8, 4)), draw(2, 8, 8)
    found = grams(model, x)
    np.testing.assert_allclose(found["0.weight"].sums[0], squares(x.transpose(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["1.weight"].sums[0], squares(model[0](x)), rtol=1e-5)
    assert not np.allclose(found["0.weight"].sums, found["1.weight"].sums, rtol=1e-2)


def test_two_layers_that_read_the_same_share_their_moments() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 4), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(x) + self.c(self.a(x))

    found = grams(Branches(), draw(9, 6))
    assert found["a.weight"] is found["b.weight"]
    assert found["c.weight"] is not found["a.weight"]


def test_energies_are_the_diagonal() -> None:
    model, x = nn.LSTM(6, 5), draw(7, 3, 6)
    program = lobo_fx.trace(model.eval(), x, dynamic_shapes=None)
    roles = [role for read in program.graph.find_nodes(op="get_attr") for role in roles_of(read)]
    energies = collect_energies(program, roles, [program.example_inputs])
    for role, gram in ((role, grams(model, x)[str(role.read.target)]) for role in energies):
        np.testing.assert_allclose(energies[role], gram.energy / gram.count, rtol=1e-9)
    assert {str(role.read.target) for role in energies} == {"weight_ih_l0", "weight_hh_l0"}


def test_projected_states_and_swapped_weights_have_none() -> None:
    assert set(grams(nn.LSTM(6, 5, proj_size=3), draw(7, 3, 6))) == {"weight_ih_l0", "weight_hh_l0"}
    assert grams(nn.ConvTranspose1d(6, 3, 3), draw(2, 6, 9)) == {}


# --- few rows, many columns --------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "is_sum"), [(19, False), (20, True), (30, True)])
def test_rows_are_kept_while_they_are_fewer_than_columns(count: int, is_sum: bool) -> None:
    rows, gathered = draw(2, count, 20), RowsOrSums()
    for part in torch.split(rows, 7, 1):
        gathered.add(part)
    found = gathered.gram
    assert (found.is_sum, found.count) == (is_sum, count)
    assert found.values.shape == (2, 20 if is_sum else count, 20)
    for group in range(2):
        np.testing.assert_allclose(found.sums[group], squares(rows[group]), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.energy[group], squares(rows[group]).diagonal(), rtol=1e-6)


def test_moments_add_and_divide_as_their_sums_do() -> None:
    few, more, factor = draw(1, 5, 20), draw(1, 30, 20, seed=1), draw(20, seed=2).abs() + 0.1
    for a, b in itertools.product((few, more), repeat=2):
        both = Gram.of_rows(a) + Gram.of_rows(b)
        np.testing.assert_allclose(both.sums[0], squares(a) + squares(b), rtol=1e-6, atol=1e-9)
        assert both.count == a.shape[1] + b.shape[1]
    for rows in (few, more):
        np.testing.assert_allclose(Gram.of_rows(rows).over(factor).sums[0], squares(rows / factor), rtol=1e-4)


def test_of_rows_beyond_the_bound_a_random_choice_is_kept() -> None:
    """Each row of four batches is as likely to stay as any other."""
    generator, kept = torch.Generator().manual_seed(0), torch.zeros(80)
    for _ in range(400):
        gathered = RowsOrSums(8)
        for batch in torch.split(torch.arange(80.0), 20):
            chosen, priority = gathered.draw(20, generator)
            assert len(chosen) == 8
            gathered.add(batch[chosen].view(1, -1, 1), priority)
        found = gathered.gram
        assert (found.is_sum, found.count) == (False, 8)
        kept[found.values.flatten().long()] += 1
    assert kept.sum() == 400 * 8
    assert kept.min() > 15  # 40 expected, a deviation of 6
    assert kept.max() < 65


def test_wide_layers_take_no_more_memory_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(64, 4)), draw(500, 64)
    assert grams(model, x)["0.weight"].is_sum
    monkeypatch.setattr(layer_grams, "_BYTES", 8 * 64 * 20)
    found = grams(model, x)["0.weight"]
    assert (found.is_sum, found.count) == (False, 20)
    rows = x.double().numpy()
    for row in found.values[0].numpy():
        assert np.abs(rows - row).max(1).min() == 0
    program = lobo_fx.trace(model, x)
    (role,) = roles_of(next(n for n in program.graph.find_nodes(op="get_attr") if "weight" in str(n.target)))
    assert isinstance(role, Role)
    assert layer_grams.bytes_of(role) == 8 * 64 * 20
