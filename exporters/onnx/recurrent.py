"""Translates every recurrent layer to one ONNX node.

`torch.onnx` unrolls `nn.RNN` step by step, and its own GRU writes the example's number of rows into the file where the
steps come first.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18

from lobo_fx.errors import ExportError
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.recurrent import Recurrent

__all__ = ["RECURRENT_TRANSLATIONS", "refuse_projections"]

op: Any = opset18  # its types know nothing of the Python numbers that it takes


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An ONNX operator that stands for one of PyTorch's.

    Attributes:
        operator: its name.
        gates: PyTorch's gates, which are stacked along the rows of every parameter, in ONNX's order.
        activations: activations of one direction; empty for the operator's own.
        settings: attributes with which it computes as PyTorch's operator does.
    """

    operator: Callable[..., Any]
    gates: tuple[int, ...]
    activations: tuple[str, ...] = ()
    settings: tuple[tuple[str, int], ...] = ()


def _translation(kind: _Kind) -> Callable[..., Any]:
    def translate(*args: Any, **kwargs: Any) -> Any:
        """X `[steps, rows, inputs]`, W `[directions, gates · hidden, inputs]`, B `[directions, 2 · gates · hidden]`."""
        call = Recurrent(*args, **kwargs)
        assert call.is_single
        settings: dict[str, Any] = {
            "direction": "bidirectional" if call.bidirectional else "forward",
            "hidden_size": call.params[1].shape[1],
            **dict(kind.settings),
        }
        if kind.activations:
            settings["activations"] = list(kind.activations) * call.directions
        x = op.Transpose(call.input, perm=[1, 0, 2]) if call.batch_first else call.input
        weight, recurrent, *biases = (_stacked(parameter, kind.gates) for parameter in zip(*call.cells, strict=True))
        bias = op.Concat(*biases, axis=1) if biases else None
        every, *last = kind.operator(x, weight, recurrent, bias, None, *call.states, **settings)
        every = op.Reshape(op.Transpose(every, perm=[0, 2, 1, 3]), [0, 0, -1])  # directions side by side
        return op.Transpose(every, perm=[1, 0, 2]) if call.batch_first else every, *last

    # `torch.onnx` asks a function for its arguments' names, and takes what is annotated as a number for an attribute.
    translate.__signature__ = inspect.signature(Recurrent)  # type: ignore[attr-defined]
    hints = typing.get_type_hints(Recurrent)
    translate.__annotations__ = {name: hint for name, hint in hints.items() if hint in (bool, int, float)}
    return translate


def _stacked(of_directions: Sequence[Any], gates: tuple[int, ...]) -> Any:
    """A parameter of all directions, its gates in ONNX's order: `[directions, gates · hidden, …]`."""
    every = []
    for parameter in of_directions:
        if len(gates) > 1:
            parts = op.Split(parameter, num_outputs=len(gates), axis=0)
            parameter = op.Concat(*(parts[gate] for gate in gates), axis=0)
        every.append(op.Unsqueeze(parameter, [0]))
    return every[0] if len(every) == 1 else op.Concat(*every, axis=0)


def refuse_projections(program: Program) -> None:
    """Refuses LSTMs that ONNX has no operator for.

    Raises:
        ExportError: an LSTM projects its states.
    """
    for node in program.graph.find_nodes(op="call_function", target=aten.lstm.input):
        if Recurrent.of(node).is_projected:
            raise ExportError(
                f"{describe(node)} projects its states (proj_size), which ONNX has no operator for; "
                "leave proj_size out and put a linear layer after it"
            )


RECURRENT_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.lstm.input: _translation(_Kind(op.LSTM, (0, 3, 1, 2))),  # i, f, g, o → i, o, f, g
    aten.gru.input: _translation(_Kind(op.GRU, (1, 0, 2), settings=(("linear_before_reset", 1),))),  # r, z, n → z, r, n
    aten.rnn_tanh.input: _translation(_Kind(op.RNN, (0,), ("Tanh",))),
    aten.rnn_relu.input: _translation(_Kind(op.RNN, (0,), ("Relu",))),
}
"""Translations of recurrent layers, for `torch.onnx.export`."""
