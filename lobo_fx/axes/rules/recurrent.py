"""Recurrent layers, whose gates are stacked along dimension 0 of their weights."""

from __future__ import annotations

from typing import Any

from lobo_fx.axes.axis import Axis, concatenation, product
from lobo_fx.axes.call import Axes, Call, axis_rule, lock_all, sizes_of
from lobo_fx.axes.zeros import MOVED
from lobo_fx.graph.operators import aten
from lobo_fx.graph.recurrent import Recurrent

__all__ = ["cell", "recurrent"]

_GATES: dict[Any, int] = {
    **dict.fromkeys([aten.lstm.input, aten.lstm_cell.default], 4),
    **dict.fromkeys([aten.gru.input, aten.gru_cell.default], 3),
    **dict.fromkeys([aten.rnn_tanh.input, aten.rnn_relu.input], 1),
    **dict.fromkeys([aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default], 1),
}


@axis_rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, zeros=MOVED)
def recurrent(call: Call) -> list[Axes]:
    """Per direction: w_ih[(g·h) i], w_hh[(g·h) h], biases [(g·h)]; outputs of both directions are concatenated."""
    given = Recurrent(**call.given)
    states = given.states
    if not given.is_single:
        return _locked(call, given)
    x, first = call.axes("input"), call.of(states[0])
    hidden = call.fresh(first[-1].find().size)
    hidden.mark("hidden")
    for parameters in given.cells:
        own = [call.of(parameter) for parameter in parameters]
        _cell(call, own, x[-1], hidden)
        for matrix in own[:2]:
            call.multiplies(*x[:-1], *matrix)
    for state in states:
        axes = call.of(state)
        call.unify(axes[-1], hidden)
        lock_all(axes[:-1], "it counts the layers or rows of a recurrent state")
    outputs = concatenation([hidden] * given.directions) if given.directions > 1 else hidden
    return [(*x[:-1], outputs), *((*first[:-1], hidden) for _ in states)]


def _locked(call: Call, given: Recurrent) -> list[Axes]:
    """A layer with projected states: its input may be cut, its states are locked."""
    x = call.axes("input")
    for index, parameters in enumerate(given.cells):
        for place, parameter in enumerate(parameters):
            axes = call.of(parameter)
            if len(axes) == 2:
                call.multiplies(*x[:-1], *axes)
            if place == 0 and index < given.directions:
                call.unify(axes[1], x[-1])
                axes = axes[:1]
            lock_all(axes, "it belongs to projected states")
    for state in given.states:
        lock_all(call.of(state), "it belongs to projected states")
    sizes = [sizes_of(value) for value in call.node.meta["val"]]
    outputs = [tuple(call.fixed(size, "it belongs to projected states") for size in own) for own in sizes]
    return [(*x[:-1], outputs[0][-1]), *outputs[1:]]


@axis_rule(
    *(aten.lstm_cell.default, aten.gru_cell.default),
    *(aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default),
    zeros=MOVED,
)
def cell(call: Call) -> Axes | list[Axes]:
    """One step: w_ih[(g·h) i], w_hh[(g·h) h], biases [(g·h)], states [n h]."""
    lstm = call.node.target is aten.lstm_cell.default
    states = [call.of(state) for state in (call.given["hx"] if lstm else [call.given["hx"]])]
    x, hidden = call.axes("input"), states[0][-1]
    hidden.mark("hidden")
    for state in states[1:]:
        hidden = call.unify(hidden, state[-1])
    biases = [call.axes(name) for name in ("b_ih", "b_hh") if call.has(name)]
    _cell(call, [call.axes("w_ih"), call.axes("w_hh"), *biases], x[-1], hidden)
    output = (*call.broadcast([x[:-1], *(state[:-1] for state in states)]), hidden)
    return [output, output] if lstm else output


def _cell(call: Call, parameters: list[Axes], source: Axis, hidden: Axis) -> None:
    """Unifies the parameters of one layer in one direction with its input and its hidden axis."""
    w_ih, w_hh, *biases = parameters
    call.unify(w_ih[1], source)
    call.unify(w_hh[1], hidden)
    gates = _GATES[call.node.target]
    for stacked in (w_ih[0], w_hh[0], *(bias[0] for bias in biases)):
        call.unify(stacked, product([call.fixed(gates, "it counts the gates of a recurrent layer"), hidden]))
