"""Biases that take back the mean error which quantization adds to a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lobo_fx.inputs import Inputs
from lobo_fx.masks import weight_node
from lobo_fx.operators import layer_of
from lobo_fx.passes.linear_problem import output_rows
from lobo_fx.passes.side_by_side import Pair, run, side_by_side
from lobo_fx.passes.simulation import Simulated
from lobo_fx.program import fetch


def correct_biases(prepared: fx.GraphModule, batches: Sequence[Inputs], show_progress: bool) -> None:
    """Shifts the biases of all layers, in place; each sees the inputs it will really get.

    Args:
        prepared: with observers that have seen data.
        batches: calibration data, held in memory at once.
        show_progress: whether to draw a progress bar.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2,
        with means from data.
    """
    pairs = [Pair(batch.leaves) for batch in batches]
    floating, quantized = Simulated(prepared, ()), Simulated(prepared)
    with torch.no_grad():
        for node in side_by_side(floating, quantized, pairs, show_progress):
            layer = layer_of(node)
            if layer is None or layer.bias is None:
                continue
            read = weight_node(layer.bias.args[0] if layer.bias.op == "call_module" else layer.bias)
            if read is not None and len(read.users) == 1:
                errors, rows = zip(*(_error(node, pair, quantized) for pair in pairs), strict=True)
                shift = sum(errors) / sum(rows)
                bias = fetch(prepared, str(read.target)).add_(shift)
                for pair in pairs:
                    pair.after[layer.bias] = bias


def _error(node: fx.Node, pair: Pair, quantized: fx.Interpreter) -> tuple[torch.Tensor, int]:
    """Sum of the errors by channel, and over how many rows."""
    error = output_rows(node, pair.before[node] - run(quantized, node, pair.after))
    return error.sum(0, dtype=torch.float64), len(error)
