"""Biases that take back the mean error which quantization adds to a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.layers import Layer, layer_of
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.running import Runner
from lobo_fx.graph.tensors import fetch
from lobo_fx.passes.fitting.side_by_side import Pair, Pairs, side_by_side
from lobo_fx.passes.quantization.integers.simulation import simulated

__all__ = ["correct_biases", "shrunken_mean"]


def correct_biases(prepared: fx.GraphModule, batches: Sequence[Inputs], show_progress: bool) -> None:
    """Shifts the biases of all layers, in place; each error is measured on the inputs that the layer will really get.

    Args:
        prepared: the program with observers that have seen data.
        batches: calibration data, held in memory at once.
        show_progress: whether to draw a progress bar.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2,
        with means from data, shrunk by how far rows disagree.
    """
    floating, quantized = simulated(prepared, ()), simulated(prepared)
    leaves = [(batch.leaves, False) for batch in batches]
    with torch.no_grad(), Pairs(prepared.graph, prepared.graph, leaves) as pairs:
        for node in side_by_side(floating, quantized, pairs, _is_biased, "correct biases", show_progress):
            layer = layer_of(node)
            assert layer is not None
            assert layer.bias is not None
            observed = layer.bias.args[0] if layer.bias.op == "call_module" else layer.bias
            read = weight_node(observed)
            if read is not None and len(read.users) == 1:
                shift = shrunken_mean(torch.cat([_errors(layer, pair, quantized) for pair in pairs]))
                pairs.fix(layer.bias, fetch(prepared, str(read.target)).add_(shift))


def _is_biased(node: fx.Node) -> bool:
    layer = layer_of(node)
    return layer is not None and layer.bias is not None


def shrunken_mean(errors: torch.Tensor) -> torch.Tensor:
    """Mean of each column, shrunk by what chance may explain: of few rows, only what they agree on is left.

    Args:
        errors: rows × columns.

    Source: James and Stein, "Estimation with Quadratic Loss", 1961, by column; the positive part.
    """
    if len(errors) < 2:
        return errors.new_zeros(errors.shape[1:])
    mean, chance = errors.mean(0), errors.var(0) / len(errors)
    return mean * (1 - chance / mean.square()).nan_to_num(0.0).clamp_min(0)


def _errors(layer: Layer, pair: Pair, quantized: Runner) -> torch.Tensor:
    """Mean errors by channel: (rows of the batch, channels)."""
    error: torch.Tensor = pair.before[layer.node] - quantized.evaluate(layer.node, pair.after)
    error = error if layer.is_batched else error[None]
    channels_last: torch.Tensor = error.movedim(layer.kind.channel_dim, -1).double()
    between = tuple(range(1, channels_last.dim() - 1))
    return channels_last.mean(between) if between else channels_last
