"""A program on its way out: re-captured by `torch.export`, and its inputs by name and with any batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lobo_fx.capture.free_dimensions import as_dim, write_free_dimensions
from lobo_fx.errors import ExportError
from lobo_fx.graph.inputs import Inputs, dynamic_shapes_of
from lobo_fx.graph.program import Program
from lobo_fx.graph.recurrent import not_unrolled
from lobo_fx.graph.shapes import dimension_names, expression
from lobo_fx.measures.counts import rows
from lobo_fx.terminal.quiet import quiet

__all__ = ["exported_program", "named_arrays", "with_rows"]


def exported_program(program: Program) -> ExportedProgram:
    """The program as `torch.export` has it, in inference mode, free dimensions kept free.

    Raises:
        ExportError: `torch.export` refuses the rewritten graph.
    """
    known = program.module.program_facts.free_dimensions
    dims = {
        symbol: Dim(str(name), min=dimension.lowest, max=dimension.highest)
        for (symbol, name), dimension in zip(dimension_names(program.graph, known).items(), known, strict=True)
    }
    values = iter(node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))

    def free(leaf: object) -> dict[int, Any] | None:
        value = next(values)
        sizes: Any = value.shape if isinstance(value, torch.Tensor) else ()
        return {
            i: as_dim(expression(size), dims) for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)
        } or None

    inputs = with_rows(program, max(2, rows(program)))
    shapes = dynamic_shapes_of(inputs, program.module.forward, free)
    with quiet(), not_unrolled(), program.inference():
        try:
            exported = torch.export.export(
                program.module,
                inputs.args,
                dict(inputs.kwargs),
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # a single size that does not fit is no error
            )
        except Exception as error:
            raise ExportError(f"torch.export refuses the rewritten graph: {error}") from error
    write_free_dimensions(exported, known)
    return exported


def with_rows(program: Program, count: int) -> Inputs:
    """The example inputs with `count` rows, repeated or cut, where the batch is free."""
    signature = program.signature
    batch, specs = signature.batch, iter(spec for spec in signature.inputs if spec is not None)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        spec = next(specs)
        if batch not in spec.shape:
            return tensor
        at = spec.shape.index(batch)
        times = -(-count // tensor.shape[at])
        repeats = [times if position == at else 1 for position in range(tensor.dim())]
        return tensor.repeat(repeats).narrow(at, 0, count).contiguous()

    return program.example_inputs.map(resize)


def named_arrays(program: Program, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names that an exported file gives them, as numpy arrays."""
    pairs = zip(program.signature.inputs, inputs.leaves, strict=True)
    return {spec.name: leaf.detach().cpu().numpy() for spec, leaf in pairs if spec is not None}
