"""Parity: does a file compute what PyTorch computes, as closely as its arithmetic allows?

A float program must agree to rounding. A quantized one can't be held to that: a value that lies between two
integers may be rounded either way, and deep networks amplify the difference. How much is measured on the
program itself, by moving every value a hundredth of a quantization step before it is rounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.errors import ExportError
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.measures.fidelity import float_outputs, largest_error, signal_to_noise
from lobo_fx.own_operators.integers import dynamic_range
from lobo_fx.own_operators.table import quantizes_inputs

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a float program, as a share of the output range."""
STEP_SHARE = 1e-2
"""How far values are moved to see how a quantized program amplifies rounding, in quantization steps."""
ROUNDING_MARGIN = 6.0
"""Decibels by which a file's rounding noise may exceed the noise so measured: twice its amplitude."""
SAMPLE = 100
"""Output elements that a measurement of noise rests on; fewer are drawn again, up to `MOST_DRAWS` times."""
MOST_DRAWS = 8

_QUANTIZED = ("quantized_decomposed", "lobo_fx")
"""Namespaces of operators on integers."""


def check_parity(program: Program, inputs: Inputs, found: list[Any]) -> float:
    """Compares a runtime's outputs with PyTorch's on the same inputs.

    Args:
        program: what was exported.
        inputs: what both ran on.
        found: the runtime's outputs, numpy arrays in order.

    Returns:
        The largest difference, as a share of the output range.

    Raises:
        ExportError: shapes differ, or values by more than rounding explains.
    """
    outputs = program.run(inputs)
    expected = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    tensors = [torch.from_numpy(array) for array in found]
    if [t.shape for t in expected] != [t.shape for t in tensors]:
        shapes = f"{[list(t.shape) for t in tensors]}, PyTorch {[list(t.shape) for t in expected]}"
        raise ExportError(f"the runtime gives shapes {shapes}; no file was written")
    error = largest_error(expected, tensors)
    if math.isinf(error):
        raise ExportError("the runtime gives NaN or infinity where PyTorch does not; no file was written")
    if error <= FLOAT_TOLERANCE:
        return error
    if not is_quantized(program):
        raise ExportError(
            f"the runtime's outputs differ from PyTorch's by {error:.1e} of their range "
            f"(allowed: {FLOAT_TOLERANCE:.0e}); no file was written"
        )
    agreement = signal_to_noise(expected, tensors)
    needed = rounding_noise(program, inputs) - ROUNDING_MARGIN
    if agreement < needed:
        raise ExportError(
            f"the runtime's outputs agree with PyTorch's to {agreement:.1f} dB; rounding alone would give "
            f"{needed:.1f} dB or better; no file was written"
        )
    return error


def is_quantized(program: Program) -> bool:
    """Whether the graph holds quantize or dequantize operators, or weights in codes."""
    targets = [node.target for node in program.graph.nodes]
    return any(isinstance(t, torch._ops.OpOverload) and t.namespace in _QUANTIZED for t in targets)


def rounding_noise(program: Program, inputs: Inputs) -> float:
    """Signal-to-noise ratio, in decibels, that differences of rounding alone leave in a quantized program.

    The noise of few elements (two logits) is small by chance now and then, so it is the worst of several draws.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  declares the operators that are looked for

    nudged, reference = _Nudge(program.module), program.run(inputs)
    elements = sum(tensor.numel() for tensor in float_outputs(reference))
    ratios = []
    with torch.no_grad():
        for _ in range(min(MOST_DRAWS, math.ceil(SAMPLE / max(elements, 1)))):
            ratios.append(signal_to_noise(reference, nudged.run(*inputs.leaves, enable_io_processing=False)))
    return min([ratio for ratio in ratios if math.isfinite(ratio)], default=-20 * math.log10(FLOAT_TOLERANCE))


class _Nudge(fx.Interpreter):
    """Runs a quantized graph with every value moved by a little before it is quantized."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.generator = torch.Generator().manual_seed(0)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
            args = (self._moved(args[0], args[1]), *args[1:])
        elif quantizes_inputs(target, args):
            args = (self._moved(args[0], dynamic_range(args[0])[0]), *args[1:])
        return super().call_function(target, args, kwargs)

    def _moved(self, value: torch.Tensor, step: torch.Tensor | float) -> torch.Tensor:
        noise = 2 * torch.rand(value.shape, generator=self.generator) - 1
        return value + STEP_SHARE * step * noise
