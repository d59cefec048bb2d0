"""The same channels as torch-pruning chooses, and its criteria on our axes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import lobo_fx
from lobo_fx.passes import PruneChannels
from lobo_fx.passes.pruning.torch_pruning import TorchPruning
from lobo_fx.sources.models import build

tp = pytest.importorskip("torch_pruning")
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def group_l2() -> Any:
    """What `importance="l2"` is here: the energy of all parameters that a channel runs through."""
    return tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None, bias=True)


def kept_by_torch_pruning(model: nn.Module, ratio: float, head: str) -> dict[str, list[int]]:
    """By convolution, which filters torch-pruning keeps, found by marking each filter with its number."""
    twin = copy.deepcopy(model).eval()
    names = {module: name for name, module in twin.named_modules()}
    kept: dict[str, list[int]] = {}
    pruner = tp.pruner.MagnitudePruner(
        twin,
        IMAGES,
        importance=group_l2(),
        pruning_ratio=ratio,
        ignored_layers=[twin.get_submodule(head)],
        round_to=None,
    )
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            if dep.pruning_fn == tp.prune_conv_out_channels:
                width = dep.layer.out_channels
                kept[names[dep.layer]] = sorted(set(range(width)) - set(map(int, idxs)))
        group.prune()
    return kept


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param("torchvision:vgg11_bn", "classifier.6", marks=pytest.mark.slow),  # 133 million parameters
        ("resnet of four blocks", "fc"),
        pytest.param("torchvision:resnet18", "fc", marks=pytest.mark.slow),
        pytest.param("torchvision:resnet50", "fc", marks=pytest.mark.slow),
    ],
)
def test_the_channels_that_stay_are_those_of_torch_pruning(name: str, head: str) -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet of four blocks" else build(name)[0]
    assert isinstance(model, nn.Module)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # no two channels alike
        parameter.data *= 1 + 0.5 * torch.rand(parameter.shape, generator=generator)
    expected = kept_by_torch_pruning(model, 0.5, head)
    pass_ = PruneChannels(0.5, importance="l2", round_to=1)
    result = lobo_fx.compile(model, [pass_], example_inputs=IMAGES, progress=False)
    found = {name: result.kept_indices[f"{name}.weight"][0] for name in expected}
    assert len(expected) >= 8
    assert found == expected


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.second, self.head = nn.Conv2d(12, 10, 3, groups=2), nn.Linear(10, 4)
        self.width = nn.LayerNorm(10)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3))
        return self.head(self.width(x))


@pytest.mark.parametrize("p", [1, 2])
def test_magnitudes_are_ours(p: int) -> None:
    """Of one layer and axis at a time, its magnitude with biases is the sum that ours is."""
    model = Net().eval()
    for parameter in model.parameters():
        parameter.data += torch.rand_like(parameter)
    theirs = TorchPruning(tp.importance.GroupMagnitudeImportance(p, group_reduction="sum", normalizer=None, bias=True))
    kept = [
        lobo_fx.compile(
            model, [PruneChannels(0.4, importance=criterion, round_to=1)], example_inputs=IMAGES, progress=False
        ).kept_indices
        for criterion in (theirs, f"l{p}")
    ]
    assert kept[0] == kept[1] != {}


def test_gradients_reach_criteria_that_read_them() -> None:
    model = Net().eval()
    data = [(IMAGES, torch.tensor([0, 3]))]
    found = [
        lobo_fx.compile(
            model,
            [PruneChannels(0.4, importance=criterion, round_to=1)],
            example_inputs=IMAGES,
            train_data=data,
            loss_fn=nn.functional.cross_entropy,
            progress=False,
        ).kept_indices
        for criterion in (TorchPruning(tp.importance.GroupTaylorImportance(), gradients=True), "taylor")
    ]
    assert found[0].keys() == found[1].keys() != set()


def test_what_is_no_criterion_is_refused() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=r"importance is a str; expected a torch_pruning\.importance"):
        TorchPruning("l2")
