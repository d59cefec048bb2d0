"""Models that draw random numbers: compared on the same draws, or said not to be, and exported with a note."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import ContractError, ExportError
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.randomness import drawing, drawn, made_of_draws
from lobo_fx.passes import FoldBatchNorm, MixedPrecision, PruneChannels, QuantizeStatic
from lobo_fx.testing import check_pass

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Drawing(nn.Module):
    """Two linear layers, and in between what draws."""

    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.draw(self.norm(self.first(x))))
        return found


def attended(y: torch.Tensor, dropped: float = 0.5) -> torch.Tensor:
    y = y.view(-1, 1, 4, 4)
    return F.scaled_dot_product_attention(y, y, y, dropout_p=dropped).flatten(1)


def branched(y: torch.Tensor) -> torch.Tensor:
    chosen: torch.Tensor = torch.cond(y.sum() > 0, lambda y: y + torch.rand_like(y), lambda y: y.sin(), (y,))
    return chosen


Draw = Callable[[torch.Tensor], torch.Tensor]


@functools.cache
def traced(draw: Draw) -> Program:
    """With the weights that a network has that a test makes first, so that the trace is known there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lobo_fx.trace(Drawing(draw).eval(), X)


DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda y: y + torch.randn_like(y),
    "uniform": lambda y: y + torch.rand(y.shape[0], 16),
    "dropout": lambda y: F.dropout(y, 0.5, training=True),
    "bernoulli": lambda y: y * torch.bernoulli(torch.full_like(y, 0.5)),
    "multinomial": lambda y: y * torch.multinomial(y.softmax(1), 1),
    "attention": attended,
    "branch": branched,
}
QUIET: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "attention": lambda y: attended(y, 0.0),
    "leaky": lambda y: F.rrelu(y),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_draws_is_found_and_every_run_draws_the_same(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    program = traced(draw)
    assert len(drawing(program.module)) == 1
    before = torch.get_rng_state()
    assert torch.equal(program.run(), program.run())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(program.module(X), program.module(X)), "the user's own calls draw anew"


@pytest.mark.parametrize("draw", QUIET.values(), ids=QUIET)
def test_what_does_not_draw_in_inference_is_not_found(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    program = lobo_fx.trace(Drawing(draw).eval(), X)
    program.module.train()
    assert drawing(program.module) == []


def test_an_lstm_that_drops_draws_in_training_alone() -> None:
    program = lobo_fx.trace(nn.LSTM(8, 4, 2, dropout=0.5), X)
    assert drawing(program.module) == []


def test_two_draws_in_one_run_are_not_alike() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn_like(x), torch.randn_like(x)

    first, second = lobo_fx.trace(Two(), X).run()
    assert not torch.equal(first, second)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_an_exact_pass_is_checked_on_the_same_draws(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    result = check_pass(FoldBatchNorm(), Drawing(draw).eval(), X)
    assert result.report.rows[-1].snr > 100
    assert not result.report.notes


@dataclasses.dataclass(frozen=True)
class Liar(Pass):
    """Promises exactness and scales a bias."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        program.module.get_parameter("second.bias").data.mul_(1.5)
        return program


def test_a_broken_promise_is_seen_beside_draws() -> None:
    with pytest.raises(ContractError, match="promises exactness"):
        lobo_fx.compile(traced(DRAWS["normal"]), [Liar()], progress=False)


@dataclasses.dataclass(frozen=True)
class DrawMore(Liar):
    """Draws once more, and so moves every draw after it."""

    def run(self, program: Program, context: Context) -> Program:
        (node,) = program.graph.find_nodes(op="call_function", target=aten.randn_like.default)
        with program.graph.inserting_before(node):
            more = program.graph.call_function(aten.randn_like.default, node.args)
            zero = program.graph.call_function(aten.mul.Tensor, (more, 0))
        node.args = (program.graph.call_function(aten.add.Tensor, (zero, zero)),)
        node.prepend(node.args[0])
        program.module.recompile()
        return program


def test_other_draws_are_a_note_and_no_failure() -> None:
    result = lobo_fx.compile(traced(DRAWS["normal"]), [DrawMore()], progress=False)
    notes = [note for note in result.report.notes if "draws other random numbers" in note]
    assert {(note.made_by, note.operator) for note in notes} == {("draw_more", "aten.randn_like.default")}


class AtTheEnd(nn.Module):
    """Draws in the shape of its outputs, which no pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y + torch.randn_like(y)


def test_pruning_around_draws_is_checked_and_pruning_what_is_drawn_is_noted() -> None:
    around = check_pass(PruneChannels(0.5), AtTheEnd(), X)
    assert around.module.get_parameter("layers.0.weight").shape == (8, 8)
    assert not around.report.notes
    for steps in (1, 2):
        pass_ = PruneChannels(0.5, steps=steps, round_to=1)
        through = check_pass(pass_, Drawing(DRAWS["dropout"]).eval(), X)
        assert through.module.get_parameter("first.weight").shape == (8, 8)
        (note,) = [note for note in through.report.notes if "random" in note]
        assert note.operator == "aten.dropout.default"


def test_what_decides_the_draws() -> None:
    model = Drawing(DRAWS["normal"]).eval()
    assert drawn(lobo_fx.trace(model, X).module) == drawn(lobo_fx.trace(model, X[:2]).module) != ()
    wider = nn.Sequential(nn.Linear(8, 8), model).eval()
    assert drawn(lobo_fx.trace(wider, X).module) == drawn(lobo_fx.trace(model, X).module)
    assert drawn(lobo_fx.trace(model, X, dynamic_shapes=None).module) != drawn(lobo_fx.trace(model, X).module)


class HalfRandom(nn.Module):
    """One output that depends on a draw, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy, self.plain = Drawing(DRAWS["normal"]), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.noisy(x), self.plain(x)


def test_a_file_that_draws_says_so_and_is_compared_where_it_does_not(tmp_path: Path) -> None:
    result = lobo_fx.compile(HalfRandom().eval(), example_inputs=X, progress=False)
    random = made_of_draws(result.module)
    assert {node.name for node in random} == {"randn_like", "add", "linear_1", "output"}
    artifact = result.export(tmp_path / "model.onnx")
    assert 0 <= artifact.parity < 1e-5
    (note,) = result.report.notes
    assert (note.operator, note.module) == ("aten.randn_like.default", "noisy")
    assert "not compared" in note
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    runs = [session.run(None, {"x": X.numpy()}) for _ in range(2)]
    assert (runs[0][0] != runs[1][0]).any()
    assert (runs[0][1] == runs[1][1]).all()


def test_a_file_all_of_whose_outputs_are_random_has_no_parity(tmp_path: Path) -> None:
    result = lobo_fx.compile(traced(DRAWS["dropout"]), progress=False)
    assert math.isnan(result.export(tmp_path / "model.onnx").parity)
    assert "not compared" in str(result)
    loaded = lobo_fx.load(result.save(tmp_path / "saved"))
    assert math.isnan(loaded.report.artifacts["compiled"].parity)


@pytest.mark.parametrize(
    "pass_",
    [
        QuantizeStatic(kernels="all"),
        pytest.param(MixedPrecision(quantizer=QuantizeStatic(kernels="all")), marks=pytest.mark.slow),
    ],
)
def test_the_users_random_numbers_do_not_move(pass_: Pass, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    rows = torch.utils.data.TensorDataset(X)
    data: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    result = lobo_fx.compile(
        model, [pass_], example_inputs=X, calibration_data=data, evaluate=lambda _: float(torch.rand(1)), progress=False
    )
    result.export(tmp_path / "model.onnx", confirm=False)
    lobo_fx.load(result.save(tmp_path / "saved"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dropout", "bernoulli"])
def test_a_file_draws_as_the_model_does(name: str, tmp_path: Path) -> None:
    """ONNX Runtime leaves dropout out, even where it is to train; means and deviations over 400 runs agree."""
    result = lobo_fx.compile(traced(DRAWS[name]), progress=False)
    result.export(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = torch.stack([torch.from_numpy(session.run(None, {"x": X.numpy()})[0]) for _ in range(400)])
    expected = torch.stack([result.module(X).detach() for _ in range(400)])
    assert ((found.mean(0) - expected.mean(0)).abs() / expected.std(0)).max() < 0.35
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.25, atol=0)


def test_a_file_that_does_not_draw_is_refused(tmp_path: Path) -> None:
    result = lobo_fx.compile(traced(attended), progress=False)
    with pytest.raises(ExportError, match=r"scaled_dot_product_attention.* drops out in inference too"):
        result.export(tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
