"""Recurrent layers, whose gates are stacked along one dimension of their weights."""

from __future__ import annotations

from lobo_fx.axes.algebra import AxisError, concatenation, product
from lobo_fx.axes.inference import Axes, Call, axis_rule
from lobo_fx.operators import aten


@axis_rule(aten.lstm.input, aten.gru.input)
def recurrent(call: Call) -> list[Axes]:
    """Per layer and direction: w_ih[(g·h) i], w_hh[(g·h) h], biases [(g·h)]; the next reads all directions."""
    lstm = call.node.target is aten.lstm.input
    gates = 4 if lstm else 3
    states = call.given["hx"] if lstm else [call.given["hx"]]
    parameters, biased = call.given["params"], call.given["has_biases"]
    directions = 2 if call.given["bidirectional"] else 1
    count = 4 if biased else 2
    x = call.axes("input")
    first = call.inference.of(states[0])
    if len(parameters) != count * directions * call.given["num_layers"]:
        raise AxisError("projected states are not understood")
    hidden = call.fresh(first[-1].find().size)
    hidden.mark("hidden")
    source = x[-1]
    for layer in range(call.given["num_layers"]):
        for direction in range(directions):
            at = count * (layer * directions + direction)
            w_ih, w_hh, *biases = (call.inference.of(p) for p in parameters[at : at + count])
            call.unify(w_ih[1], source)
            call.unify(w_hh[1], hidden)
            for stacked in (w_ih[0], w_hh[0], *(bias[0] for bias in biases)):
                call.unify(stacked, product([call.fixed(gates, "it counts the gates of a recurrent layer"), hidden]))
        source = concatenation([hidden] * directions) if directions > 1 else hidden
    for state in states:
        axes = call.inference.of(state)
        call.unify(axes[-1], hidden)
        call.inference.lock_all(axes[:-1], "it counts the layers or rows of a recurrent state")
    outputs: list[Axes] = [(*x[:-1], source)]
    return [*outputs, *((*first[:-1], hidden) for _ in states)]
