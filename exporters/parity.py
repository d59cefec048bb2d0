"""Parity: does a file compute what PyTorch computes, as closely as its arithmetic allows?

A float program must agree to rounding. A quantized one can't be held to that: a value that lies between two
integers may be rounded either way, and deep networks amplify the difference. How much is measured on the
program itself, by moving every value a hundredth of a quantization step before it is rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lobo_fx.errors import ExportError
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.operators import works_on_codes
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.randomness import drawing, made_of_draws, seeded
from lobo_fx.graph.running import AS_IT_IS, Runner, kept_buffers
from lobo_fx.measures.fidelity import float_outputs, largest_error, signal_to_noise, tensor_leaves
from lobo_fx.measures.judge import Judge
from lobo_fx.own_operators.integers import dynamic_range
from lobo_fx.own_operators.table import quantizes_inputs

__all__ = [
    "FLOAT_TOLERANCE",
    "MOST_DRAWS",
    "ROUNDING_MARGIN",
    "SAMPLE",
    "STEP_SHARE",
    "NoisierThanRounding",
    "Parity",
    "check_draws",
    "check_parity",
    "is_quantized",
    "rounding_noise",
    "state_error",
]

FLOAT_TOLERANCE = 1e-3
"""Largest difference of a float program, as a share of the output range."""
STEP_SHARE = 1e-2
"""How far values are moved to see how a quantized program amplifies rounding, in quantization steps."""
ROUNDING_MARGIN = 6.0
"""Decibels by which a file's rounding noise may exceed the noise so measured: twice its amplitude."""
SAMPLE = 100
"""Output elements that a measurement of noise needs; if outputs have fewer, it is repeated up to `MOST_DRAWS` times."""
MOST_DRAWS = 8


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far a file agrees with PyTorch, in the part of the outputs where it agrees least.

    Attributes:
        error: the largest difference, as a share of the range of the part; NaN where every output is random.
        decibels: PyTorch's energy over that of the difference.
        part: where the decibels are lowest; empty where there is one part.
    """

    error: float
    decibels: float = math.inf
    part: str = ""


class NoisierThanRounding(ExportError):
    """A quantized file agrees with PyTorch less closely than differences of rounding explain.

    Attributes:
        decibels: PyTorch's energy over that of the difference.
    """

    def __init__(self, message: str, decibels: float) -> None:
        super().__init__(message)
        self.decibels = decibels


def check_parity(program: Program, inputs: Inputs, found: list[Any]) -> Parity:
    """Compares a runtime's outputs with PyTorch's on the same inputs; of random outputs, only the shapes.

    Every output is held to its own range, and so is every part that is concatenated into one (see
    `lobo_fx.measures.judge`).

    Args:
        program: the program that was exported.
        inputs: inputs that both ran on.
        found: the runtime's outputs, numpy arrays in order.

    Raises:
        NoisierThanRounding: values of a quantized program differ by more than rounding explains.
        ExportError: shapes differ, or values of a float program.
    """
    judge = Judge(program, [inputs])
    (expected,) = judge.reference
    tensors = [torch.from_numpy(array) for array in found]
    if [t.shape for t in expected] != [t.shape for t in tensors]:
        shapes = f"{[list(t.shape) for t in tensors]}, PyTorch {[list(t.shape) for t in expected]}"
        raise ExportError(f"the runtime gives shapes {shapes}; no file was written")
    random = _random_outputs(program)
    if len(random) == len(expected):
        return Parity(math.nan)
    tensors = [expected[place] if place in random else tensor for place, tensor in enumerate(tensors)]
    reference, parts = judge.split([expected]), judge.split([tensors])
    errors = {name: largest_error(reference[name], part) for name, part in parts.items()}
    decibels = {name: signal_to_noise(reference[name], part) for name, part in parts.items()}
    worst = min(decibels, key=lambda name: decibels[name])
    parity = Parity(max(errors.values()), decibels[worst], worst if len(decibels) > 1 else "")
    if math.isinf(parity.error):
        raise ExportError("the runtime gives NaN or infinity where PyTorch does not; no file was written")
    if parity.error <= FLOAT_TOLERANCE:
        return parity
    if not is_quantized(program):
        raise ExportError(
            f"the runtime's outputs differ from PyTorch's by {parity.error:.1e} of their range "
            f"(allowed: {FLOAT_TOLERANCE:.0e}); no file was written"
        )
    for name in (name for name, error in errors.items() if error > FLOAT_TOLERANCE):

        def elements(outputs: Any, name: str = name) -> list[torch.Tensor]:
            return judge.split([tensor_leaves(outputs)])[name]

        needed = rounding_noise(program, inputs, elements) - ROUNDING_MARGIN
        if decibels[name] < needed:
            where = f" in {name}" if parity.part else ""
            raise NoisierThanRounding(
                f"the runtime's outputs agree with PyTorch's to {decibels[name]:.1f} dB{where}; rounding alone would "
                f"give {needed:.1f} dB or better; no file was written",
                decibels[name],
            )
    return parity


def check_draws(program: Program, inputs: Inputs, first: list[Any], second: list[Any]) -> None:
    """Refuses a file that gives the same twice where the program draws random numbers.

    Args:
        program: the program that was exported.
        inputs: inputs that the file ran on, twice.
        first: the runtime's outputs, numpy arrays in order.
        second: those of the other run.

    Raises:
        ExportError: names the operators that draw.
    """
    still = [place for place in _random_outputs(program) if bool((first[place] == second[place]).all())]
    if not still:
        return
    with torch.no_grad(), program.inference():
        runs = [pytree.tree_leaves(program.module(*inputs.args, **inputs.kwargs)) for _ in range(2)]
    one, other = ([leaf for leaf in run if isinstance(leaf, torch.Tensor)] for run in runs)
    if any(not torch.equal(one[place], other[place]) for place in still):
        names = ", ".join(map(describe, drawing(program.module)))
        raise ExportError(f"the runtime draws no random numbers where the model does ({names}); no file was written")


def state_error(program: Program, inputs: Inputs, second: list[Any]) -> float:
    """The difference at a second call between a file, whose buffers are constants, and a program that writes buffers.

    Args:
        program: the program that was exported.
        inputs: inputs of both calls.
        second: the runtime's outputs of any but its first call, numpy arrays in order.

    Returns:
        The largest difference, as a share of the output range; 0 where rounding explains it, or every output is random.
    """
    with torch.no_grad(), program.inference(), kept_buffers(program.module):
        for _ in range(2):
            with seeded(program.module):
                outputs = program.module(*inputs.args, **inputs.kwargs)
    random = _random_outputs(program)
    pairs = list(zip(tensor_leaves(outputs), map(torch.from_numpy, second), strict=True))
    certain = [pair for place, pair in enumerate(pairs) if place not in random]
    error = largest_error([one for one, _ in certain], [other for _, other in certain]) if certain else 0.0
    return error if error > FLOAT_TOLERANCE else 0.0


def _random_outputs(program: Program) -> list[int]:
    """Which of the tensors that a program returns depend on random numbers."""
    random, leaves = made_of_draws(program.module), pytree.tree_leaves(program.graph.output_node().args[0])
    given = [n for n in leaves if isinstance(n, fx.Node) and isinstance(n.meta["val"], torch.Tensor)]
    return [place for place, node in enumerate(given) if node in random]


def is_quantized(program: Program) -> bool:
    """Whether the graph holds quantize or dequantize operators, or weights in codes."""
    return any(map(works_on_codes, program.graph.nodes))


def rounding_noise(program: Program, inputs: Inputs, part: Callable[[Any], Any] = float_outputs) -> float:
    """Signal-to-noise ratio, in decibels, that differences of rounding alone leave in a quantized program.

    The noise of few elements (two logits) is small by chance now and then, so it is the worst of several draws.

    Args:
        program: the program to run, with values moved a little.
        inputs: inputs of the program.
        part: takes what is compared out of the outputs; all of them if left out.
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  declares the operators that are looked for

    nudged, reference = _nudged(program), part(program.run(inputs))
    elements = sum(tensor.numel() for tensor in float_outputs(reference))
    draws = min(MOST_DRAWS, math.ceil(SAMPLE / max(elements, 1)))
    ratios = [signal_to_noise(reference, part(nudged(inputs))) for _ in range(draws)]
    return min([ratio for ratio in ratios if math.isfinite(ratio)], default=-20 * math.log10(FLOAT_TOLERANCE))


def _nudged(program: Program) -> Runner:
    """Runs a quantized graph with every value moved by a little before it is quantized."""
    generator = torch.Generator().manual_seed(0)

    def instead(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
            step = args[1]
        elif quantizes_inputs(node.target, args):
            step = dynamic_range(args[0])[0]
        else:
            return AS_IT_IS
        noise = 2 * torch.rand(args[0].shape, generator=generator) - 1
        return node.target(args[0] + STEP_SHARE * step * noise, *args[1:], **kwargs)  # type: ignore[operator]

    return Runner(program.module, instead=instead)
