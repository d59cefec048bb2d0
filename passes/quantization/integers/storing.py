"""Stores weights of operators that stay float as int8: a small file at the speed of float."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.graph.shapes import propagate
from lobo_fx.passes.quantization.integers.naming import look_up_codes
from lobo_fx.passes.quantization.integers.placement import Placement
from lobo_fx.passes.quantization.quantize_weights import QuantizeWeights

__all__ = ["store_rest"]


def store_rest(
    program: Program, placement: Placement, context: Context, factors: Mapping[str, torch.Tensor] | None = None
) -> Program:
    """Stores weights that no integer kernel reads as int8, decoded when the file is loaded.

    Weights that overrides leave float stay as they are; every other weight that stays float is noted with the reason.

    Args:
        program: the converted program.
        placement: where integers run.
        context: takes notes.
        factors: factors that columns of weights are multiplied by before they are rounded, by name.
    """
    look_up_codes(program, placement.overridden)
    propagate(program.module)  # nodes that `convert` inserted have no shapes yet
    nodes = {node.name: node for node in program.graph.nodes}
    left = [nodes[name] for name in placement.overridden if name in nodes]
    named = {str(source.target) for node in left for source in node.all_input_nodes}
    own = dataclasses.replace(context, notes=[])
    program = QuantizeWeights(block_size=None, method="round").store(program, own, named, factors)
    context.notes.extend(note for note in own.notes if note.parameter and note not in context.notes)
    return program
