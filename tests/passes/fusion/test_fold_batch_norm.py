"""Folding batch norms: equal to eager to rounding, and the cases that must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import Result
from lobo_fx.contracts.context import Context
from lobo_fx.graph.operators import aten
from lobo_fx.passes import FoldBatchNorm, PruneWeights
from lobo_fx.testing import check_pass

TOLERANCE = 2e-6
"""Of the output's largest magnitude; a fold only reorders float32 arithmetic."""
IMAGES = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """The model in inference mode, its norms with statistics and scales that change something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.2, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def fold(model: nn.Module, x: torch.Tensor, *, norms: int = 0) -> Result:
    """Folds, and asserts equality with eager on the example and on more rows; `norms` are left."""
    result = check_pass(FoldBatchNorm(), trained(model), x)
    for inputs in (x, torch.cat([x, x.flip(0), x[:1] * 3])):
        expected = model(inputs).detach()
        assert torch.allclose(result.module(inputs), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    assert count_norms(result) == norms
    return result


def count_norms(result: Result) -> int:
    return sum(node.target is aten.batch_norm.default for node in result.program.graph.nodes)


def names(result: Result) -> set[str]:
    return set(result.module.state_dict())


CONVOLUTIONS: dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, padding=1, stride=2, **k), lambda **k: nn.BatchNorm1d(6, **k), (4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, 3, padding=1, **k), lambda **k: nn.BatchNorm2d(6, **k), (4, 7, 6)),
    "conv3d": (lambda **k: nn.Conv3d(4, 6, 2, **k), lambda **k: nn.BatchNorm3d(6, **k), (4, 3, 4, 5)),
    "grouped": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), lambda **k: nn.BatchNorm2d(6, **k), (4, 7, 6)),
    "depthwise": (lambda **k: nn.Conv2d(4, 8, 3, groups=4, **k), lambda **k: nn.BatchNorm2d(8, **k), (4, 7, 6)),
    "dilated": (lambda **k: nn.Conv2d(4, 6, 3, dilation=2, **k), lambda **k: nn.BatchNorm2d(6, **k), (4, 7, 6)),
    "same": (lambda **k: nn.Conv2d(4, 6, 3, padding="same", **k), lambda **k: nn.BatchNorm2d(6, **k), (4, 7, 6)),
    "transposed1d": (
        lambda **k: nn.ConvTranspose1d(4, 6, 3, stride=2, **k),
        lambda **k: nn.BatchNorm1d(6, **k),
        (4, 5),
    ),
    "transposed2d": (
        lambda **k: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, **k),
        lambda **k: nn.BatchNorm2d(6, **k),
        (4, 5, 4),
    ),
    "transposed3d": (lambda **k: nn.ConvTranspose3d(4, 6, 2, **k), lambda **k: nn.BatchNorm3d(6, **k), (4, 3, 3, 3)),
    "transposed_grouped": (
        lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, **k),
        lambda **k: nn.BatchNorm2d(6, **k),
        (4, 5, 4),
    ),
    "transposed_depthwise": (
        lambda **k: nn.ConvTranspose1d(4, 4, 3, groups=4, **k),
        lambda **k: nn.BatchNorm1d(4, **k),
        (4, 5),
    ),
    "linear": (lambda **k: nn.Linear(5, 7, **k), lambda **k: nn.BatchNorm1d(7, **k), (5,)),
}


ALIKE = {"conv3d", "dilated", "transposed3d"}
"""A norm scales what others have too: filters of any number of dimensions, and of any spacing."""
UNBIASED = {"conv2d", "transposed_grouped", "linear"}


@pytest.mark.parametrize(
    ("kind", "bias"),
    [
        pytest.param(
            kind,
            bias,
            id=f"{kind}-{'bias' if bias else 'no_bias'}",
            marks=() if (kind not in ALIKE if bias else kind in UNBIASED) else pytest.mark.slow,
        )
        for kind in CONVOLUTIONS
        for bias in (True, False)
    ],
)
def test_the_norm_goes_into_the_operator_before_it(kind: str, bias: bool) -> None:
    make_operator, make_norm, shape = CONVOLUTIONS[kind]
    operator, norm = make_operator(bias=bias), make_norm()
    result = fold(nn.Sequential(operator, norm, nn.ReLU()), torch.randn(2, *shape))
    assert names(result) == {"0.weight", "0.bias"}
    assert [name for name, _ in result.module.named_parameters()] == ["0.weight", "0.bias"]
    assert result.report.notes == []


@pytest.mark.parametrize("kind", ["conv2d", "transposed_grouped", "linear"])
def test_a_norm_without_scale_and_shift_folds(kind: str) -> None:
    make_operator, make_norm, shape = CONVOLUTIONS[kind]
    result = fold(nn.Sequential(make_operator(bias=False), make_norm(affine=False)), torch.randn(2, *shape))
    assert names(result) == {"0.weight", "0.bias"}


def test_weights_and_bias_are_those_of_the_formula() -> None:
    """W·s and (b − μ)·s + β with s = γ / √(σ² + ε), in float64 numpy; ε is not the default."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.3))
    result = fold(model, IMAGES)
    given = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    scale = given["1.weight"] / np.sqrt(given["1.running_var"] + 0.3)
    weight = given["0.weight"] * scale[:, None, None, None]
    bias = (given["0.bias"] - given["1.running_mean"]) * scale + given["1.bias"]
    folded = result.module.state_dict()
    np.testing.assert_allclose(folded["0.weight"].numpy(), weight, rtol=1e-6, atol=0)
    np.testing.assert_allclose(folded["0.bias"].numpy(), bias, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_lazy_clone_was_made_of_stays_as_it_is(bias: bool) -> None:
    program = lobo_fx.trace(nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6, eps=0.3)), IMAGES)
    before, shared = program.module(IMAGES), program.lazy_clone()
    FoldBatchNorm().run(shared, Context(program.signature))
    assert torch.equal(program.module(IMAGES), before)
    torch.testing.assert_close(shared.module(IMAGES), before)
    assert not shared.graph.find_nodes(op="call_function", target=aten.batch_norm.default)


def test_double_precision_stays_and_is_exact_to_its_own_rounding() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).double())
    result = check_pass(FoldBatchNorm(), model, IMAGES.double())
    assert torch.allclose(result.module(IMAGES.double()), model(IMAGES.double()), rtol=0, atol=1e-14)
    assert {tensor.dtype for tensor in result.module.state_dict().values()} == {torch.float64}


def test_half_precision_is_no_broken_promise() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).bfloat16())
    result = check_pass(FoldBatchNorm(), model, IMAGES.bfloat16())
    expected = model(IMAGES.bfloat16()).float()
    atol = 2.0**-6 * float(expected.detach().abs().max())
    assert torch.allclose(result.module(IMAGES.bfloat16()).float(), expected, rtol=0, atol=atol)


def test_a_chain_of_norms_folds_one_after_the_other() -> None:
    result = fold(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), IMAGES)
    assert names(result) == {"0.weight", "0.bias"}


def test_a_frozen_layer_folds() -> None:
    fold(nn.Sequential(nn.Conv2d(4, 6, 3).requires_grad_(False), nn.BatchNorm2d(6)), IMAGES)


def test_the_bias_of_a_frozen_network_is_frozen_too() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in fold(model, IMAGES).module.parameters())


def test_the_result_exports_and_trains() -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
    result = check_pass(FoldBatchNorm(), model, IMAGES, export=True)
    result.module.train()
    result.module(IMAGES).square().sum().backward()
    gradients = [parameter.grad for parameter in result.module.parameters()]
    assert len(gradients) == 2
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_masked_weights_fold_and_stay_masked(bias: bool) -> None:
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 3, bias=bias), nn.BatchNorm2d(6)))
    pruned = lobo_fx.compile(model, [PruneWeights(0.5)], example_inputs=IMAGES, progress=False)
    both = lobo_fx.compile(model, [PruneWeights(0.5), FoldBatchNorm()], example_inputs=IMAGES, progress=False)
    assert count_norms(both) == 0
    expected = pruned.module(IMAGES).detach()
    assert torch.allclose(both.module(IMAGES), expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    zeros = pruned.module.state_dict()["0.weight"] == 0
    weight = dict(both.module.named_parameters())["0.weight"]
    assert int(zeros.sum()) == weight.numel() // 2
    assert torch.equal(weight == 0, zeros)
    both.module.train()
    both.module(IMAGES).square().sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad[zeros] == 0).all())
    assert bool((weight.grad[~zeros] != 0).all())


class TwoConvolutions(nn.Module):
    """Two convolutions with a norm each; what is shared depends on the test."""

    def __init__(self, share: str = "") -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        if share == "weight":
            self.b.weight = self.a.weight
        elif share == "bias":
            self.b.bias = self.a.bias
        elif share == "norm":
            self.norm_b = self.norm_a

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.norm_a(self.a(x))) + torch.tanh(self.norm_b(self.b(x)))


class OnlyOneOfTwoHasANorm(TwoConvolutions):
    """The second convolution shares the first one's bias and has no norm to change it."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.norm_a(self.a(x))) + torch.tanh(self.b(x))


class NormReadTwice(TwoConvolutions):
    """The norm is folded once, and still needed where what it normalises is no convolution."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.relu(self.norm_a(self.a(x))) + self.norm_a(torch.tanh(self.b(x)))


@pytest.mark.parametrize("share", ["", "bias", "norm"])
def test_two_operators_fold_whatever_they_share_but_the_weight(share: str) -> None:
    result = fold(TwoConvolutions(share), IMAGES)
    assert not any(name.startswith("norm") for name in names(result))
    if share != "bias":  # two biases in the place of one need a new name
        assert names(result) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_a_bias_that_another_operator_reads_keeps_its_value_there() -> None:
    model = OnlyOneOfTwoHasANorm("bias")
    result = fold(model, IMAGES)
    assert torch.equal(result.module.state_dict()["b.bias"], model.a.state_dict()["bias"])


def test_a_norm_that_is_read_elsewhere_keeps_its_statistics() -> None:
    result = fold(NormReadTwice("norm"), IMAGES, norms=1)
    assert {"norm_a.running_mean", "norm_a.running_var", "norm_a.weight", "norm_a.bias"} <= names(result)


class PlainParameters(nn.Module):
    """Convolutions without modules of their own; `bias` means something else here."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.second = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.norm_a(F.conv2d(x, self.first)))
        return self.norm_b(F.conv2d(x, self.second)) + self.bias


def test_a_new_bias_takes_no_name_that_is_in_use() -> None:
    model = PlainParameters()
    result = fold(model, IMAGES)
    assert torch.equal(result.module.state_dict()["bias"], model.bias)


# Twins that look alike and must be left alone.


def left_alone(model: nn.Module, x: torch.Tensor, reason: str, *, norms: int = 1, notes: int = 1) -> None:
    result = fold(model, x, norms=norms)
    before = model.state_dict()
    after = result.module.state_dict()
    tracked = {name for name in before if name.endswith("num_batches_tracked")}
    assert before.keys() - tracked <= after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    found = [note for note in result.report.notes if "fixed sizes" not in note]
    assert len(found) == notes
    assert all("left alone" in note and reason in note for note in found)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm_b(self.conv(self.norm_a(self.conv(x))))


@pytest.mark.parametrize(
    ("model", "notes"),
    [(CalledTwice(), 1), (TwoConvolutions("weight"), 2)],
    ids=["called_twice_on_one_line", "tied"],
)
def test_a_shared_weight_is_left_alone(model: nn.Module, notes: int) -> None:
    left_alone(model, IMAGES, "its weight is shared with another operator", norms=2, notes=notes)


def test_a_weight_that_something_else_reads_is_left_alone() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.norm(self.conv(x)) + self.conv.weight.sum()

    left_alone(Penalised(), IMAGES, "its weight is shared")


def test_a_computed_weight_is_left_alone() -> None:
    conv = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    left_alone(nn.Sequential(conv, nn.BatchNorm2d(6)), IMAGES, "its weight is computed")


def test_a_norm_of_its_own_batch_is_left_alone() -> None:
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    left_alone(nn.Sequential(nn.Conv2d(4, 6, 3), norm), IMAGES, "the statistics of its batch")


def test_a_norm_that_always_trains_is_left_alone() -> None:
    class AlwaysTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> Any:
            return F.batch_norm(self.conv(x), None, None, self.norm.weight, self.norm.bias, training=True)

    left_alone(AlwaysTraining(), IMAGES, "the statistics of its batch")


def test_a_linear_layer_on_three_dimensions_is_left_alone() -> None:
    """There the norm's channels are dimension 1, the layer's outputs dimension 2, even of equal size."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    left_alone(model, torch.randn(2, 4, 5), "the norm's channels are not the linear layer's outputs")


@pytest.mark.parametrize("width", [10, 8])
def test_a_convolution_without_a_batch_is_left_alone(width: int) -> None:
    """There the norm's channels are positions, even where there are as many as outputs."""
    model, x = trained(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(width))), torch.randn(3, width + 2)
    result = check_pass(FoldBatchNorm(), model, x)
    assert count_norms(result) == 1
    assert any("without a batch" in note for note in result.report.notes)


class ResultUsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(
    "model",
    [
        ResultUsedTwice(),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
        nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True)),
    ],
    ids=["used_twice", "activation_between", "norm_first", "group_norm", "instance_norm"],
)
def test_other_arrangements_stay_as_they_are(model: nn.Module) -> None:
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    result = fold(model, IMAGES, norms=norms)
    before, after = model.state_dict(), result.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert any(node.target in (aten.conv2d.default,) for node in result.program.graph.nodes)


def test_a_result_used_elsewhere_is_reported() -> None:
    result = fold(ResultUsedTwice(), IMAGES, norms=1)
    assert len(result.report.notes) == 1
    assert "conv" in result.report.notes[0]
