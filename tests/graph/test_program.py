"""The program as an `nn.Module`: trains, switches modes, copies and names its parameters as the original does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.notes import Note
from lobo_fx.graph.operators import training_flag
from lobo_fx.graph.program import Program, ProgramModule
from lobo_fx.graph.tensors import register
from lobo_fx.passes import PruneChannels, QuantizeStatic

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """Convolution, batch norm and dropout, a tied weight, an unused parameter, and buffers of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("kept", torch.ones(1))
        self.register_buffer("table", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)) * self.table
        found: torch.Tensor = self.second(torch.tanh(self.first(pooled)))
        return found


def pair(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, ProgramModule]:
    """An independent copy of the model, and of its program."""
    return copy.deepcopy(model), trace(model, x).clone().module


def seeded(module: nn.Module, x: torch.Tensor, seed: int = 3) -> torch.Tensor:
    torch.manual_seed(seed)
    found: torch.Tensor = module(x)
    return found


def assert_same_in_every_mode(model: nn.Module, x: torch.Tensor, *, random: bool = True) -> None:
    """Switches original and program to and fro and compares outputs and running statistics, bit for bit."""
    original, program = pair(model, x)
    outputs = {}
    for mode in (False, True, False, True):
        original.train(mode)
        program.train(mode)
        assert program.training is mode
        outputs[mode] = seeded(program, x)
        assert torch.equal(seeded(original, x), outputs[mode])
        for name, buffer in original.named_buffers():
            if not name.endswith("num_batches_tracked"):
                assert torch.equal(buffer, program.get_buffer(name)), name
    if random:
        assert not torch.equal(outputs[True], outputs[False]), "training looks like inference"


# --- training and inference ------------------------------------------------------------------------------

SWITCHING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Dropout(0.5), (4, 6)),
    "dropout in place": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5, inplace=True)), (4, 6)),
    "dropout of channels": (lambda: nn.Dropout2d(0.5), (4, 3, 2, 2)),
    "alpha dropout": (lambda: nn.AlphaDropout(0.5), (4, 6)),
    "alpha dropout of channels": (lambda: nn.FeatureAlphaDropout(0.5), (4, 3, 2, 2)),
    "random leaky relu": (lambda: nn.RReLU(), (4, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "batch norm of rows": (lambda: nn.BatchNorm1d(6, momentum=0.3), (4, 6)),
    "instance norm with statistics": (lambda: nn.InstanceNorm2d(3, track_running_stats=True), (4, 3, 5, 5)),
    "all together": (Mixed, (4, 3, 6, 6)),
}


@pytest.mark.parametrize("name", SWITCHING)
def test_modes_switch_as_the_originals_do(name: str) -> None:
    build, shape = SWITCHING[name]
    assert_same_in_every_mode(build(), torch.randn(shape) + 0.5)


WITHOUT_MODES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "instance norm without statistics": (lambda: nn.InstanceNorm2d(3, affine=True), (4, 3, 5, 5)),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
}


@pytest.mark.parametrize("name", WITHOUT_MODES)
def test_norms_without_statistics_compute_the_same_in_both_modes(name: str) -> None:
    build, shape = WITHOUT_MODES[name]
    x = torch.randn(shape) + 0.5
    assert_same_in_every_mode(build(), x, random=False)
    program = trace(build(), x).module
    assert torch.equal(program.train()(x), program.eval()(x))


def test_only_norms_with_statistics_have_a_mode() -> None:
    flags = {}
    for tracked in (True, False):
        (node,) = (
            node
            for node in trace(nn.InstanceNorm2d(3, track_running_stats=tracked), IMAGES).graph.nodes
            if node.target == torch.ops.aten.instance_norm.default
        )
        flags[tracked] = training_flag(node)
    assert flags == {True: "use_input_stats", False: None}


def test_dropout_between_lstm_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, 2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.lstm(x)[0]
            return found

    assert_same_in_every_mode(Recurrent(), torch.randn(3, 6, 4))


class MonteCarlo(nn.Module):
    """One dropout that always draws, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = F.dropout(x, 0.5, training=True) + 10 * self.drop(x)
        return found


def test_monte_carlo_dropout_stays_on() -> None:
    x = torch.ones(8, 8)
    assert_same_in_every_mode(MonteCarlo(), x)
    program = trace(MonteCarlo(), x).clone().module
    program.train()
    program.eval()
    values = set(seeded(program, x).flatten().tolist())
    assert values == {10.0, 12.0}, "only the constant dropout draws in inference"


def test_a_copy_remembers_which_dropout_is_constant() -> None:
    x = torch.ones(8, 8)
    twin = copy.deepcopy(copy.deepcopy(trace(MonteCarlo(), x).module))
    for mode in (True, False):
        assert torch.equal(seeded(twin.train(mode), x), seeded(MonteCarlo().train(mode), x))


def test_running_statistics_move_only_in_training() -> None:
    program = trace(nn.BatchNorm2d(3), IMAGES).clone().module
    program(IMAGES + 5)
    assert torch.equal(program.get_buffer("running_mean"), torch.zeros(3))
    program.train()(IMAGES + 5)
    expected = 0.1 * (IMAGES + 5).mean((0, 2, 3))
    torch.testing.assert_close(program.get_buffer("running_mean"), expected, rtol=1e-6, atol=1e-6)


def test_train_returns_the_module_and_takes_a_mode() -> None:
    program = trace(Mixed(), IMAGES).module
    assert program.train() is program
    assert program.train(False) is program
    assert not any(module.training for module in program.modules())


def test_run_is_inference_and_gives_the_mode_back() -> None:
    model = Mixed().eval()
    program = trace(model, IMAGES).clone()
    program.module.train()
    found = program.run()
    assert program.module.training
    assert not found.requires_grad
    assert torch.equal(found, model(IMAGES))
    drawn = [seeded(program.module, IMAGES, seed) for seed in (1, 2)]
    assert not torch.equal(*drawn), "the graph's own nodes went back to training too"


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_parameters_and_buffers_keep_names_order_and_values(copies: int) -> None:
    model = Mixed()
    program = trace(model, IMAGES)
    for _ in range(copies):
        program = program.clone()
    module = program.module
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(model, kind)(remove_duplicate=False))
        found = dict(getattr(module, kind)(remove_duplicate=False))
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name])
    assert list(module.state_dict()) == list(model.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_state_dicts_go_both_ways() -> None:
    model, other = Mixed().eval(), Mixed().eval()
    program = trace(model, IMAGES).clone().module
    assert not torch.equal(program(IMAGES), other(IMAGES))
    program.load_state_dict(other.state_dict())
    assert torch.equal(program(IMAGES), other(IMAGES))
    model.load_state_dict(program.state_dict())
    assert torch.equal(model(IMAGES), other(IMAGES))


def test_register_makes_modules_on_the_way_and_replaces() -> None:
    root = nn.Module()
    weight = nn.Parameter(torch.ones(2))
    register(root, "body.0.weight", weight)
    register(root, "body.0.mask", torch.ones(2), persistent=False)
    register(root, "scale", torch.ones(1))
    assert root.get_parameter("body.0.weight") is weight
    assert list(root.state_dict()) == ["scale", "body.0.weight"]
    register(root, "scale", torch.zeros(1))
    assert float(root.get_buffer("scale")) == 0


# --- copies ----------------------------------------------------------------------------------------------


def test_a_deep_copy_shares_nothing() -> None:
    model = Mixed().eval()
    program = trace(model, IMAGES)
    before = model(IMAGES)
    twin = copy.deepcopy(program.module)
    pointers = {tensor.data_ptr() for tensor in program.module.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in twin.state_dict().values()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.train()
    twin(IMAGES)
    assert torch.equal(program.module(IMAGES), before)
    assert torch.equal(model(IMAGES), before)
    assert not program.module.training


@pytest.mark.parametrize("clone", [Program.clone, Program.lazy_clone])
def test_a_copys_graph_is_its_own(clone: Callable[[Program], Program]) -> None:
    program = trace(Mixed(), IMAGES)
    twin = clone(program)
    before = str(program.graph)
    for node in twin.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
        node.replace_all_uses_with(node.args[0])
    twin.graph.eliminate_dead_code()
    twin.module.recompile()
    assert str(program.graph) == before
    assert not torch.equal(program.run(), twin.run())


@pytest.mark.parametrize("writer", [0, 1])
def test_what_is_written_into_a_lazy_clone_or_its_original_stays_there(writer: int) -> None:
    program = trace(Mixed(), IMAGES).clone()
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    programs = program, program.lazy_clone()
    written, other = programs[writer].module, programs[1 - writer].module
    assert all(map(torch._C._is_cow_tensor, other.parameters()))  # type: ignore[attr-defined]
    with torch.no_grad():
        for tensor in written.state_dict().values():
            tensor.view(-1)[:1] = 99
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert written.state_dict()[name].flatten()[0] == 99
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in written.parameters()]


def test_arrays_of_the_users_tensors_still_follow_them() -> None:
    model = nn.Linear(3, 2)
    array = model.weight.detach().numpy()
    program = trace(model, torch.ones(2, 3))
    for twin in (program.clone().lazy_clone(), program.lazy_clone()):
        assert torch.equal(twin.module.get_parameter("weight"), model.weight)
    model.weight.data.fill_(2.0)
    assert (array == 2).all()
    assert not twin.module.get_parameter("weight").eq(2).any()


@pytest.mark.parametrize("kind", ["one memory", "other processes", "numpy"])
def test_tensors_that_can_not_be_shared_lazily_are_copied(kind: str) -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first = torch.from_numpy(np.ones(6, np.float32)) if kind == "numpy" else torch.ones(6)
            if kind == "other processes":
                first.share_memory_()  # type: ignore[no-untyped-call]
            self.register_buffer("first", first)
            self.register_buffer("second", first[:3] if kind == "one memory" else torch.ones(3))

        def forward(self, x: torch.Tensor) -> Any:
            return x * self.get_buffer("first"), x[..., :3] * self.get_buffer("second")

    program = dataclasses.replace(trace(Buffers(), torch.ones(2, 6)), owns_tensors=True)
    twin, expected = program.lazy_clone().module, program.clone().module
    for module in (twin, expected):
        module.get_buffer("first").fill_(2.0)
    for name in ("first", "second"):
        assert torch.equal(twin.get_buffer(name), expected.get_buffer(name))
        assert program.module.get_buffer(name).eq(1).all()


def test_a_copy_still_checks_its_calls() -> None:
    twin = copy.deepcopy(trace(Mixed(), IMAGES).module)
    assert twin.signature is not None
    assert str(twin.signature) == "x: float32[batch, 3, 6, 6]"
    with pytest.raises(InvalidInput, match=r"float32\[3, 6, 6\]"):
        twin(IMAGES[0])


def test_tied_weights_stay_tied_and_untied_ones_apart() -> None:
    program = trace(Mixed(), IMAGES)
    copies = program.clone(), program.clone().clone(), program.lazy_clone(), program.clone().lazy_clone()
    for module in (program.module, *(copied.module for copied in copies)):
        assert module.get_parameter("first.weight") is module.get_parameter("second.weight")
        assert module.get_parameter("first.bias") is not module.get_parameter("second.bias")
        assert len(list(module.parameters())) == len(list(Mixed().parameters()))


def test_a_weight_tied_three_ways_keeps_every_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in (model[1], model[2]):
        layer.weight = model[0].weight
    program = trace(model, torch.randn(2, 3))
    for module in (program.module, program.clone().module, program.clone().lazy_clone().module):
        assert list(module.state_dict()) == list(model.state_dict())
        assert len({id(module.get_parameter(f"{index}.weight")) for index in range(3)}) == 1


def test_a_tied_embedding_trains_as_one_weight() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(torch.tanh(self.embedding(tokens)))
            return found

    tokens = torch.randint(0, 7, (2, 5))
    original, program = pair(Language(), tokens)
    step(original, tokens, 1)
    step(program, tokens, 1)
    weight = program.get_parameter("embedding.weight")
    assert torch.equal(weight, original.get_parameter("embedding.weight"))
    assert weight is program.get_parameter("head.weight")


# --- fine-tuning -----------------------------------------------------------------------------------------


def step(module: nn.Module, x: torch.Tensor, count: int) -> list[float]:
    """Some steps of AdamW in training mode, dropout seeded; the losses."""
    module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = []
    for seed in range(count):
        optimizer.zero_grad()
        loss = (seeded(module, x, seed) - 1).square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fine_tuning_steps_equal_the_originals() -> None:
    original, program = pair(Mixed(), IMAGES)
    start = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    assert step(original, IMAGES, 5) == step(program, IMAGES, 5)
    for name, tensor in original.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(tensor, program.state_dict()[name]), name
        assert torch.equal(tensor, start[name]) == (name in ("unused", "kept")), f"{name} should have trained"
    assert torch.equal(original.eval()(IMAGES), program.eval()(IMAGES))


def test_a_frozen_parameter_stays_frozen() -> None:
    model = Mixed()
    model.conv.requires_grad_(False)
    program = trace(model, IMAGES).clone().module
    before = program.get_parameter("conv.weight").clone()
    assert not program.get_parameter("conv.weight").requires_grad
    step(program, IMAGES, 2)
    assert torch.equal(program.get_parameter("conv.weight"), before)
    assert program.get_parameter("conv.weight").grad is None


def test_the_loss_goes_down() -> None:
    program = trace(Mixed(), IMAGES).clone().module
    losses = step(program, IMAGES, 40)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


# --- the program -----------------------------------------------------------------------------------------


def test_a_node_gives_its_parameter() -> None:
    program = trace(Mixed(), IMAGES)
    reads = {str(node.target): node for node in program.graph.find_nodes(op="get_attr")}
    assert program.parameter(reads["conv.bias"]) is program.module.get_parameter("conv.bias")
    assert program.parameter(reads["norm.running_var"]) is program.module.get_buffer("norm.running_var")


def test_another_graph_in_the_same_program() -> None:
    program = trace(Mixed().eval(), IMAGES).clone()
    program.module.set_facts(notes=(Note("kept"),))
    twin = program.clone().module
    plain = torch.fx.GraphModule(twin, twin.graph)
    changed = program.with_graph_module(plain)
    assert isinstance(changed, Program)
    assert isinstance(changed.module, ProgramModule)
    assert changed.signature == program.signature
    assert changed.notes == ["kept"]
    assert torch.equal(changed.run(), program.run())
    assert changed.module.train().training


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(30, 8), nn.Linear(8, 4)

    def forward(self, words: torch.Tensor, offsets: torch.Tensor) -> Any:
        return self.head(self.words(words, offsets))


class Joined(nn.Module):
    """Nodes that edges join."""

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor) -> Any:
        return torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])


class Placed(nn.Module):
    """Rows of tokens, with positions that all rows share."""

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
        return (tokens * positions).sum(1)


@pytest.mark.parametrize(
    ("model", "inputs", "batch"),
    [
        (Bags(), (torch.arange(9), torch.tensor([0, 4, 6])), None),
        (Joined(), (torch.randn(5, 8), torch.tensor([[0, 1, 2], [3, 4, 0]])), None),
        (Placed(), (torch.ones(3, 6, dtype=torch.long), torch.arange(6)), "batch"),
        (nn.Linear(8, 4), (torch.randn(3, 8),), "batch"),
    ],
)
def test_what_another_input_points_into_is_no_batch_of_rows(model: nn.Module, inputs: Any, batch: str | None) -> None:
    assert trace(model, inputs).signature.batch == batch


def test_a_model_of_bags_is_quantized_batch_by_batch() -> None:
    batches = [(torch.randint(0, 30, (size,)), torch.tensor([0, 4, 6])) for size in (9, 7, 12)]
    passes = [PruneChannels(0.5), QuantizeStatic(kernels="all")]
    result = lobo_fx.compile(Bags(), passes, example_inputs=batches[0], calibration_data=batches, progress=False)
    assert result.module(*batches[2]).shape == (3, 4)
