"""Counts of a program: parameters, memory and multiply-accumulates, counted on the program itself, never estimated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.masks import masks
from lobo_fx.graph.program import Program, ProgramModule
from lobo_fx.graph.tensors import memory_of
from lobo_fx.graph.weight_names import weight_names
from lobo_fx.own_operators.table import FLOPS, packed_weights

__all__ = ["Measures", "measure", "named_weights", "rows", "run_counted", "tensor_bytes", "weights"]


@dataclasses.dataclass(frozen=True)
class Measures:
    """Counts of one program.

    Attributes:
        parameters: weights and biases, quantized or not; shared ones counted once.
        nonzero: how many of them are not zero.
        macs: multiply-accumulates of one row of the batch, None where they were not counted.
        bytes: memory of all parameters and buffers, without masks, which no artifact has.
    """

    parameters: int
    nonzero: int
    macs: int | None
    bytes: int

    @property
    def sparsity(self) -> float:
        """Share of the parameters that are zero."""
        return 1 - self.nonzero / self.parameters if self.parameters else 0.0


def weights(module: ProgramModule) -> Iterator[torch.Tensor]:
    """Parameters, and buffers that replace a quantized parameter, decoded if packed; each tensor once."""
    return (weight for _, weight in named_weights(module))


def named_weights(module: ProgramModule) -> Iterator[tuple[str, torch.Tensor]]:
    """As `weights`, with names."""
    names, packed = set(weight_names(module)), packed_weights(module)
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if name in names:
            yield name, packed[name]() if name in packed else buffer


def measure(program: Program, macs: int | None) -> Measures:
    """Counts the program's parameters and memory; `macs` come from `run_counted`."""
    counts = [(tensor.numel(), int(torch.count_nonzero(tensor))) for tensor in weights(program.module)]
    return Measures(
        parameters=sum(count for count, _ in counts),
        nonzero=sum(nonzero for _, nonzero in counts),
        macs=macs,
        bytes=tensor_bytes(program),
    )


def tensor_bytes(program: Program) -> int:
    """Memory of all parameters and buffers without masks; shared ones are counted once."""
    left_out = {memory_of(mask) for mask in masks(program).values()}
    tensors = {memory_of(tensor): tensor for tensor in (*program.module.parameters(), *program.module.buffers())}
    return sum(tensor.nbytes for place, tensor in tensors.items() if place not in left_out)


def run_counted(program: Program) -> tuple[Any, int | None]:
    """Runs the example inputs; returns the outputs and the multiply-accumulates of one row.

    Counts convolutions, matrix products and attention as they run (`torch.utils.flop_counter`); None for graphs with
    `torch.cond`, which the counter can't follow.
    """
    if program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        return program.run(), None
    more: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
        torch.ops.aten._trilinear: _bilinear_flops,
        **FLOPS,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        outputs = program.run()
    return outputs, counter.get_total_flops() // 2 // rows(program)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _recurrent_flops(x: Any, w_ih: Any, w_hh: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Shapes [time, rows, inputs], [gates · hidden, inputs], [gates · hidden, hidden]."""
    return int(2 * x[0] * x[1] * (math.prod(w_ih) + math.prod(w_hh)))


def _bilinear_flops(first: Any, weight: Any, second: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Shapes [rows, inputs], [outputs, inputs, other inputs], [rows, other inputs]."""
    return int(2 * first[0] * math.prod(weight))


def rows(program: Program, inputs: Inputs | None = None) -> int:
    """Rows of the batch in `inputs` (default: the examples); 1 where the batch is fixed."""
    return program.signature.count_rows(inputs or program.example_inputs)
