"""Recurrent layers as one ONNX node a layer.

`torch.onnx` unrolls `nn.RNN` step by step, and its own GRU has the example's number of rows written into the file where
the steps come first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18

from lobo_fx.errors import ExportError
from lobo_fx.graph.operators import arguments, aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import describe
from lobo_fx.graph.recurrent import Parameters

__all__ = ["RECURRENT_TRANSLATIONS", "refuse_projections"]

op: Any = opset18  # its types know nothing of the Python numbers that it takes


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An ONNX operator that stands for one of PyTorch's.

    Attributes:
        operator: its name.
        gates: PyTorch's gates, which are stacked along the rows of every parameter, in ONNX's order.
        activations: of one direction; none for the operator's own.
        settings: attributes that make it PyTorch's.
    """

    operator: Callable[..., Any]
    gates: tuple[int, ...]
    activations: tuple[str, ...] = ()
    settings: tuple[tuple[str, int], ...] = ()


def _translation(kind: _Kind) -> Callable[..., Any]:
    def translate(  # type: ignore[no-untyped-def]
        x,
        hx,
        params,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ):
        """X `[steps, rows, inputs]`, W `[directions, gates · hidden, inputs]`, B `[directions, 2 · gates · hidden]`."""
        states = hx if isinstance(hx, Sequence) else [hx]
        directions, own = 2 if bidirectional else 1, 4 if has_biases else 2
        settings: dict[str, Any] = {
            "direction": "bidirectional" if bidirectional else "forward",
            "hidden_size": params[1].shape[1],
            **dict(kind.settings),
        }
        if kind.activations:
            settings["activations"] = list(kind.activations) * directions
        finals = []
        if batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        for layer in range(num_layers):
            first = layer * directions
            of_layer = params[first * own : (first + directions) * own]
            weight, recurrent, *biases = (_stacked(of_layer[at::own], kind.gates) for at in range(own))
            bias = op.Concat(*biases, axis=1) if biases else None
            starts = [op.Slice(state, [first], [first + directions], [0]) for state in states]
            every, *last = kind.operator(x, weight, recurrent, bias, None, *starts, **settings)
            x = op.Reshape(op.Transpose(every, perm=[0, 2, 1, 3]), [0, 0, -1])  # directions side by side
            finals.append(last)
        if batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        return x, *(_joined(of_layers) for of_layers in zip(*finals, strict=True))

    return translate


def _stacked(of_directions: Sequence[Any], gates: tuple[int, ...]) -> Any:
    """A parameter of all directions, its gates in ONNX's order: `[directions, gates · hidden, …]`."""
    every = []
    for parameter in of_directions:
        if len(gates) > 1:
            parts = op.Split(parameter, num_outputs=len(gates), axis=0)
            parameter = op.Concat(*(parts[gate] for gate in gates), axis=0)
        every.append(op.Unsqueeze(parameter, [0]))
    return _joined(every)


def _joined(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else op.Concat(*values, axis=0)


def refuse_projections(program: Program) -> None:
    """Refuses what ONNX has no operator for.

    Raises:
        ExportError: an LSTM projects its states.
    """
    for node in program.graph.find_nodes(op="call_function", target=aten.lstm.input):
        if Parameters.of(arguments(node)).is_projected:
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
"""For `torch.onnx.export`."""
