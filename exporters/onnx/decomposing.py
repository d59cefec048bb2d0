"""Decomposes, in place, the calls that `torch.onnx` has no function for.

`torch.onnx.export` decomposes by tracing the whole program again, which takes longer than translating it. Here only
the calls that need it are traced, and `torch.onnx` is told that the result is decomposed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from lobo_fx.exporters.onnx.translations import Translations, decompositions, is_translated
from lobo_fx.graph.decomposing import decomposition, put_in_place
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.tensors import fetch

__all__ = ["as_decomposed", "with_translated_calls"]


def with_translated_calls(program: Program, table: Translations) -> Program:
    """The program with calls of operators that nothing translates replaced by their decompositions.

    Args:
        program: shapes propagated.
        table: translations beside those of `torch.onnx`.
    """
    if not any(_is_left(node, table) for node in program.graph.nodes):
        return program
    program = program.lazy_clone()
    for node in list(program.graph.nodes):
        if _is_left(node, table):
            _decompose(node)
    program.graph.eliminate_dead_code()
    program.module.recompile()
    return program


def as_decomposed(exported: ExportedProgram, table: Translations) -> ExportedProgram:
    """The same program, which tells `torch.onnx` that it is decomposed already, if it is.

    If something is left, a branch for instance, `torch.onnx` decomposes as usual.
    """
    if not any(_is_left(node, table) or _is_branch(node) for node in exported.graph.nodes):
        exported.run_decompositions = lambda decomp_table=None: exported
    return exported


def _is_left(node: fx.Node, table: Translations) -> bool:
    """Whether `torch.onnx` would have to decompose a call."""
    return node.op == "call_function" and not is_translated(node.target, table)


def _is_branch(node: fx.Node) -> bool:
    module = node.graph.owning_module
    return node.op == "get_attr" and module is not None and isinstance(fetch(module, str(node.target)), fx.GraphModule)


def _lstm_cell(
    x: torch.Tensor, state: Sequence[torch.Tensor], *weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, memory = state
    from_x, from_hidden = _gates(x, hidden, *weights)
    enters, stays, new, leaves = (from_x + from_hidden).chunk(4, 1)
    memory = stays.sigmoid() * memory + enters.sigmoid() * new.tanh()
    return leaves.sigmoid() * memory.tanh(), memory


def _gru_cell(x: torch.Tensor, hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    (reset, stays, new), (old_reset, old_stays, old) = (part.chunk(3, 1) for part in _gates(x, hidden, *weights))
    new = (new + (reset + old_reset).sigmoid() * old).tanh()
    return new + (stays + old_stays).sigmoid() * (hidden - new)


def _rnn_cell(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, hidden, *weights: activation(sum(_gates(x, hidden, *weights)))  # type: ignore[arg-type]


def _gates(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight_x: torch.Tensor,
    weight_hidden: torch.Tensor,
    bias_x: torch.Tensor | None = None,
    bias_hidden: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    linear = nn.functional.linear
    return linear(x, weight_x, bias_x), linear(hidden, weight_hidden, bias_hidden)


def _kth_value(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[torch.Tensor, ...]:
    """The k-th smallest values and their positions."""
    found = (part.select(dim, k - 1) for part in x.sort(dim))
    return tuple(part.unsqueeze(dim) if keepdim else part for part in found)


def _stable_sort(
    x: torch.Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[torch.Tensor, ...]:
    return tuple(x.sort(dim, descending))  # a file's TopK keeps the order of what is equal


def _median_along(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, ...]:
    return _kth_value(x, (x.shape[dim] + 1) // 2, dim, keepdim)  # of two in the middle, the lower


_FORMULAS: dict[object, Callable[..., Any]] = {
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _gru_cell,
    aten.rnn_tanh_cell.default: _rnn_cell(torch.tanh),
    aten.rnn_relu_cell.default: _rnn_cell(torch.relu),
    aten.sort.stable: _stable_sort,
    aten.kthvalue.default: _kth_value,
    aten.median.dim: _median_along,
    aten.median.default: lambda x: _median_along(x.flatten(), 0)[0],
}
"""Formulas of operators that `torch.onnx` can't translate, nor what PyTorch decomposes them into."""


def _decompose(node: fx.Node) -> None:
    """Replaces `node` by its decomposition; without one, `torch.onnx` is left to refuse the operator."""
    found = decomposition(node, _FORMULAS.get(node.target, node.target), decompositions())  # type: ignore[arg-type]
    if found is not None:
        put_in_place(node, found)
