"""Chooses how a layer computes in integers whose ranges are taken at run time, by the noise that each form adds.

A range spans all rows, steps and columns of the layer's input. Where these differ much in size, the small ones are
rounded away. So every layer is simulated on data, and takes the first form that adds little enough noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.operators import arguments, aten, is_call, named_values
from lobo_fx.graph.program import Program
from lobo_fx.graph.recurrent import Recurrent
from lobo_fx.graph.running import AS_IT_IS, Runner, watch
from lobo_fx.measures.fidelity import decibels
from lobo_fx.own_operators.decode import decode
from lobo_fx.own_operators.formats import Format
from lobo_fx.own_operators.integers import dynamic_range, round_blocks
from lobo_fx.own_operators.lstm import dynamic_lstm
from lobo_fx.passes.quantization.codes.evening import best_factor, weight_noise
from lobo_fx.passes.quantization.codes.rounding import round_nearest
from lobo_fx.passes.quantization.codes.weights import Weight, as_product
from lobo_fx.passes.quantization.integers.simulation import first_batches

__all__ = ["BLOCK", "LEAST", "Form", "Integers", "choose_forms", "find_integers"]

BLOCK = 32
"""Neighbours in a row that share a range, in the form `blocks`."""
LEAST = 30.0
"""Least signal-to-noise ratio of a layer's outputs, in decibels; with inputs alike in size it is about 40."""
_ROWS = 256
"""Rows of a product that are compared in each batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Integers:
    """A call that can run in integers with ranges taken at run time.

    Attributes:
        node: a linear layer or an LSTM.
        weights: weights that the input is multiplied with; an LSTM has one for each direction.
        states: weights that an LSTM's states are multiplied with; a linear layer has none.
    """

    node: fx.Node
    weights: tuple[Weight, ...]
    states: tuple[Weight, ...] = ()

    @property
    def input(self) -> fx.Node:
        """The input that is quantized, read from the graph as it is now."""
        found: fx.Node = arguments(self.node)["input"]
        return found

    @property
    def owns_weights(self) -> bool:
        """Whether nothing else is multiplied with the input's weights."""
        alone = all(weight.readers == (self.node,) for weight in self.weights)
        return alone and {weight.name for weight in self.weights}.isdisjoint(weight.name for weight in self.states)


@dataclasses.dataclass(frozen=True)
class Form:
    """How a layer runs.

    Attributes:
        kind: `integers`, `blocks` (a range for every row's blocks) or `float`.
        factor: what the weights' columns are multiplied by, and the input's columns divided by; None for nothing.
    """

    kind: str
    factor: torch.Tensor | None = None


def find_integers(program: Program, weights: Sequence[Weight]) -> list[Integers]:
    """Linear layers and LSTMs whose weights are all among these."""
    by_read = {read: weight for weight in weights for read in weight.reads}
    found = []
    for node in program.graph.nodes:
        if is_call(node, aten.lstm.input):
            given = Recurrent.of(node)
            if given.is_single and all(read in by_read for cell in given.cells for read in cell[:2]):
                inputs, states = (tuple(by_read[cell[at]] for cell in given.cells) for at in (0, 1))
                found.append(Integers(node, inputs, states))
        elif node.op == "call_function":
            for weight in {id(w): w for source in node.all_input_nodes if (w := by_read.get(source))}.values():
                if as_product(node, weight) is not None:
                    found.append(Integers(node, (weight,)))
    return found


def choose_forms(program: Program, able: Sequence[Integers], number: Format, context: Context) -> dict[fx.Node, Form]:
    """The first form of each layer whose own noise is low enough, with a note where that is not the plain one.

    Args:
        program: the program in float.
        able: layers that have integer kernels.
        number: number format of the weights.
        context: gives the calibration data that noise is measured on; without any, the example inputs are used.
    """
    forms = {layer.node: Form("integers") for layer in able}
    has_data = context.calibration_data is not None
    seen = context.fitting_batches if has_data else lambda: [program.example_inputs]
    batches = (context.held_out_batches() or first_batches(context)) if has_data else seen()
    columns = {layer.input: _Columns() for layer in able}
    if columns:
        watch(program.module, seen(), {node: found.add for node, found in columns.items()})

    def decibels(chosen: Mapping[Integers, Form]) -> dict[fx.Node, float]:
        simulated = _simulated_lstm, _simulated_product
        made = {
            layer: simulated[not layer.states](layer, form, number, columns[layer.input])
            for layer, form in chosen.items()
        }
        return _decibels(program, made, batches)

    plain = decibels({layer: Form("integers") for layer in able})
    noisy = [layer for layer in able if plain.get(layer.node, math.inf) < LEAST]
    others = {
        layer: Form("integers", factor)
        for layer in noisy
        if has_data and layer.owns_weights and (factor := _factor(layer, columns[layer.input], number)) is not None
    }
    evened = decibels(others)
    wide = [layer for layer in noisy if not layer.states and layer.weights[0].matrix.shape[1] >= BLOCK]
    blocks = decibels({layer: Form("blocks") for layer in wide})
    for layer in noisy:
        node = layer.node
        had = f"with one range for all that it reads, its own noise would leave {plain[node]:.1f} dB"
        if evened.get(node, -math.inf) >= LEAST:
            forms[node] = others[layer]
            context.note(f"has its inputs' columns evened, {evened[node]:.1f} dB: {had}", node)
        elif blocks.get(node, -math.inf) >= LEAST:
            forms[node] = Form("blocks")
            context.note(f"has a range for every {BLOCK} columns of each row, {blocks[node]:.1f} dB: {had}", node)
        else:
            forms[node] = Form("float")
            context.note(f"stays float: {had}", node)
    return forms


_Simulated = Callable[[Mapping[str, Any], Any], tuple[torch.Tensor, torch.Tensor]]
"""Gives rows of outputs in float and in another form, from a call's arguments and its value."""


def _simulated_product(layer: Integers, form: Form, number: Format, columns: _Columns) -> _Simulated:
    (weight,) = layer.weights
    matrix = weight.matrix if form.factor is None else weight.matrix * form.factor
    block_size = BLOCK if form.kind == "blocks" else matrix.shape[1]
    rounded = round_nearest(matrix, number, block_size)
    weight_as_stored = decode(rounded.codes, rounded.scale, None, number.name, [*matrix.shape], block_size)
    step, zero = dynamic_range(torch.stack(columns.ends(form.factor)))

    def simulate(given: Mapping[str, Any], value: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = given["input"].reshape(-1, given["input"].shape[-1])
        chosen = torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long()
        rows = rows[chosen] if form.factor is None else rows[chosen] / form.factor
        if form.kind == "blocks":
            rows = round_blocks(rows, BLOCK)
        else:
            rows = (((rows / step).round() + zero).clamp(0, 255) - zero) * step
        expected: torch.Tensor = value.reshape(-1, value.shape[-1])[chosen]
        return expected, torch.nn.functional.linear(rows, weight_as_stored, given.get("bias"))

    return simulate


def _simulated_lstm(layer: Integers, form: Form, number: Format, columns: _Columns) -> _Simulated:
    stored: list[list[torch.Tensor]] = []
    for weight, state in zip(layer.weights, layer.states, strict=True):
        matrix = weight.matrix if form.factor is None else weight.matrix * form.factor
        both = [round_nearest(values, number, values.shape[1]) for values in (matrix, state.matrix)]
        stored.append([tensor for rounded in both for tensor in (rounded.codes, rounded.scale)])

    def simulate(given: Mapping[str, Any], value: Any) -> tuple[torch.Tensor, torch.Tensor]:
        call = Recurrent(**given)
        x = call.input if form.factor is None else call.input / form.factor
        x = x.transpose(0, 1) if call.batch_first else x
        # two more rows, whose first step holds an end of the range each
        wide = torch.zeros_like(x[:, :1])
        for end in columns.ends(form.factor):
            wide[:1] = end
            x = torch.cat([x, wide], 1)
        states = [torch.cat([state, state[:, :1], state[:, :1]], 1) for state in call.states]
        params = [tensor for own, cell in zip(stored, call.cells, strict=True) for tensor in (*own, *cell[2:])]
        every = value[0].transpose(0, 1) if call.batch_first else value[0]
        found = dynamic_lstm(x, states[0], states[1], params, call.directions)[0][:, :-2]
        return every.flatten(0, 1), found.flatten(0, 1)

    return simulate


def _decibels(
    program: Program, forms: Mapping[Integers, _Simulated], batches: Iterable[Inputs]
) -> dict[fx.Node, float]:
    """Signal-to-noise ratio of each layer's outputs in its form: of all rows, or of the median row if lower."""
    by_node = {layer.node: form for layer, form in forms.items()}
    totals = {node: torch.zeros(2, dtype=torch.double) for node in by_node}
    shares: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in by_node}

    def instead(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node not in by_node:
            return AS_IT_IS
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        expected, found = by_node[node](named_values(node, args, kwargs), value)
        signal, noise = (part.double().square().sum(1) for part in (expected, expected - found))
        totals[node] += torch.stack([signal.sum(), noise.sum()])
        shares[node].append(noise[signal > 0] / signal[signal > 0])
        return value

    if by_node:
        runner = Runner(program.module, instead=instead)
        for inputs in batches:
            runner(inputs)
    found = {}
    for node, (signal, noise) in ((node, pair.tolist()) for node, pair in totals.items()):
        ratios = torch.cat(shares[node]) if shares[node] else torch.zeros(0)
        share = max(noise / signal, float(ratios.median())) if signal > 0 and len(ratios) else 0.0
        found[node] = decibels(1.0, share)
    return found


def _factor(layer: Integers, columns: _Columns, number: Format) -> torch.Tensor | None:
    """The factor that evens the input's columns, if it lowers the noise of rounding input and weights together."""
    matrix = torch.cat([weight.matrix for weight in layer.weights])

    def noise(factor: torch.Tensor) -> float:
        low, high = columns.ends(factor)
        moved = matrix * factor
        of_input = float((high - low) / 255) ** 2 / 12 * float(moved.double().square().sum())
        return of_input + weight_noise(moved, number, matrix.shape[1], columns.energy / factor.square())

    return best_factor(columns.energy, noise) if columns.count else None


class _Columns:
    """Range, zero included, and mean square of each column."""

    def __init__(self) -> None:
        self.low = self.high = torch.zeros(())
        self.squares, self.count = torch.zeros(()), 0

    def add(self, value: torch.Tensor) -> None:
        """Adds the value of one batch."""
        rows = value.reshape(-1, value.shape[-1])
        if len(rows):
            self.low, self.high = self.low.minimum(rows.amin(0)), self.high.maximum(rows.amax(0))
            self.squares, self.count = self.squares + rows.double().square().sum(0), self.count + len(rows)

    def ends(self, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the range over all columns, divided by the factor if there is one."""
        low, high = (self.low, self.high) if factor is None else (self.low / factor, self.high / factor)
        return low.min(), high.max()

    @property
    def energy(self) -> torch.Tensor:
        return self.squares / max(self.count, 1)
