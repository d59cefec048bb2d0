"""Inputs of a program with other sizes than in its example, and as arrays by their names in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import names_in

__all__ = ["named_arrays", "other_lengths", "with_rows", "with_sizes"]


def with_rows(program: Program, count: int) -> Inputs:
    """The example inputs with `count` rows, by repeating or cutting, if the batch is free."""
    return with_sizes(program, program.example_inputs, {program.signature.batch or "": count})


def with_sizes(program: Program, inputs: Inputs, sizes: Mapping[str, int]) -> Inputs:
    """Inputs with other sizes of the named free dimensions, by repeating or cutting."""
    specs = iter(spec for spec in program.signature.inputs if spec is not None)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        for at, name in enumerate(next(specs).shape):
            if (size := sizes.get(str(name))) is not None:
                times = -(-size // tensor.shape[at])
                repeats = [times if position == at else 1 for position in range(tensor.dim())]
                tensor = tensor.repeat(repeats).narrow(at, 0, size).contiguous()
        return tensor

    return inputs.map(resize)


def other_lengths(program: Program, share: float = 0.0) -> list[dict[str, int]]:
    """Other sizes to test of all free dimensions but the batch: once all shorter, once all longer than in the example.

    Args:
        program: the program with its example.
        share: distance as a share of the example's size; at least one step.

    Returns:
        Sizes by name. A dimension that can't be shorter (or longer) is left out; empty ones are dropped.
    """
    signature = program.signature
    shapes = [spec.shape for spec in signature.inputs if spec is not None]
    pairs = [
        pair
        for shape, tensor in zip(shapes, program.example_inputs.tensors, strict=True)
        for pair in zip(shape, tensor.shape, strict=True)
    ]
    computed = [names_in(name) for name, _ in pairs if isinstance(name, str) and not name.isidentifier()]
    found = {str(name): size for name, size in pairs if isinstance(name, str) and name != signature.batch}
    free = [d for d in signature.free if d.name in found and not any(d.name in names for names in computed)]
    away = {d.name: d.step * max(1, int(share * found[d.name]) // d.step) for d in free}
    chosen = [
        {d.name: size for d in free if (size := found[d.name] + sign * away[d.name]) > 1 and d.allows(size)}
        for sign in (-1, 1)
    ]
    return [sizes for sizes in chosen if sizes]


def named_arrays(program: Program, inputs: Inputs) -> dict[str, Any]:
    """Inputs as numpy arrays, by their names in an exported file."""
    pairs = zip(program.signature.inputs, inputs.leaves, strict=True)
    return {spec.name: leaf.detach().cpu().numpy() for spec, leaf in pairs if spec is not None}
