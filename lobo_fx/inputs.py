"""Example inputs: what a user may pass, what can be found from the model, and the batch dimension."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lobo_fx.errors import InvalidInput

DynamicShapes = Any
"""`"batch"`, None, or a specification as `torch.export.export(dynamic_shapes=...)` takes it."""

HOW_TO_PASS = (
    "Pass example_inputs= a tensor, a tuple of positional inputs, or a dict of keyword inputs, "
    "as the model's forward takes them."
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one call: positional `args` and keyword `kwargs`, tensors at the leaves."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        """Tensors and constants in the order the traced graph takes them."""
        return list(pytree.tree_leaves((self.args, dict(self.kwargs))))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def map(self, function: Any) -> Inputs:
        """Applies `function` to every tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def to(self, device: torch.device | str) -> Inputs:
        return self.map(lambda tensor: tensor.to(device))


def as_inputs(value: object) -> Inputs:
    """Reads a tensor, a tuple or list, or a dict of keyword inputs.

    Raises:
        InvalidInput: `value` is anything else, or holds no tensor.
    """
    if isinstance(value, Inputs):
        inputs = value
    elif isinstance(value, torch.Tensor):
        inputs = Inputs((value,))
    elif isinstance(value, Mapping):
        inputs = Inputs((), dict(value))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        inputs = Inputs(tuple(value))
    else:
        raise InvalidInput(f"example_inputs is a {type(value).__name__}. {HOW_TO_PASS}")
    if not inputs.tensors:
        raise InvalidInput(f"example_inputs holds no tensor. {HOW_TO_PASS}")
    return inputs


def find_inputs(model: nn.Module) -> Inputs:
    """Example inputs that the model itself tells of, two rows of seeded random data.

    Sources, in order: a timm `pretrained_cfg`/`default_cfg` with an `input_size`; a Hugging Face
    `main_input_name` with its `config`; Hugging Face `dummy_inputs`.

    Raises:
        InvalidInput: the model says nothing of its inputs.
    """
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = settings.get("input_size") if isinstance(settings, Mapping) else None
    generator = torch.Generator().manual_seed(0)
    if size:
        return Inputs((torch.randn(2, *size, generator=generator),))
    if inputs := _from_config(model, generator):
        return Inputs((), inputs)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy:
        return Inputs((), dict(dummy))
    signature = inspect.signature(model.forward)
    raise InvalidInput(f"{type(model).__name__} does not say what inputs it takes (forward{signature}). {HOW_TO_PASS}")


def _from_config(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Hugging Face: a tensor for the model's main input, and decoder tokens where it has a decoder."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return {}

    def size(*names: str) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    def tokens() -> torch.Tensor:
        return torch.randint(0, size("vocab_size") or 2, (2, 16), generator=generator)

    shape: tuple[int, ...] | None = None
    if main == "pixel_values" and size("image_size"):
        side = size("image_size")
        shape = (size("num_channels") or 3, *(side if isinstance(side, Sequence) else (side, side)))
    elif main == "input_features" and size("num_mel_bins") and size("max_source_positions"):
        shape = (size("num_mel_bins"), 2 * size("max_source_positions"))
    elif main == "input_values":
        shape = (16_000,)
    found = {main: torch.randn(2, *shape, generator=generator)} if shape else {}
    if not found and main == "input_ids" and size("vocab_size"):
        found = {main: tokens()}
    parameters = inspect.signature(model.forward).parameters
    if found and getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = tokens()
    return found


def check_arity(model: nn.Module, inputs: Inputs) -> None:
    """Refuses inputs that the model's forward can't bind, before tracing.

    Raises:
        InvalidInput: too many, too few or unknown inputs.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InvalidInput(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}. {HOW_TO_PASS}"
        ) from None


def positional_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first `count` parameters of the model's forward; `*rest` for those that it gathers."""
    parameters = list(inspect.signature(model.forward).parameters.values())[:count]
    names = [parameter.name for parameter in parameters]
    gathered = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    return [*names[: names.index(gathered[0])], f"*{gathered[0]}"] if gathered else names


def in_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """Keyword inputs in the order of the model's forward."""
    known = list(inspect.signature(model.forward).parameters)
    place = {name: index for index, name in enumerate(known)}
    names = sorted(inputs.kwargs, key=lambda name: place.get(name, len(known)))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


def free_batch(inputs: Inputs, names: Sequence[str]) -> tuple[Inputs, Any]:
    """Inputs with at least two rows, and a specification for `torch.export` that leaves the batch free.

    `torch.export` treats a size of 1 as a constant, so a single row is repeated. Only tensors whose
    first dimension equals that of the first tensor carry the batch; the others stay as they are.

    Args:
        inputs: as the model takes them.
        names: of the positional inputs, as the model's forward has them.
    """
    rows = next((tensor.shape[0] for tensor in inputs.tensors if tensor.dim()), 0)

    def carries_batch(leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows

    if rows == 1:
        inputs = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if carries_batch(t) else t)
        rows = 2
    batch = Dim("batch")
    return inputs, dynamic_shapes_of(inputs, names, lambda leaf: {0: batch} if carries_batch(leaf) else None)


def dynamic_shapes_of(inputs: Inputs, names: Sequence[str], describe: Callable[[Any], Any]) -> Any:
    """A `torch.export` specification: what `describe` says of each leaf, nested as the inputs are."""
    args, kwargs = pytree.tree_map(describe, (inputs.args, dict(inputs.kwargs)))
    if names and names[-1].startswith("*"):
        *names, rest = names
        args, gathered = args[: len(names)], {rest[1:]: tuple(args[len(names) :])}
        return dict(zip(names, args, strict=True)) | gathered | kwargs
    return dict(zip(names, args, strict=True)) | kwargs if kwargs else args
