"""A program on its way out: re-captured by `torch.export`, and its inputs by name and with any batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lobo_fx.errors import ExportError
from lobo_fx.graph.inputs import Inputs, dynamic_shapes_of
from lobo_fx.graph.program import Program
from lobo_fx.graph.recurrent import not_unrolled
from lobo_fx.measures.counts import rows
from lobo_fx.terminal.quiet import quiet

__all__ = ["exported_program", "named_arrays", "with_rows"]


def exported_program(program: Program) -> ExportedProgram:
    """The program as `torch.export` has it, in inference mode, free dimensions kept free.

    Raises:
        ExportError: `torch.export` refuses the rewritten graph.
    """
    specs = iter(program.signature.inputs)
    symbols = {size for spec in program.signature.inputs if spec for size in spec.shape if isinstance(size, str)}
    dims = {name: Dim(name) if name.isidentifier() else Dim.AUTO for name in symbols}

    def free(leaf: object) -> dict[int, Any] | None:
        spec = next(specs)
        sizes = spec.shape if spec else ()
        return {i: dims[size] for i, size in enumerate(sizes) if isinstance(size, str)} or None

    inputs = with_rows(program, max(2, rows(program)))
    shapes = dynamic_shapes_of(inputs, program.signature.names[: program.signature.positional], free)
    with quiet(), not_unrolled(), program.inference():
        try:
            return torch.export.export(
                program.module, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False
            )
        except Exception as error:
            raise ExportError(f"torch.export refuses the rewritten graph: {error}") from error


def with_rows(program: Program, count: int) -> Inputs:
    """The example inputs with `count` rows, repeated or cut, where the batch is free."""
    specs = iter(spec for spec in program.signature.inputs if spec is not None)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        spec = next(specs)
        if not spec.shape or spec.shape[0] != "batch":
            return tensor
        times = -(-count // tensor.shape[0])
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:count].contiguous()

    return program.example_inputs.map(resize)


def named_arrays(program: Program, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names that an exported file gives them, as numpy arrays."""
    pairs = zip(program.signature.inputs, inputs.leaves, strict=True)
    return {spec.name: leaf.detach().cpu().numpy() for spec, leaf in pairs if spec is not None}
