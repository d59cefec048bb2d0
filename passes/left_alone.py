"""Notes the parameters that a pass on weights left as they were, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.program import Program

__all__ = ["note_left_alone"]


def note_left_alone(program: Program, treated: Iterable[torch.Tensor], context: Context) -> None:
    """Notes every parameter of two or more dimensions that was not treated, and what reads it instead of a layer.

    Args:
        program: as the pass found it, or left it.
        treated: the parameters that the pass treated.
        context: takes the notes.
    """
    known = {id(tensor) for tensor in treated}
    readers: dict[int, fx.Node] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if (read := weight_node(source)) is not None:
                readers.setdefault(id(program.parameter(read)), node)
    for name, parameter in program.module.named_parameters():
        if parameter.dim() < 2 or not parameter.numel() or id(parameter) in known:
            continue
        reader = readers.get(id(parameter))
        reason = "nothing reads it" if reader is None else f"{reader.target} reads it, which is no layer"
        context.note(f"is left alone: {reason}", parameter=name)
