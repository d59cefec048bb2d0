"""Data for the command line: arrays from files, a Python function, or random data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lobo_fx.contracts.context import Data
from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.files import check_readable, check_unpacked_size
from lobo_fx.graph.inputs import Inputs, as_inputs

__all__ = ["LABELS", "random_batches", "read_batches", "read_example_inputs", "read_training_batches"]

LABELS = "labels"
"""Name of the array that holds the labels in a file of training data."""

_ARRAYS = (".npy", ".npz", ".safetensors")


def read_batches(spec: str, batch: int = 1) -> Data:
    """Batches from `.npy`, `.npz` or `.safetensors` (an array per input, rows first), or `file.py:function`.

    Args:
        spec: the file, or the function that returns an iterable of batches.
        batch: rows per batch, for arrays.

    Raises:
        InvalidInput: no such file or function, an unknown format, a damaged file, pickled objects, or no rows.
    """
    if batch < 1:
        raise InvalidInput(f"batch is {batch}; it must be at least 1")
    path = Path(spec)
    if path.suffix in _ARRAYS:
        return _rows(path, _read_arrays(path), batch)
    made = _made(spec)
    if not isinstance(made, Iterable):
        raise InvalidInput(f"{spec} returns a {type(made).__name__}; expected batches (a list or a DataLoader)")
    return made


def read_example_inputs(spec: str) -> Inputs:
    """Example inputs: the single array of a file, arrays by the names of inputs, or the result of a function.

    Args:
        spec: as `read_batches` takes it; a function returns a tensor, a tuple, or a dict of keyword inputs.

    Raises:
        InvalidInput: as `read_batches`; or the data can't be the inputs of a call.
    """
    path = Path(spec)
    if path.suffix not in _ARRAYS:
        return as_inputs(_made(spec))
    arrays = _read_arrays(path)
    return as_inputs(arrays[""] if set(arrays) == {""} else arrays)


def _made(spec: str) -> Any:
    """The result of a function in the user's file."""
    source, _, name = spec.rpartition(":")
    if not source.endswith(".py"):
        raise InvalidInput(f"'{spec}' is no data: give a .npy, .npz or .safetensors file, or file.py:function")
    from lobo_fx.sources.user_code import call_from_file

    return call_from_file(Path(source), name)


def read_training_batches(spec: str, batch: int = 1) -> Data:
    """Batches with labels: as `read_batches`, from arrays of which one is named `labels` and the others are inputs.

    If there is a single other array, a batch is a pair of it and the labels.

    Raises:
        InvalidInput: as `read_batches`; or a file without labels.
    """
    if Path(spec).suffix == ".npy":
        raise InvalidInput(f"{spec} holds one array; training data has labels too: give a .npz or .safetensors file")
    found = read_batches(spec, batch)
    if Path(spec).suffix not in (".npz", ".safetensors"):
        return found
    first = next(iter(found))
    if LABELS not in first:
        raise InvalidInput(f"{spec} has no array '{LABELS}'; {suggestion(LABELS, first)}")
    others = [name for name in first if name != LABELS]
    if not others:
        raise InvalidInput(f"{spec} holds labels and no inputs")
    return [(entry[others[0]], entry[LABELS]) for entry in found] if len(others) == 1 else found


def _read_arrays(path: Path) -> Mapping[str, torch.Tensor]:
    check_readable(path)
    if not path.stat().st_size:
        raise InvalidInput(f"{path} is empty")
    if path.suffix == ".safetensors":
        from lobo_fx.sources.checkpoints import read_safetensors

        return read_safetensors(path)
    try:
        check_unpacked_size(path)
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            if set(arrays) == {"arr_0"}:  # what `np.savez` calls an array that is given no name
                arrays = {"": arrays["arr_0"]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{path} can't be read as plain arrays: {error}") from error


def _rows(path: Path, arrays: Mapping[str, torch.Tensor], batch: int) -> list[Any]:
    """A list of batches: tensors where the file has one unnamed array, dicts otherwise."""
    counts = {name: len(array) if array.dim() else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise InvalidInput(f"the arrays in {path} have different numbers of rows: {counts}")
    count = next(iter(counts.values()), 0)
    if not count:
        raise InvalidInput(f"{path} holds no rows; the first dimension of each array counts samples")
    cuts = [slice(start, start + batch) for start in range(0, count, batch)]
    if set(arrays) == {""}:
        return [arrays[""][cut] for cut in cuts]
    return [{name: array[cut] for name, array in arrays.items()} for cut in cuts]


def random_batches(inputs: Inputs, count: int, seed: int = 0) -> list[Inputs]:
    """Random calibration data: normal floats; integers are permuted from the example inputs.

    Good enough to measure latency and size; ranges for accuracy need real data.

    Raises:
        InvalidInput: `count` is not positive.
    """
    if count < 1:
        raise InvalidInput(f"{count} random batches; at least 1 is needed")
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        order = torch.randperm(tensor.numel(), generator=generator)
        return tensor.flatten()[order].view_as(tensor)

    return [inputs.map(draw) for _ in range(count)]
