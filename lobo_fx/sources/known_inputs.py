"""Example inputs that are derived from the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import HOW_TO_PASS, Inputs

__all__ = ["find_inputs"]


def find_inputs(model: nn.Module) -> Inputs:
    """Example inputs derived from the model's own metadata: two rows of seeded random data.

    Sources, in order: a timm `pretrained_cfg`/`default_cfg` with an `input_size`; a Hugging Face
    `main_input_name` with its `config`; Hugging Face `dummy_inputs`.

    Raises:
        InvalidInput: the model does not describe its inputs.
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
    """Hugging Face: a tensor for the model's main input, and decoder tokens if it has a decoder."""
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
