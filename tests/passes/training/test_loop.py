"""The loop against one written out here, on any data, and interrupted in every way."""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.passes import FineTune, PruneWeights
from lobo_fx.passes.training import fine_tune, loop
from lobo_fx.passes.training.learning_rate import JUDGES, RATES, Found, length_of_trials
from lobo_fx.passes.training.objective import Objective
from lobo_fx.result import Result

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Weights = dict[str, torch.Tensor]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()


def with_statistics() -> nn.Module:
    """Dropout draws in every step, and a batch norm follows the data."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)).eval()


def rows(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 6, generator=generator)
    return inputs, (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)


def batches(size: int = 8, count: int = 40) -> Batches:
    return [(x, y) for x, y in zip(*(part.split(size) for part in rows(count)), strict=True)]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(network(), torch.randn(2, 6))


@pytest.fixture(scope="module")
def drawing_program() -> Program:
    return trace(with_statistics(), torch.randn(2, 6))


def tuned(
    program: Program, data: Any, *, loss_fn: Any = cross_entropy, evaluate: Any = None, **settings: Any
) -> Result:
    settings = {"learning_rate": 1e-2, "epochs": 2} | settings
    return lobo_fx.compile(
        program, [FineTune(**settings)], train_data=data, loss_fn=loss_fn, evaluate=evaluate, progress=False
    )


def weights(result: Result) -> Weights:
    return {name: tensor.clone() for name, tensor in result.module.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def reasons(result: Result) -> str:
    return "\n".join(note.reason for note in result.report.notes)


# --- against a loop written out -------------------------------------------------------------------------


def written_out(
    model: nn.Module,
    data: Batches,
    *,
    epochs: int,
    rate: float,
    decay: float = 0.01,
    clip: float | None = 1.0,
    warmup: float = 0.05,
    accumulate: int = 1,
    shape: str = "cosine",
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Weights:
    """Training as the documentation of `TrainingPass` describes it."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = make([{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}], lr=rate)
    model.train()
    all_batches = data * epochs
    steps = math.ceil(len(all_batches) / accumulate)
    rising = max(1, round(steps * warmup)) if warmup else 0
    for step in range(steps):
        if step < rising:
            factor = (step + 1) / rising
        else:
            share = (step - rising) / max(1, steps - rising)
            factor = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[shape]
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        shared = all_batches[step * accumulate : (step + 1) * accumulate]
        for inputs, labels in shared:
            (cross_entropy(model(inputs), labels) / len(shared)).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            norm = math.sqrt(
                sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
            )
            for p in model.parameters():
                assert p.grad is not None
                p.grad *= min(1.0, clip / (norm + 1e-6))
        optimizer.step()
    return model.state_dict()


def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        ({}, {}),
        ({"clip_norm": 0.05, "warmup": 0.4}, {"clip": 0.05, "warmup": 0.4}),
        ({"clip_norm": None, "schedule": "linear", "warmup": 0.0}, {"clip": None, "shape": "linear", "warmup": 0}),
        (
            {"optimizer": "sgd", "schedule": "constant", "weight_decay": 0.3},
            {"make": sgd, "shape": "constant", "decay": 0.3},
        ),
        ({"optimizer": sgd, "accumulate": 3}, {"make": sgd, "accumulate": 3}),
        # one batch is left for the last step, whose rate is not zero
        (
            {"optimizer": sgd, "accumulate": 7, "schedule": "constant"},
            {"make": sgd, "accumulate": 7, "shape": "constant"},
        ),
    ],
    ids=["defaults", "clipped", "linear", "sgd", "accumulated", "incomplete"],
)
def test_the_loop_is_a_plain_loop(program: Program, settings: dict[str, Any], oracle: dict[str, Any]) -> None:
    found = weights(tuned(program, batches(), epochs=3, **settings))
    expected = written_out(network(), batches(), epochs=3, rate=1e-2, **oracle)
    start = network().state_dict()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6
        assert (found[name] - start[name]).abs().max() > 1e-3


@pytest.mark.parametrize("decay", [0.3, 0.0])
def test_a_partial_that_gives_its_decay_says_how_much(program: Program, decay: float) -> None:
    optimizer = functools.partial(torch.optim.AdamW, weight_decay=decay)
    found = weights(tuned(program, batches(), optimizer=optimizer))
    expected = written_out(network(), batches(), epochs=2, rate=1e-2, decay=decay)
    assert all((found[name] - value).abs().max() <= 1e-6 for name, value in expected.items())


def test_two_batches_accumulated_are_one_of_both(program: Program) -> None:
    settings = {"optimizer": "sgd", "epochs": 3}
    twice = weights(tuned(program, batches(4), accumulate=2, **settings))
    once = weights(tuned(program, batches(8), **settings))
    other = weights(tuned(program, batches(4), **settings))
    assert all((twice[name] - once[name]).abs().max() <= 1e-6 for name in once)
    assert any((other[name] - once[name]).abs().max() > 1e-3 for name in once)


def test_steps_count_instead_of_epochs_and_read_on(program: Program) -> None:
    found = weights(tuned(program, batches(), steps=7))
    expected = written_out(network(), (batches() * 2)[:7], epochs=1, rate=1e-2)
    assert all((found[name] - value).abs().max() <= 1e-6 for name, value in expected.items())


def test_a_schedule_object_is_stepped_with_the_optimizer(program: Program) -> None:
    seen: list[float] = []

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def factor(step: int) -> float:
            seen.append(step)
            return 0.5**step

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    tuned(program, batches(), schedule=schedule, accumulate=2)
    assert seen[-1] == 5  # ten batches


def test_a_schedule_or_optimizer_that_fails_is_the_users(program: Program) -> None:
    short = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=3)
    with pytest.raises(InvalidInput, match="schedule failed: ValueError: Tried to step 4 times"):
        tuned(program, batches(), schedule=short)
    with pytest.raises(InvalidInput, match="schedule failed: TypeError"):
        tuned(program, batches(), schedule=torch.optim.lr_scheduler.OneCycleLR)
    with pytest.raises(InvalidInput, match=r"optimizer failed.* RuntimeError: SparseAdam does not support dense"):
        tuned(program, batches(), optimizer=torch.optim.SparseAdam)


def test_a_schedule_that_needs_a_score_is_refused(program: Program) -> None:
    with pytest.raises(InvalidInput, match="a ReduceLROnPlateau, which is stepped by a score"):
        tuned(program, batches(), schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_no_epoch_needs_no_rate(program: Program) -> None:
    result = tuned(program, batches(), epochs=0, learning_rate="auto", loss_fn=dying(cross_entropy, 0))
    assert "0 batches in 0 epochs, 0 s; learning rate 0, not needed" in reasons(result)
    assert same(weights(result), dict(program.module.state_dict()))


def test_dicts_tuples_and_pairs_are_the_same_data(program: Program) -> None:
    name = program.signature.names[0]
    pairs = weights(tuned(program, batches()))
    assert same(pairs, weights(tuned(program, [{name: x, "labels": y} for x, y in batches()])))
    assert same(pairs, weights(tuned(program, DataLoader(TensorDataset(*rows()), batch_size=8))))


def test_a_rate_is_found_and_the_model_is_as_before(program: Program) -> None:
    seen: list[int] = []

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return cross_entropy(outputs, labels)

    found = tuned(program, batches(), loss_fn=loss_fn, learning_rate="auto")
    assert len(seen) <= len(RATES) * (length_of_trials(10) + JUDGES) + 15
    said = re.search(r"learning rate ([\d.e-]+), best of 6 trials of 8 steps", reasons(found))
    assert said
    rate = float(said.group(1))
    assert rate in RATES
    # the same training with that rate given
    given = weights(tuned(program, batches(), learning_rate=rate))
    assert all((given[name] - value).abs().max() <= 1e-6 for name, value in weights(found).items())


def test_a_trial_is_a_short_training(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[float, float] = {}

    def best(trial: Callable[[float, int], float], steps: int) -> Found:
        assert steps == 5  # fifteen batches
        losses.update({rate: trial(rate, 8) for rate in (1e-3, 1e-2)})
        return Found(1e-2, "")

    monkeypatch.setattr(loop, "best_rate", best)
    tuned(program, batches(), learning_rate="auto", epochs=3, clip_norm=0.05, accumulate=3, optimizer=sgd)
    judges, read = (batches() * 2)[:6], (batches() * 7)[6:]

    def oracle(rate: float, clip: float = 0.05, accumulate: int = 3) -> float:
        model = network()
        length = 8 * accumulate
        written_out(model, read[:length], epochs=1, rate=rate, clip=clip, accumulate=accumulate, make=sgd)
        return sum(float(cross_entropy(model(x).detach(), y)) for x, y in judges) / 6

    for rate, found in losses.items():
        assert found == pytest.approx(oracle(rate), rel=1e-5)
    assert losses[1e-2] != pytest.approx(oracle(1e-2, clip=1.0), rel=1e-3)
    assert losses[1e-2] != pytest.approx(oracle(1e-2, accumulate=1), rel=1e-4)


def test_a_trial_tells_the_objective_how_far_it_is(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    class Noted(Objective):
        def begin_step(self, share: float) -> None:
            shares.append(share)

    monkeypatch.setattr(fine_tune, "Objective", Noted)
    tuned(program, batches(), learning_rate="auto")
    trial = [step / 8 for step in range(8)] + [0.0]  # at last, all is as before
    assert shares == trial * len(RATES) + [step / 10 for step in range(10)]


# --- killed and gone on -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Augmented(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows with noise drawn from all three global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels = rows()
        noise = np.random.normal() + random.random() + float(torch.rand(()))
        return inputs[index] + 0.1 * noise, labels[index]


def shuffled() -> Any:
    return DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True)


def own_generator() -> Any:
    generator = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True, generator=generator)


def own_sampler() -> Any:
    data = TensorDataset(*rows())
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(7))
    return DataLoader(data, batch_size=8, sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "list": batches,
    "shuffled": shuffled,
    "own generator": own_generator,
    "own sampler": own_sampler,
    "augmented": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True),
}


def accuracy(module: nn.Module) -> float:
    """It draws too, as users' scores may."""
    inputs, labels = rows()
    torch.rand(3)
    with torch.no_grad():
        return float((module(inputs).argmax(1) == labels).double().mean())


def dying(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """The function, that is killed in one of its calls."""
    left = iter(range(calls))

    def call(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return function(*arguments)

    return call


def states(data: Any) -> list[Any]:
    own = [getattr(holder, "generator", None) for holder in (data, getattr(data, "sampler", None))]
    found: list[Any] = [torch.get_rng_state(), torch.tensor(np.random.get_state(legacy=True)[1].astype(np.int64))]  # type: ignore[index]
    found += [g.get_state() for g in own if isinstance(g, torch.Generator)]
    return [*found, random.getstate()]


def alike(one: list[Any], other: list[Any]) -> bool:
    return one[-1] == other[-1] and all(map(torch.equal, one[:-1], other[:-1]))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        *(
            pytest.param("in an epoch", name, marks=[pytest.mark.slow] * (name in ("list", "own generator")))
            for name in LOADERS
        ),
        ("between epochs", "list"),
        ("between epochs", "own sampler"),
        *(
            pytest.param("between epochs", name, marks=pytest.mark.slow)
            for name in ("shuffled", "own generator", "augmented")
        ),
    ],
)
def test_a_killed_training_ends_with_the_weights_of_an_unbroken_one(
    drawing_program: Program, name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "in an epoch":
        monkeypatch.setattr(loop, "_BETWEEN", -1.0)  # a checkpoint after every step
    settings: dict[str, Any] = {"epochs": 3, "accumulate": 2}  # five batches: an epoch ends within a step
    whole = weights(tuned(drawing_program, LOADERS[name](), evaluate=accuracy, **settings))
    for calls in (3, 4) if where == "between epochs" else (8,):
        folder = tmp_path / str(calls)
        data = LOADERS[name]()
        before = states(data)
        broken = (
            {"evaluate": dying(accuracy, calls)}
            if where == "between epochs"
            else {"loss_fn": dying(cross_entropy, calls), "evaluate": accuracy}
        )
        with pytest.raises(Killed):
            tuned(drawing_program, data, checkpoint_dir=folder, **settings, **broken)
        assert alike(states(data), before)
        seen: list[int] = []

        def counted(outputs: torch.Tensor, labels: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(1)
            return cross_entropy(outputs, labels)

        data = LOADERS[name]()
        again = tuned(drawing_program, data, checkpoint_dir=folder, evaluate=accuracy, loss_fn=counted, **settings)
        assert same(weights(again), whole)
        assert alike(states(data), before)
        assert len(seen) == 15 - (5 * (calls - 1) if where == "between epochs" else calls)
        assert "15 batches in 3 epochs" in reasons(again)


def test_a_process_killed_while_it_writes_goes_on(
    drawing_program: Program, tmp_path: Path, killed_after: Callable[[int, Callable[[], object]], bool]
) -> None:
    whole = weights(tuned(drawing_program, shuffled()))
    for moves in range(4):
        folder = tmp_path / str(moves)
        assert killed_after(moves, lambda folder=folder: tuned(drawing_program, shuffled(), checkpoint_dir=folder))  # type: ignore[misc]
        assert same(weights(tuned(drawing_program, shuffled(), checkpoint_dir=folder)), whole)


def test_what_is_finished_is_not_trained_again(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tuned(program, batches(), checkpoint_dir=tmp_path / "a", evaluate=accuracy)
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.setattr(loop.Loop, "_train", lambda self: pytest.fail("it is trained"))
    again = tuned(program, batches(), checkpoint_dir=tmp_path / "b", evaluate=accuracy)
    assert same(weights(first), weights(again))
    assert "Of these, 10 batches are of an earlier run, whose checkpoint is in" in reasons(again)
    assert "an earlier run" not in reasons(first)
    files = {file.suffix for file in (tmp_path / "b").iterdir()}
    assert files == {".json", ".safetensors"}


@pytest.mark.parametrize("where", ["evaluate", "loss_fn"])
def test_an_interrupt_ends_cleanly_with_the_best_weights(program: Program, where: str, tmp_path: Path) -> None:
    def interrupted(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
        count = iter(range(calls + 100))

        def call(*arguments: Any) -> Any:
            if next(count) == calls:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    whole = tuned(program, batches(), epochs=4, evaluate=accuracy, checkpoint_dir=tmp_path / "whole")
    one_epoch: Weights = {}

    def score(module: nn.Module) -> float:
        if len(one_epoch) == 0 and any(
            not torch.equal(a, b) for a, b in zip(module.parameters(), program.module.parameters(), strict=True)
        ):
            one_epoch.update({name: value.clone() for name, value in module.state_dict().items()})
        return accuracy(module)

    # the original, before training, after epoch 1, and then
    broken = (
        {"evaluate": interrupted(score, 3)}
        if where == "evaluate"
        else {"loss_fn": interrupted(cross_entropy, 7), "evaluate": score}
    )
    result = tuned(program, batches(), epochs=4, **broken)
    assert "Stopped early: interrupted" in reasons(result)
    assert result.interrupted == ("fine_tune",)
    assert whole.interrupted == ()
    assert same(weights(result), one_epoch)
    assert not same(weights(result), weights(whole))
    assert not result.module.training
    assert all(p.grad is None and p.requires_grad for p in result.module.parameters())


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop", "adagrad", "adam", "nadam", "radam", "adafactor"])
def test_masks_and_ties_last_under_every_optimizer(optimizer: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.last = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.first(x).relu()))  # type: ignore[no-any-return]

    pruning = PruneWeights(0.5)
    tuning = FineTune(optimizer=optimizer, learning_rate=0.05, weight_decay=0.1, epochs=2)
    result = lobo_fx.compile(
        Tied().eval(),
        [pruning, tuning],
        example_inputs=torch.randn(2, 6),
        train_data=batches(),
        loss_fn=cross_entropy,
        progress=False,
    )
    assert result.original is not None
    pruned = lobo_fx.compile(result.original, [pruning], progress=False).module.state_dict()
    after = result.module.state_dict()
    for name in ("first.weight", "last.weight"):
        zero = pruned[name] == 0
        assert zero.double().mean() == 0.5
        assert torch.equal(after[name] == 0, zero)
        assert not torch.equal(after[name], pruned[name])
    parameters = dict(result.module.named_parameters(remove_duplicate=False))
    assert parameters["first.weight"] is parameters["second.weight"]


def test_what_is_frozen_keeps_every_bit(drawing_program: Program) -> None:
    before = drawing_program.module.state_dict()
    for pattern, kept in {
        "1": {"1.weight", "1.bias", "1.running_mean", "1.running_var"},
        "[01]": {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"},
        "*.bias": {"0.bias", "1.bias", "4.bias"},
    }.items():
        result = tuned(drawing_program, batches(), frozen=[pattern], weight_decay=0.1)
        after = weights(result)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == set(before) - kept - {"1.num_batches_tracked"}
        assert all(p.requires_grad for p in result.module.parameters())


@pytest.mark.parametrize("pattern", ["embed", "head", "head.weight", "parts", "parts.head"])
def test_any_name_of_a_tied_weight_or_of_a_module_above_it_freezes_it(pattern: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.head.weight = self.embed.weight
            self.parts = nn.ModuleDict({"head": self.head})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.parts["head"](self.embed(x)))  # type: ignore[no-any-return]

    tied = trace(Tied().eval(), torch.randn(2, 6))
    after = weights(tuned(tied, batches(), frozen=[pattern]))
    assert torch.equal(after["embed.weight"], tied.module.state_dict()["embed.weight"])
    assert not torch.equal(after["last.weight"], tied.module.state_dict()["last.weight"])


def test_everything_frozen_is_refused(program: Program) -> None:
    with pytest.raises(InvalidInput, match="nothing is left to train"):
        tuned(program, batches(), frozen=["*"])
    with pytest.raises(InvalidInput, match="'9' matches no module or parameter"):
        tuned(program, batches(), frozen=["9"])


def scripted(scores: list[float], seen: list[Weights]) -> Callable[[nn.Module], float]:
    """Scores one after the other, whatever the module is; its weights are written down."""
    left: Iterator[float] = iter(scores)

    def evaluate(module: nn.Module) -> float:
        assert not module.training
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return next(left)

    return evaluate


@pytest.mark.parametrize("best", range(4))
def test_the_best_weights_are_kept(program: Program, best: int) -> None:
    scores = [0.5, 0.5, 0.5, 0.5]
    scores[best] = 0.75
    seen: list[Weights] = []
    result = tuned(program, batches(), epochs=3, evaluate=scripted([0.0, *scores, 0.0], seen))
    assert len(seen) == 6  # the original, before training, three epochs, the result
    assert same(weights(result), seen[1 + best])
    said = f"after epoch {best}" if best else "before training, whose weights are kept"
    assert f"best score 0.75 {said}" in reasons(result)
    (sheet,) = result.report.sheets
    assert [row[2] for row in sheet.rows] == scores[1:]


def test_a_trial_that_diverges_leaves_nothing_behind(program: Program) -> None:
    calls = iter(range(1000))
    stops = len(RATES[:-1]) * (length_of_trials(10) + JUDGES) + 1  # the second step of the last trial

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(outputs, labels)
        return loss * math.nan if next(calls) == stops else loss

    found = tuned(program, batches(), learning_rate="auto", loss_fn=loss_fn)
    (rate,) = (float(text) for text in re.findall(r"learning rate (\S+),", reasons(found)))
    assert next(calls) > stops
    assert same(weights(found), weights(tuned(program, batches(), learning_rate=rate)))


@pytest.mark.parametrize("where", ["evaluate", "loss_fn"])
def test_an_interrupt_before_the_first_step_leaves_the_model(program: Program, where: str) -> None:
    functions: dict[str, Callable[..., Any]] = {"evaluate": accuracy, "loss_fn": cross_entropy}
    calls = iter(range(1000))
    at = 1 if where == "evaluate" else 5  # of `evaluate`, the first call scores the original

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return functions[where](*arguments)

    found = tuned(program, batches(), learning_rate="auto", **functions | {where: interrupted})
    assert "Stopped early: interrupted" in reasons(found)
    assert same(weights(found), {name: value.clone() for name, value in program.module.state_dict().items()})


def test_an_error_that_is_taken_for_a_score_is_noticed(program: Program) -> None:
    def warned(change: float, is_better: bool | None = None) -> bool:
        evaluate = scripted([0.0, *(1.0 + change * epoch for epoch in range(4)), 0.0], [])
        given: dict[str, Any] = {"train_data": batches(), "loss_fn": cross_entropy, "evaluate": evaluate}
        training = FineTune(epochs=3, learning_rate=1e-2)
        found = lobo_fx.compile(program, [training], higher_is_better=is_better, progress=False, **given)
        return "if evaluate returns an error, say higher_is_better=False" in reasons(found)

    assert warned(-0.1)
    assert not warned(0.1)
    assert not warned(0.1, is_better=False)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, int, torch.tensor])
def test_a_score_is_any_number(program: Program, kind: Callable[..., Any]) -> None:
    assert "best score 1 before" in reasons(tuned(program, batches(), epochs=1, evaluate=lambda module: kind(1)))


def test_two_passes_with_one_folder_are_refused_before_work(program: Program, tmp_path: Path) -> None:
    chosen = [FineTune(checkpoint_dir=tmp_path / "a"), FineTune(epochs=1, checkpoint_dir=f"{tmp_path}/b/../a")]
    with pytest.raises(InvalidInput, match=r"fine_tune and fine_tune both have checkpoint_dir .*of its own"):
        lobo_fx.compile(program, chosen, train_data=batches(), loss_fn=dying(cross_entropy, 0), progress=False)


def test_patience_ends_training(program: Program) -> None:
    seen: list[Weights] = []
    scores = [0, 0.5, 0.6, 0.6, 0.55, 0.9, 0]
    result = tuned(program, batches(), epochs=9, patience=2, evaluate=scripted(scores, seen))
    assert "no better score in 2 epochs" in reasons(result)
    assert "15 batches in 3 epochs" in reasons(result)
    assert same(weights(result), seen[2])
    with pytest.raises(InvalidInput, match="fine_tune needs evaluate="):
        tuned(program, batches(), patience=2)


# --- bad input --------------------------------------------------------------------------------------------


def spoiled(at: int, value: float = math.nan) -> Callable[..., torch.Tensor]:
    calls = iter(range(1, 10**6))
    return lambda outputs, labels: cross_entropy(outputs, labels) * (value if next(calls) == at else 1.0)


def test_a_first_loss_that_is_nan_is_refused(program: Program) -> None:
    with pytest.raises(InvalidInput, match=r"the loss is nan at step 1 \(epoch 1, batch 1\): nothing was trained"):
        tuned(program, batches(), loss_fn=spoiled(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_later_loss_that_is_not_finite_ends_training_with_the_last_good_weights(
    program: Program, value: float
) -> None:
    result = tuned(program, batches(), epochs=3, loss_fn=spoiled(8, value), schedule="constant", warmup=0.0)
    assert f"Stopped early: the loss is {value} at step 8 (epoch 2, batch 3)" in reasons(result)
    expected = written_out(network(), (batches() * 2)[:7], epochs=1, rate=1e-2, shape="constant", warmup=0.0)
    assert all((weights(result)[name] - found).abs().max() <= 1e-6 for name, found in expected.items())


def test_the_time_of_an_epoch_that_was_not_ended_counts(program: Program) -> None:
    settings = FineTune(learning_rate=1e-2)
    context = Context(program.signature, train_data=batches(), loss_fn=spoiled(4))
    trained = loop.train(Objective(program.clone().module, context), settings, context, network).trained
    assert trained.stopped.startswith("the loss is nan at step 4 (epoch 1, batch 4)")
    assert trained.seconds > 0


def test_a_gradient_that_is_not_finite_ends_training_too(program: Program) -> None:
    calls = iter(range(1, 100))

    def loss_fn(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(outputs, labels)
        return loss + (outputs.sum() * 0).sqrt() if next(calls) == 4 else loss  # sqrt at 0: finite, its slope is not

    result = tuned(program, batches(), loss_fn=loss_fn)
    assert "a gradient is NaN or infinite at step 4 (epoch 1, batch 4)" in reasons(result)
    assert all(value.isfinite().all() for value in weights(result).values())


def test_statistics_that_a_bad_batch_spoiled_are_put_back(drawing_program: Program) -> None:
    data = batches()
    data[3] = (data[3][0].sign() * 3e38, data[3][1])
    result = tuned(drawing_program, data)
    assert "at step 4 (epoch 1, batch 4)" in reasons(result)
    after = weights(result)
    assert all(value.isfinite().all() for value in after.values())
    assert after["1.running_var"].max() < 10


@pytest.mark.parametrize("rate", [1e-2, "auto"])
def test_a_batch_of_one_row_is_refused_where_it_would_spoil_a_variance(drawing_program: Program, rate: Any) -> None:
    data = [*batches(), (rows()[0][:1], rows()[1][:1])]
    with pytest.raises(InvalidInput, match=r"made '1.running_var' NaN: .*drop_last=True"):
        tuned(drawing_program, data, learning_rate=rate)
    assert "12 batches in 2 epochs" in reasons(tuned(drawing_program, data, frozen=["1"]))


def test_statistics_without_a_momentum_follow_the_data() -> None:
    model, plain = with_statistics(), with_statistics()
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    norm.momentum = None
    before = norm.state_dict()["running_mean"].clone()
    after = weights(tuned(trace(model, torch.randn(2, 6)), batches()))
    assert norm.momentum is None
    assert same(after, weights(tuned(trace(plain, torch.randn(2, 6)), batches())))
    assert not torch.equal(after["1.running_mean"], before)


class Dry:
    """Says that it has batches, and has none after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.left -= 1
        return iter(batches() if self.left >= 0 else [])


class Endless:
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from batches()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "train_data is empty"),
        (Dry(0), "train_data is empty"),
        (Dry(2), "train_data is empty"),
        (iter(batches()), "one-shot iterator"),
        (Endless(), "train_data has no length: say how long to train with steps="),
        ([rows()[0]], "train_data, batch 0 holds no label"),
        ([*batches(), (torch.full((2, 6), math.nan), torch.zeros(2).long())], "train_data, batch 5 holds NaN"),
        (7, "train_data is a int"),
        (None, "needs train_data="),
    ],
)
def test_data_that_can_not_be_trained_on_is_refused(program: Program, data: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        tuned(program, data)


def test_data_without_an_end_is_read_as_far_as_asked(program: Program) -> None:
    found = weights(tuned(program, Endless(), steps=7))
    expected = written_out(network(), (batches() * 2)[:7], epochs=1, rate=1e-2)
    assert all((found[name] - value).abs().max() <= 1e-6 for name, value in expected.items())


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda module: "good", "evaluate returned a str"),
        (lambda module: None, "evaluate returned a NoneType"),
        (lambda module: math.nan, "evaluate returned NaN"),
        (lambda module: torch.ones(2), "evaluate returned a Tensor"),
        (lambda module: np.ones(2), "evaluate returned a ndarray"),
        (lambda module: 1 / 0, "evaluate failed"),
    ],
)
def test_a_score_that_is_no_number_is_refused(program: Program, function: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        tuned(program, batches(), evaluate=function)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda outputs, labels: 1.0, "must be a scalar tensor"),
        (lambda outputs, labels: outputs, "must be a scalar tensor"),
        (lambda outputs, labels: outputs.sum().detach(), "must be a scalar tensor"),
        (lambda outputs: outputs.sum(), "loss_fn failed"),
        (None, "fine_tune needs loss_fn="),
    ],
)
def test_a_loss_that_is_none_is_refused(program: Program, function: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        tuned(program, batches(), loss_fn=function)
    assert all(p.grad is None for p in program.module.parameters())


# --- gradients, whatever the caller and the user's code do ------------------------------------------------


def test_training_records_gradients_whatever_the_caller_does(program: Program) -> None:
    def forgets(module: nn.Module) -> float:
        torch.set_grad_enabled(False)
        return 1.0

    expected = weights(tuned(program, batches()))
    with torch.no_grad():
        found = weights(tuned(program, batches()))
        assert not torch.is_grad_enabled()
    tuned(program, batches(), evaluate=forgets)
    assert torch.is_grad_enabled()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name])


def test_weights_before_training_are_kept_where_no_score_is_finite(program: Program) -> None:
    result = tuned(program, batches(), evaluate=lambda module: -math.inf)
    for name, weight in weights(result).items():
        assert torch.equal(weight, program.module.state_dict()[name])
    assert any("before training, whose weights are kept" in note for note in result.report.notes)


def _spoils(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return outputs.sigmoid().mul_(0).sum() + outputs.relu().mul_(0).sqrt().sum()


def _differentiates(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = outputs.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("loss_fn", [_spoils, _differentiates])
def test_a_loss_that_can_not_be_differentiated_is_the_users(loss_fn: Any, program: Program) -> None:
    with pytest.raises(InvalidInput, match="the loss can't be differentiated: "):
        tuned(program, batches(), loss_fn=loss_fn)


def test_half_precision_needs_a_gpu(program: Program) -> None:
    with pytest.raises(InvalidInput, match="mixed_precision='fp16' needs a GPU: on a CPU, 'bf16' or 'no'"):
        tuned(program, batches(), mixed_precision="fp16")
