"""Importance criteria of the torch-pruning library, for axes inferred here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import Member
from lobo_fx.axes.removal import positions
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments, aten
from lobo_fx.passes.fitting.statistics import gradients
from lobo_fx.passes.pruning.criteria import Criterion, Scorer

__all__ = ["TorchPruning"]

_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class TorchPruning(Criterion):
    """Any `torch_pruning.importance` object; needs `pip install torch-pruning`.

    A leaf is shown to it as the group of layers it runs through. Axes that meet no convolution, linear layer or
    norm are scored zero, so they are cut in order.

    Attributes:
        importance: such as `torch_pruning.importance.GroupMagnitudeImportance(p=2)`.
        gradients: whether it reads `weight.grad` (Taylor): the mean gradient of `loss_fn` over `train_data`.

    Example:
        ```python
        import torch_pruning as tp
        PruneChannels(0.5, importance=TorchPruning(tp.importance.GroupMagnitudeImportance(p=1)))
        ```
    """

    importance: Any
    gradients: bool = False

    def __post_init__(self) -> None:
        if not callable(self.importance):
            raise InvalidInput(f"importance is a {type(self.importance).__name__}; expected a torch_pruning.importance")

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that it is computed from."""
        return ("train_data", "loss_fn") if self.gradients else ()

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        layers = _layers(inference)
        if self.gradients:
            first, _ = gradients(inference, context)
            for layer in layers.values():
                for parameter in (layer.module.weight, layer.module.bias):
                    if parameter is not None and id(layer.stored.get(id(parameter))) in first:
                        parameter.grad = first[id(layer.stored[id(parameter)])]

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            group = _Group(_items(leaf, members, layers))
            found = self.importance(group) if group.items else None
            return (
                torch.zeros(leaf.size, dtype=torch.float64) if found is None else found.detach().double()[: leaf.size]
            )

        return score


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A module as torch-pruning knows it, sharing a program's parameters.

    Attributes:
        module: the stand-in.
        outputs: torch-pruning's function that cuts its outputs.
        inputs: the one that cuts its inputs, None for a norm.
        stored: the program's own tensor, by identity of the stand-in's.
    """

    module: Any
    outputs: Any
    inputs: Any
    stored: dict[int, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Item:
    """A layer and which of its positions belong to which position of the leaf."""

    dep: Any
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


@dataclasses.dataclass(frozen=True)
class _Group:
    """What importance objects read of a torch-pruning group."""

    items: list[_Item]

    def __iter__(self) -> Iterator[_Item]:
        return iter(self.items)

    def __getitem__(self, index: int) -> _Item:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


def _items(leaf: Axis, members: Sequence[Member], layers: dict[str, _Layer]) -> list[_Item]:
    """One item for each side (outputs, inputs) of a layer that the leaf runs along, dimension 0 first."""
    found = []
    for member in sorted(members, key=lambda member: member.dim):
        layer = layers.get(member.name)
        cut = None if layer is None else (layer.outputs, layer.inputs)[member.dim if member.dim < 2 else 1]
        if layer is None or cut is None or member.dim > 1:
            continue
        at, root = positions(member.axes[member.dim], leaf)
        target = SimpleNamespace(module=layer.module)
        found.append(_Item(SimpleNamespace(target=target, layer=layer.module, pruning_fn=cut, handler=cut), at, root))
    return found


def _layers(inference: Inference) -> dict[str, _Layer]:
    """Stand-ins for the layers of a program, by name of the weight."""
    layers: dict[str, _Layer] = {}
    for node in inference.program.graph.nodes:
        made = _stand_in(inference, node) if node.op == "call_function" else None
        if made is not None:
            layers.setdefault(str(arguments(node)["weight"].target), made)
    return layers


def _stand_in(inference: Inference, node: fx.Node) -> _Layer | None:
    try:
        import torch_pruning as tp
    except ModuleNotFoundError:
        raise InvalidInput("torch-pruning is not installed; run: pip install torch-pruning") from None
    given, program = arguments(node), inference.program
    read, bias = given.get("weight"), given.get("bias")
    if not isinstance(read, fx.Node) or read.op != "get_attr":
        return None
    shape = program.parameter(read).shape
    if node.target in CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS:
        transposed = node.target in TRANSPOSED_CONVOLUTIONS
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        width = shape[0] if transposed else shape[1] * given["groups"]
        out = shape[1] * given["groups"] if transposed else shape[0]
        module: nn.Module = kind(width, out, 1, groups=given["groups"], device=_META)
        sides: tuple[Any, Any] = (tp.prune_conv_out_channels, tp.prune_conv_in_channels)
        sides = sides[::-1] if transposed else sides
    elif node.target is aten.linear.default:
        module, sides = (
            nn.Linear(shape[1], shape[0], device=_META),
            (tp.prune_linear_out_channels, tp.prune_linear_in_channels),
        )
    elif node.target is aten.batch_norm.default:
        module, sides = nn.BatchNorm2d(shape[0], device=_META), (tp.prune_batchnorm_out_channels, None)
    elif node.target is aten.layer_norm.default:
        module, sides = nn.LayerNorm(shape, device=_META), (tp.prune_layernorm_out_channels, None)
    else:
        return None
    stored = {}
    for name, source in (("weight", read), ("bias", bias)):
        tensor = program.parameter(source) if isinstance(source, fx.Node) and source.op == "get_attr" else None
        twin = None if tensor is None else nn.Parameter(tensor.detach())
        setattr(module, name, twin)
        if twin is not None and tensor is not None:
            stored[id(twin)] = tensor
    return _Layer(module, sides[0], sides[1], stored)
