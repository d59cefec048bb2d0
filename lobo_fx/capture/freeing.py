"""Which sizes of the inputs stay free: the request to `torch.export`, and notes about sizes that became constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from lobo_fx.capture.constants import Constants
from lobo_fx.graph.inputs import Inputs, dynamic_shapes_of
from lobo_fx.graph.shapes import SEQUENCES
from lobo_fx.graph.signature import Signature

__all__ = ["FreeSizes", "constant_notes", "free_sizes", "only_sizes", "step_notes"]


@dataclasses.dataclass(frozen=True)
class FreeSizes:
    """An input with sizes other than the batch that should stay free where the model allows it.

    Attributes:
        path: its place among the inputs as `forward` binds them.
        place: its index among the flattened inputs.
        sizes: the requested sizes in the example, by dimension.
        may_be_features: whether it is a float matrix, whose columns may be features that a weight fixes.
    """

    path: pytree.KeyPath
    place: int
    sizes: dict[int, int]
    may_be_features: bool

    @property
    def name(self) -> str:
        return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in self.path)

    def source(self, dim: int) -> str:
        """The name of a size in `torch.export`."""
        return f"L{pytree.keystr(self.path)}.size()[{dim}]"


def free_sizes(
    inputs: Inputs, forward: Callable[..., Any], which: str, fixed: Collection[tuple[int, int]] = ()
) -> tuple[Inputs, Any, list[FreeSizes]]:
    """Inputs with at least two rows, a specification for `torch.export`, and the sizes requested besides the batch.

    `torch.export` treats a size of 1 as a constant, so a single row is repeated. Only tensors whose first dimension
    equals that of the first tensor have a batch. The batch must stay free, but for "steps"; other sizes may, and torch
    finds out. Sequences are inputs of two or three dimensions, and masks of the same length as one.

    Args:
        inputs: inputs of the model.
        forward: the model's `forward`.
        which: a word of `FREED`; or "lengths" and "sizes", which are "auto" and "all" without the batch; or "steps",
            which is "batch" where only some numbers of rows may be allowed.
        fixed: sizes not to be requested: an input's index among the flattened ones, and a dimension.
    """
    rows = next((tensor.shape[0] for tensor in inputs.tensors if tensor.dim()), 0)

    def carries_batch(leaf: object) -> bool:
        return (
            which not in ("lengths", "sizes")
            and isinstance(leaf, torch.Tensor)
            and leaf.dim() > 0
            and leaf.shape[0] == rows
        )

    if rows == 1:
        inputs = inputs.map(lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if carries_batch(t) else t)
        rows = 2
    batch = Dim.AUTO if which == "steps" else Dim("batch")  # a named Dim would have to allow every size
    lengths = {tensor.shape[1] for tensor in inputs.tensors if tensor.dim() in SEQUENCES}

    def sizes(place: int, leaf: torch.Tensor) -> dict[int, int]:
        every = {} if which in ("batch", "steps") else dict(enumerate(leaf.shape))
        wanted = which in ("all", "sizes") or leaf.dim() in SEQUENCES
        return {
            dim: size
            for dim, size in every.items()
            if dim and (place, dim) not in fixed and (wanted or size in lengths)
        }

    def specify(place: int, leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, torch.Tensor):
            return None
        return ({0: batch} if carries_batch(leaf) else {}) | dict.fromkeys(sizes(place, leaf), Dim.AUTO) or None

    leaves, structure = pytree.tree_flatten_with_path(dynamic_shapes_of(inputs, forward, lambda leaf: leaf))
    requested = [
        FreeSizes(path, place, sizes(place, leaf), leaf.dim() == 2 and leaf.is_floating_point())
        for place, (path, leaf) in enumerate(leaves)
        if isinstance(leaf, torch.Tensor) and sizes(place, leaf)
    ]
    specification = pytree.tree_unflatten([specify(place, leaf) for place, (_, leaf) in enumerate(leaves)], structure)
    return inputs, specification, requested


def only_sizes(requested: Sequence[FreeSizes], signature: Signature) -> set[tuple[int, int]]:
    """Free sizes of which only that of the example is allowed: an input's index, and a dimension."""
    only = {dimension.name for dimension in signature.free if dimension.is_fixed}
    return {
        (entry.place, dim)
        for entry in requested
        for dim in entry.sizes
        if (spec := signature.inputs[entry.place]) is not None and spec.shape[dim] in only
    }


def constant_notes(
    requested: Sequence[FreeSizes], signature: Signature, constants: Constants, sequence: object
) -> list[str]:
    """Notes about inputs of which only the batch is free: where their sizes became constants.

    Args:
        requested: the inputs whose sizes were requested to stay free.
        signature: signature of the traced program.
        constants: constants that the capture located.
        sequence: name of an input that is known to be a sequence.
    """
    notes = []
    for entry in requested:
        spec = signature.inputs[entry.place]
        assert spec is not None
        if any(isinstance(spec.shape[dim], str) for dim in entry.sizes):
            continue
        if entry.may_be_features and entry.name != sequence:
            continue
        fixed = "; ".join(
            f"{size} {_why(size, constants.line(entry.source(dim)))}" for dim, size in entry.sizes.items()
        )
        notes.append(f"'{entry.name}' has fixed sizes but for the batch: {fixed}")
    return notes


def _why(size: int, line: str) -> str:
    if size == 1:
        return "(torch.export takes 1 for a constant: give a longer example)"
    return f"(fixed at {line})" if line else "(fixed by an operator)"


def step_notes(signature: Signature) -> list[str]:
    """Notes about free sizes that may only take some values."""
    return [
        f"'{dimension.name}' is free {dimension}: for sizes between, the model's code goes another way"
        for dimension in signature.free
        if dimension.step > 1
    ]
