"""Checkpoints of a training: safetensors for tensors, JSON for the rest, moved to their place in one step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_named_by_content, make_folder, name_by_content, read_json, written_beside
from lobo_fx.sources.checkpoints import read_safetensors

__all__ = ["CHECKPOINT_FILE", "Checkpoint", "Identity"]

CHECKPOINT_FILE = "training.json"
_TENSORS_FILE = "training.safetensors"
_FORMAT = 1
_ALIKE = 1e-5
"""Starting weights whose norms differ by a smaller share are the same: fits before training round differently."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to: a pass, and the weights that its training starts from.

    Attributes:
        pass_: name of the pass, with its settings.
        norms: by name of each parameter, its shape and the norm it starts with.
        given: checksums of data, functions and modules that the user gave, by their names; empty where not known.
        scored: whether the user gave `evaluate`.
    """

    pass_: str
    norms: Mapping[str, tuple[list[int], float]]
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scored: bool = False

    @classmethod
    def of(cls, pass_: str, module: nn.Module, given: Mapping[str, str], scored: bool) -> Identity:
        named = module.named_parameters()
        norms = {name: (list(p.shape), float(p.detach().double().norm())) for name, p in named}
        return cls(pass_, norms, given, scored)

    def difference(self, other: Identity) -> str | None:
        """How a checkpoint of `other` differs from one of this, in words; None if it does not."""
        if self.pass_ != other.pass_:
            return f"is one of {other.pass_}, not of {self.pass_}"
        if self.norms.keys() != other.norms.keys():
            names = sorted(self.norms.keys() ^ other.norms.keys())
            return f"is one of another model: only one of both has '{names[0]}'"
        for name, (shape, norm) in self.norms.items():
            theirs, start = other.norms[name]
            if shape != list(theirs):
                return f"is one of another model: '{name}' is {list(theirs)} there, {shape} here"
            if abs(norm - start) > _ALIKE * max(norm, start):
                return f"started from other weights: '{name}' had the norm {start:.6g} there, {norm:.6g} here"
        if self.scored != other.scored:
            return f"is of a training {'with' if other.scored else 'without'} evaluate"
        return None

    def changed(self, other: Identity) -> str:
        """What the user gave that is known to differ, as words after "another"; empty where nothing is.

        A function whose calls change globals that it reads differs too.
        """
        pairs = {name: (checksum, other.given.get(name, "")) for name, checksum in self.given.items()}
        different = (name for name, (mine, theirs) in pairs.items() if mine and theirs and mine != theirs)
        return " and another ".join(different)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on.

    Attributes:
        identity: what it belongs to.
        progress: numbers and texts, as JSON has them.
        state: anything nested that holds tensors: weights, the best ones, the optimizer.
    """

    identity: Identity
    progress: Mapping[str, Any]
    state: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes into a folder, made if missing; an older checkpoint there stays until this one is complete.

        Raises:
            InvalidInput: the folder can't be made or written to, or the disk is full.
        """
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        state = _taken_out(self.state, tensors)
        make_folder(folder)
        with written_beside(folder / CHECKPOINT_FILE) as draft:
            try:
                save_file(tensors, draft / _TENSORS_FILE)
            except Exception as error:  # safetensors raises a type of its own where the disk is full
                raise OSError(str(error)) from error
            record = {
                "format": _FORMAT,
                "identity": dataclasses.asdict(self.identity),
                "progress": dict(self.progress),
                "tensors": name_by_content(draft / _TENSORS_FILE).name,
                "state": state,
            }
            (draft / CHECKPOINT_FILE).write_text(json.dumps(record), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, identity: Identity) -> Checkpoint | None:
        """Reads what `write` wrote; None if nothing was written.

        Raises:
            InvalidInput: it is damaged, or belongs to another model or another pass.
        """
        file = folder / CHECKPOINT_FILE
        if not file.exists():
            return None
        record = read_json(file)
        if record.get("format") != _FORMAT:
            raise InvalidInput(f"{file} has format {record.get('format')}; this version reads format {_FORMAT}")
        try:
            stored = Identity(**record["identity"])
            different = identity.difference(stored)
            if different is not None:
                raise InvalidInput(f"the checkpoint in {folder} {different}; give another checkpoint_dir, or empty it")
            if (changed := identity.changed(stored)) and record["progress"].get("done"):
                raise InvalidInput(
                    f"the checkpoint in {folder} is of a training that ended, with another {changed}; give another "
                    "checkpoint_dir, or empty it"
                )
            path = folder / Path(record["tensors"]).name
            check_named_by_content(path)
            return cls(stored, record["progress"], _filled(record["state"], read_safetensors(path)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{file} is damaged ({type(error).__name__}: {error}); remove it") from error


def _taken_out(state: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The state as JSON, its tensors moved to a table and their keys in their places; tied tensors are stored twice."""
    if isinstance(state, Mapping):
        return {"dict": [[key, _taken_out(entry, tensors)] for key, entry in state.items()]}
    if isinstance(state, (list, tuple)):
        return {"list": [_taken_out(entry, tensors) for entry in state]}
    if not isinstance(state, torch.Tensor):
        return {"value": state}
    key = str(len(tensors))
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    tensor = state.detach().cpu().contiguous()
    tensors[key] = tensor.clone() if tensor.untyped_storage().data_ptr() in known else tensor
    return {"tensor": key}


def _filled(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that `_taken_out` took the tensors out of."""
    ((kind, value),) = record.items()
    if kind == "dict":
        return {key: _filled(entry, tensors) for key, entry in value}
    if kind == "list":
        return [_filled(entry, tensors) for entry in value]
    return tensors[value] if kind == "tensor" else value
