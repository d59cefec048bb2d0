"""Loads weights from files, without unpickling."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.errors import InvalidInput, first_few
from lobo_fx.files import check_readable, check_unpacked_size, read_json
from lobo_fx.sources.packages import import_package
from lobo_fx.terminal.quiet import quiet

__all__ = ["load_checkpoint", "read_safetensors", "weights_in"]


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Loads a model's weights from files that hold only tensors.

    Every parameter and buffer of the model must be in the file, or share its memory with one that is. What was saved
    from within `DataParallel` or `torch.compile` has the names that it has without. A Hugging Face checkpoint may be of
    the model with or without a head: names are then matched by the model's `base_model_prefix`, and the head's weights
    left out.

    Args:
        model: changed in place, if everything fits.
        path: a `.safetensors` file, a `.pt`, `.pth` or `.bin` file with only tensors, an index of shards, or a folder
            that `save_pretrained` wrote.

    Raises:
        InvalidInput: no such file, a damaged one, a pickle, or names, shapes and types that don't fit.
    """
    state = _read_checkpoint(path)
    own = model.state_dict(keep_vars=True)
    state = _renamed(_unwrapped(state, own), own, getattr(model, "base_model_prefix", ""))
    filled = {id(own[name]) for name in own.keys() & state.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    problems = {
        "missing": [name for name, tensor in own.items() if id(tensor) not in filled],
        "unexpected": [n for n in state if n not in own and not any(re.search(pattern, n) for pattern in ignored)],
        "of another shape": [
            f"{name} ({list(state[name].shape)}, the model has {list(tensor.shape)})"
            for name, tensor in own.items()
            if name in state and isinstance(tensor, torch.Tensor) and state[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} ({_type(state[name])}, the model has {_type(tensor)})"
            for name, tensor in own.items()
            if name in state and isinstance(tensor, torch.Tensor) and not _fits(state[name], tensor)
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {first_few(names)}" for kind, names in problems.items() if names)
        raise InvalidInput(f"{path} does not fit {type(model).__name__}; {told}")
    model.load_state_dict(state, strict=False)


def _fits(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a stored tensor has what the model's own needs: values; digits, where whole numbers would be codes."""
    if stored.layout != torch.strided or stored.is_meta or stored.is_complex() > own.is_complex():
        return False
    return stored.is_floating_point() or stored.is_complex() or not own.is_floating_point()


def _type(tensor: torch.Tensor) -> str:
    form = "sparse " if tensor.layout != torch.strided else "valueless " if tensor.is_meta else ""
    return form + str(tensor.dtype).removeprefix("torch.")


_WRAPPED, _COMPILED = "module.", "_orig_mod."
"""What `DataParallel` and its kind put before all names, and `torch.compile` before those of what it compiled."""


def _unwrapped(state: dict[str, torch.Tensor], own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The checkpoint with the names that it would have without wrappers, unless the model itself has them so."""
    if not any(_COMPILED in name for name in own):
        state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if all(name.startswith(_WRAPPED) for name in state) and not own.keys() & state.keys():
        state = {name.removeprefix(_WRAPPED): tensor for name, tensor in state.items()}
    return state


def _renamed(state: dict[str, torch.Tensor], own: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The checkpoint with the model's names: unchanged, or with the base model's prefix removed or added."""
    dot = f"{prefix}."
    without = {name.removeprefix(dot): tensor for name, tensor in state.items() if name.startswith(dot)}
    candidates = [state, *([without, {dot + name: tensor for name, tensor in state.items()}] if prefix else [])]
    return max(candidates, key=lambda candidate: len(own.keys() & candidate.keys()))


_WEIGHT_FILES = tuple(
    name + index for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)


def weights_in(folder: Path) -> Path | None:
    """The file in which Hugging Face's `save_pretrained` put the weights."""
    return next((folder / name for name in _WEIGHT_FILES if os.path.isfile(folder / name)), None)


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    if os.path.isdir(path):
        found = weights_in(path)
        if found is None:
            raise InvalidInput(f"{path} holds none of {', '.join(_WEIGHT_FILES)}")
        path = found
    check_readable(path)
    if not path.stat().st_size:
        raise InvalidInput(f"{path} is empty")
    if path.suffix == ".json":
        return _read_shards(path)
    state = read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    others = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        raise InvalidInput(f"{path} holds more than named tensors ({first_few(others)}); save model.state_dict() alone")
    return state


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(map(_is_shard, files.values())):
        raise InvalidInput(f"{path} is no index of shards: it has no 'weight_map' from names to files beside it")
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        state |= _read_checkpoint(path.parent / file)
    return state


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and not name.endswith(".json")


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file.

    Raises:
        InvalidInput: the file is damaged, or safetensors is not installed.
    """
    try:
        state: dict[str, torch.Tensor] = import_package("safetensors.torch", "safetensors").load_file(path)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{path} is damaged or no safetensors file: {error}") from error
    return state


def _read_pt(path: Path) -> dict[str, Any]:
    try:
        check_unpacked_size(path)
        with quiet():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InvalidInput:
        raise
    except Exception as error:
        # torch's error names the global that a pickle needs; otherwise the file is no checkpoint
        if not isinstance(error, pickle.UnpicklingError) or "GLOBAL" not in str(error):
            raise InvalidInput(f"{path} is damaged, or was not written by torch.save") from error
        raise InvalidInput(
            f"{path} holds more than tensors, and loading it would run its code; save model.state_dict() "
            "with torch.save, or use safetensors"
        ) from error
    if not isinstance(state, dict):
        raise InvalidInput(f"{path} holds a {type(state).__name__}; expected model.state_dict()")
    return {str(name): tensor for name, tensor in state.items()}
