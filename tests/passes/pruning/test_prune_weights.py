"""Pruning single weights: exact counts, the right weights, and zeros that stay zero."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Result
from lobo_fx.graph.masks import masks, strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneWeights
from lobo_fx.passes.pruning.prune_weights import prunable_weights
from lobo_fx.testing import check_pass

Array = npt.NDArray[Any]
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class HuggingFaceConv1D(nn.Module):
    """A linear layer that keeps its weight as inputs × outputs, as GPT-2 has it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class MatrixProduct(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(inputs, outputs))

    def forward(self, x: torch.Tensor) -> Any:
        return x @ self.weight


def network() -> nn.Module:
    """Every sort of prunable layer, and norms and biases that are none."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 256, 12),
        HuggingFaceConv1D(9, 12),
        MatrixProduct(9, 7),
    ).eval()


PRUNABLE = ["0.weight", "3.weight", "4.weight", "6.weight", "7.weight", "8.weight"]


@functools.cache
def traced() -> Program:
    """The network, for all tests that need none of their own; every pass works on a copy."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lobo_fx.trace(network(), IMAGES)


def prune(model: nn.Module | Program, *passes: PruneWeights, x: torch.Tensor = IMAGES, seed: int = 0) -> Result:
    inputs = x if isinstance(model, nn.Module) else None
    return lobo_fx.compile(model, passes, example_inputs=inputs, seed=seed, progress=False)


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def lowest(weights: Array, amount: float) -> Array:
    """Oracle: True for the round(amount · n) smallest magnitudes, by sorting."""
    removed = np.zeros(weights.size, dtype=bool)
    removed[np.argsort(np.abs(weights).ravel(), kind="stable")[: round(amount * weights.size)]] = True
    return removed.reshape(weights.shape)


@pytest.mark.parametrize("amount", [0.1, 0.77, 0.999])
def test_each_layer_loses_exactly_its_smallest_weights(amount: float) -> None:
    before, after = arrays(traced().module), arrays(prune(traced(), PruneWeights(amount)).module)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        expected = np.where(lowest(weight, amount), 0, weight) if name in PRUNABLE else weight
        np.testing.assert_array_equal(after[name], expected, err_msg=name)


@pytest.mark.parametrize("amount", [0.05, 0.6])
def test_global_scope_ranks_all_layers_together(amount: float) -> None:
    before = arrays(traced().module)
    after = arrays(prune(traced(), PruneWeights(amount, scope="global")).module)
    together = np.concatenate([before[name].ravel() for name in PRUNABLE])
    removed = lowest(together, amount)
    found = np.concatenate([after[name].ravel() for name in PRUNABLE])
    np.testing.assert_array_equal(found, np.where(removed, 0, together))
    shares = [float((after[name] == 0).mean()) for name in PRUNABLE]
    assert max(shares) - min(shares) > 0.01, "the layers must differ, or this test can't tell the scopes apart"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_squares_rank_as_magnitudes_do(scope: Any) -> None:
    l1 = arrays(prune(traced(), PruneWeights(0.6, criterion="l1", scope=scope)).module)
    l2 = arrays(prune(traced(), PruneWeights(0.6, criterion="l2", scope=scope)).module)
    for name in l1:
        np.testing.assert_array_equal(l1[name], l2[name])


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_pruning_counts_exactly_and_depends_on_the_seed_alone(scope: Any) -> None:
    pass_ = PruneWeights(0.3, criterion="random", scope=scope)
    one, same, other = (arrays(prune(traced(), pass_, seed=seed).module) for seed in (1, 1, 2))
    zeros = sum(int((one[name] == 0).sum()) for name in PRUNABLE)
    sizes = [one[name].size for name in PRUNABLE]
    assert zeros == (round(0.3 * sum(sizes)) if scope == "global" else sum(round(0.3 * size) for size in sizes))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not any(np.array_equal(one[name] == 0, other[name] == 0) for name in PRUNABLE)
    small = lowest(arrays(traced().module)["6.weight"], 0.3)
    assert not np.array_equal(one["6.weight"] == 0, small)


def test_ties_are_cut_by_position() -> None:
    layer = nn.Linear(10, 3, bias=False)
    nn.init.constant_(layer.weight, 0.25)
    weight = arrays(prune(nn.Sequential(layer), PruneWeights(0.5), x=torch.randn(2, 10)).module)["0.weight"]
    np.testing.assert_array_equal(weight.ravel(), [0.0] * 15 + [0.25] * 15)


def test_a_convolution_padded_by_name_is_pruned_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"))
    weight = arrays(prune(model, PruneWeights(0.5)).module)["0.weight"]
    np.testing.assert_array_equal(weight == 0, lowest(arrays(model)["0.weight"], 0.5))


@pytest.mark.parametrize("passes", [[PruneWeights(0.5)], [PruneWeights(0.2), PruneWeights(0.5)]])
def test_removed_weights_are_plain_zeros(passes: list[PruneWeights]) -> None:
    """A negative zero equals zero, but its sign bit is noise that no compressor gets rid of."""
    after = arrays(prune(traced(), *passes).module)
    for name in PRUNABLE:
        assert not np.signbit(after[name][after[name] == 0]).any(), name


def test_nothing_is_removed_where_nothing_is_asked_for() -> None:
    model = network()
    result = check_pass(PruneWeights(0.0), model, IMAGES)
    before, after = arrays(model), arrays(result.module)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert torch.equal(result.module(IMAGES), model(IMAGES))


def test_the_pruned_program_is_the_eager_model_with_zeros_in_it() -> None:
    model = network()
    result = check_pass(PruneWeights(0.7), model, IMAGES, export=True)
    with torch.no_grad():
        for name in PRUNABLE:
            model.get_parameter(name)[torch.from_numpy(lowest(arrays(model)[name], 0.7))] = 0
        assert torch.allclose(result.module(IMAGES), model(IMAGES), rtol=0, atol=1e-6)


def test_a_model_without_weights_to_prune_says_so() -> None:
    result = prune(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), PruneWeights())
    assert any("found no convolution, linear or recurrent layer" in note for note in result.report.notes)


# N:M patterns: of every M neighbours along the input dimension, at most N stay.

INPUT_AXES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, int]] = {
    "linear": (lambda: nn.Linear(8, 5), torch.randn(2, 8), 1),
    "conv2d": (lambda: nn.Conv2d(8, 5, 3), torch.randn(2, 8, 5, 5), 1),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3), torch.randn(2, 8, 5), 1),
    "grouped": (lambda: nn.Conv2d(16, 6, 1, groups=2), torch.randn(2, 16, 5, 5), 1),
    "transposed": (lambda: nn.ConvTranspose2d(8, 5, 3), torch.randn(2, 8, 5, 5), 0),
    "addmm": (lambda: HuggingFaceConv1D(5, 8), torch.randn(2, 8), 0),
    "matmul": (lambda: MatrixProduct(8, 5), torch.randn(2, 8), 0),
}


@pytest.mark.parametrize("pattern", ["2:4", "3:8"])
@pytest.mark.parametrize("kind", INPUT_AXES)
def test_of_every_group_of_inputs_the_largest_stay(kind: str, pattern: str) -> None:
    """Oracle: in each group the weights kept are the choice of N with the largest sum of magnitudes."""
    make, x, axis = INPUT_AXES[kind]
    kept, group = map(int, pattern.split(":"))
    model = nn.Sequential(make())
    before = np.moveaxis(arrays(model)["0.weight"], axis, -1)
    result = check_pass(PruneWeights(pattern=pattern), model, x)
    after = np.moveaxis(arrays(result.module)["0.weight"], axis, -1)
    assert result.report.notes == []
    assert before.shape[-1] % group == 0
    for old, new in zip(before.reshape(-1, group), after.reshape(-1, group), strict=True):
        best = max(itertools.combinations(range(group), kept), key=lambda chosen: np.abs(old[list(chosen)]).sum())
        expected = np.zeros_like(old)
        expected[list(best)] = old[list(best)]
        np.testing.assert_array_equal(new, expected)


def test_amount_means_nothing_beside_a_pattern() -> None:
    model = nn.Sequential(nn.Linear(8, 5))
    x = torch.randn(2, 8)
    one, other = (arrays(prune(model, PruneWeights(a, pattern="1:4"), x=x).module)["0.weight"] for a in (0.0, 0.9))
    np.testing.assert_array_equal(one, other)
    assert float((one == 0).mean()) == 0.75


def test_layers_that_do_not_divide_are_left_alone_and_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1, bias=False), nn.Flatten(), nn.Linear(6 * 36, 4))
    result = prune(model, PruneWeights(pattern="2:4"))
    before, after = arrays(model), arrays(result.module)
    np.testing.assert_array_equal(before["0.weight"], after["0.weight"])
    assert float((after["1.weight"] == 0).mean()) == 0.5
    assert float((after["3.weight"] == 0).mean()) == 0.5
    assert [note for note in result.report.notes if "keeps its weights" in note] == [
        "'0.weight' keeps its weights: its inputs don't divide into groups of 2:4"
    ]


# Zeros that stay.

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
}


def train(module: nn.Module, optimizer: str, steps: int = 6) -> list[float]:
    module.train()
    stepper = OPTIMIZERS[optimizer](module.parameters())
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 7, (8,), generator=generator)
    losses = []
    for _ in range(steps):
        stepper.zero_grad()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        stepper.step()
        losses.append(float(loss.detach()))
    return losses


def zeros(module: nn.Module) -> dict[str, Array]:
    return {name: arrays(module)[name] == 0 for name in PRUNABLE}


def assert_trains_and_keeps_zeros(module: nn.Module, optimizer: str) -> None:
    removed, before = zeros(module), {name: array.copy() for name, array in arrays(module).items()}
    assert sum(int(mask.sum()) for mask in removed.values()) > 0.4 * sum(mask.size for mask in removed.values())
    losses = train(module, optimizer)
    assert losses[-1] < losses[0]
    after = arrays(module)
    for name, mask in removed.items():
        assert (after[name][mask] == 0).all(), name
        assert (after[name][~mask] != before[name][~mask]).mean() > 0.9, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_survive_training(optimizer: str) -> None:
    assert_trains_and_keeps_zeros(prune(traced(), PruneWeights(0.5)).module, optimizer)


def test_zeros_without_a_mask_do_not_survive_training() -> None:
    """The twin that shows what the masks are for."""
    program = prune(traced(), PruneWeights(0.5)).program
    assert masks(program).keys() == set(PRUNABLE)
    expected = program.run()
    strip_masks(program)
    assert masks(program) == {}
    assert torch.equal(program.run(), expected)
    removed = zeros(program.module)
    train(program.module, "sgd", steps=2)
    after = arrays(program.module)
    assert all((after[name][mask] == 0).mean() < 0.5 for name, mask in removed.items())


def test_masks_survive_copying() -> None:
    module = prune(traced(), PruneWeights(0.5)).module
    twin = copy.deepcopy(module)
    assert torch.equal(twin(IMAGES), module(IMAGES))
    before = arrays(module)["6.weight"].copy()
    assert_trains_and_keeps_zeros(twin, "sgd")
    np.testing.assert_array_equal(arrays(module)["6.weight"], before)


def test_masks_survive_saving(tmp_path: Path) -> None:
    result = prune(traced(), PruneWeights(0.5))
    result.save(tmp_path)
    loaded = lobo_fx.load(tmp_path)
    assert masks(loaded.program).keys() == set(PRUNABLE)
    assert torch.equal(loaded.module(IMAGES), result.module(IMAGES))
    assert_trains_and_keeps_zeros(loaded.module, "adam")


def test_masks_are_no_part_of_the_state_dict() -> None:
    model = network()
    result = prune(model, PruneWeights(0.5))
    assert result.module.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in result.module.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert result.report.rows[-1].parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("scope", "criterion"),
    [
        ("layer", "l1"),
        ("global", "random"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("global", "l1"), ("layer", "random"))),
    ],
)
def test_pruning_again_only_adds_zeros(scope: Any, criterion: Any) -> None:
    model = traced()
    first = PruneWeights(0.3, criterion=criterion, scope=scope)
    once = zeros(prune(model, first).module)
    more = prune(model, first, PruneWeights(0.6, criterion=criterion, scope=scope))
    less = prune(model, first, PruneWeights(0.1, criterion=criterion, scope=scope))
    twice = zeros(more.module)
    assert all((twice[name] >= once[name]).all() for name in PRUNABLE)
    sizes = [mask.size for mask in once.values()]
    expected = round(0.6 * sum(sizes)) if scope == "global" else sum(round(0.6 * size) for size in sizes)
    assert sum(int(mask.sum()) for mask in twice.values()) == expected
    assert all(np.array_equal(zeros(less.module)[name], once[name]) for name in PRUNABLE)
    assert_trains_and_keeps_zeros(more.module, "sgd")


def test_a_pattern_after_a_share_keeps_what_was_removed() -> None:
    model = nn.Sequential(nn.Linear(64, 16))
    x = torch.randn(2, 64)
    first = prune(model, PruneWeights(0.8), x=x)
    both = prune(model, PruneWeights(0.8), PruneWeights(pattern="2:4"), x=x)
    old, new = (arrays(result.module)["0.weight"] == 0 for result in (first, both))
    assert (new >= old).all()
    assert ((~new).reshape(-1, 4).sum(1) <= 2).all()
    np.testing.assert_array_equal(new.reshape(-1, 4).sum(1), np.maximum(old.reshape(-1, 4).sum(1), 2))


# Shared weights.


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, and one block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embedding(tokens)
        return self.lm_head(torch.tanh(self.block(torch.tanh(self.block(x)))))


TOKENS = torch.arange(14).view(2, 7)


def test_a_tied_weight_is_pruned_once_and_masked_wherever_it_is_read() -> None:
    model = Tied()
    result = check_pass(PruneWeights(0.5), model, TOKENS, export=True)
    program = result.program
    shared = {name: t for name, t in program.module.named_parameters(remove_duplicate=False) if t.shape == (20, 8)}
    assert len({id(tensor) for tensor in shared.values()}) == 1
    assert len(prunable_weights(program)) == 2
    removed = lowest(model.embedding.weight.detach().numpy(), 0.5)
    for tensor in shared.values():
        np.testing.assert_array_equal(tensor.detach().numpy() == 0, removed)
    assert result.report.rows[-1].nonzero == result.report.rows[0].nonzero - 80 - 32
    # a value that slips under the mask must show in neither read
    weight = next(iter(shared.values()))
    expected = result.module(TOKENS)
    with torch.no_grad():
        weight[torch.from_numpy(removed)] = 5.0
    assert torch.equal(result.module(TOKENS), expected)


def test_a_tied_weight_keeps_its_zeros_in_training() -> None:
    module = prune(Tied(), PruneWeights(0.5), PruneWeights(0.7), x=TOKENS).module
    weight = next(p for p in module.parameters() if p.shape == (20, 8))
    removed = weight == 0
    assert int(removed.sum()) == round(0.7 * 160)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        module(TOKENS).square().mean().backward()
        optimizer.step()
    assert torch.equal(weight == 0, removed)


# Settings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"amount": 1.0}, "amount"),
        ({"amount": 1}, "amount"),
        ({"amount": -0.1}, "amount"),
        ({"amount": float("nan")}, "amount"),
        ({"amount": "0.5"}, "amount"),
        ({"amount": None}, "amount"),
        ({"criterion": "l3"}, "l1, l2, random"),
        ({"scope": "model"}, "one of layer, global"),
        ({"pattern": "4:2"}, "less than M"),
        ({"pattern": "4:4"}, "less than M"),
        ({"pattern": "0:4"}, "at least 1"),
        ({"pattern": "two of four"}, "N:M"),
        ({"pattern": "2:4:8"}, "N:M"),
        ({"pattern": 124}, "N:M"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        PruneWeights(**settings)


def test_settings_are_shown_where_they_differ_from_the_defaults() -> None:
    assert str(PruneWeights(0.25, pattern="2:4")) == "PruneWeights(amount=0.25, pattern='2:4')"
    assert str(PruneWeights()) == "PruneWeights()"


def test_recurrent_weights_are_masked_and_biases_stay() -> None:
    model = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    result = lobo_fx.compile(model, [PruneWeights(0.5)], example_inputs=torch.randn(2, 3, 4), progress=False)
    state = result.module.state_dict()
    for name, tensor in state.items():
        zeros = int((tensor == 0).sum())
        assert zeros == (round(tensor.numel() / 2) if name.startswith("weight") else 0), name


def test_a_matrix_that_is_no_parameter_keeps_its_values() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("basis", torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x) @ self.basis

    result = lobo_fx.compile(Projected(), [PruneWeights(0.5)], example_inputs=torch.randn(2, 4), progress=False)
    state = result.module.state_dict()
    assert int((state["linear.weight"] == 0).sum()) == 8
    assert not bool((state["basis"] == 0).any())


def test_a_tied_embedding_is_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> Any:
            return self.head(self.embedding(tokens))

    tokens = torch.arange(4).view(2, 2)
    result = lobo_fx.compile(Tied(), [PruneWeights(0.5)], example_inputs=tokens, progress=False)
    assert any("embedding" in note and "tied" in note for note in result.report.notes)
