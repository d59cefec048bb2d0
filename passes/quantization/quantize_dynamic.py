"""Dynamic int8 quantization: no calibration, activations are quantized by their own range when the file runs."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.operators import arguments, aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.randomness import drop_dead
from lobo_fx.graph.recurrent import Recurrent
from lobo_fx.graph.rewriting import free_name, replace_results
from lobo_fx.graph.tensors import register
from lobo_fx.own_operators.formats import FORMATS, Format
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT, PRODUCT
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.quantization.codes.evening import even_columns
from lobo_fx.passes.quantization.codes.rounding import round_nearest
from lobo_fx.passes.quantization.codes.stored import Stored, decode_for_readers, replace_reader, store
from lobo_fx.passes.quantization.codes.weights import Weight, find_weights
from lobo_fx.passes.quantization.dynamic_forms import BLOCK, Form, Integers, choose_forms, find_integers
from lobo_fx.passes.quantization.integers.targets import target_named
from lobo_fx.terminal.progress import track

__all__ = ["QuantizeDynamic"]


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Every weight becomes int8 with a scale per output channel; products run in integers.

    Before: `linear(x, W, b)`. After: (1) `dynamic_product(x, W₈, s, b)`: `x` becomes uint8 by its own range, the
    product is one of integers (ONNX Runtime's DynamicQuantizeMatMul); (2) an LSTM becomes `dynamic_lstm`: `x` becomes
    uint8 as a whole, hidden states step by step (DynamicQuantizeLSTM; on several threads, the rows of each have their
    own range); (3) an embedding looks up rows of int8 and decodes them; (4) convolutions, whose integer kernels with
    dynamic ranges are slower than the float ones, and GRU, RNN and LSTM with projections, which have none, read
    `decode(W₈, s)`, decoded once when the file is loaded; with calibration data, columns of these weights are evened
    by how large their inputs are. A tied weight is stored once. Zeros of pruned weights stay zero.

    A range spans the whole input of a layer. If the signal-to-noise ratio of the layer's outputs, or of their median
    row, is below 30 dB on calibration data (or else on the example inputs), the first of these that keeps 30 dB is
    taken: (1) columns of its inputs are evened into the weight, given calibration data; (2) a linear layer has a range
    for every 32 columns of each row (MatMulNBits); (3) the layer stays float. A note says which, and the decibels.

    Attributes:
        target: the CPU's integers, as for `QuantizeStatic`: `auto`, `x86-vnni`, `arm`, or `x86-avx2`, which gives
            weights of products 7 bits, whose sums don't saturate.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018; ranges at run time as ONNX defines DynamicQuantizeLinear.
    """

    target: str = "auto"

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        super().__post_init__()
        target_named(self.target)

    def run(self, program: Program, context: Context) -> Program:
        strip_masks(program)
        fold_weights(program)
        weights = [weight for weight in find_weights(program, context) if _is_worth_it(weight, context)]
        if not weights:
            context.note("quantize_dynamic found no weight to quantize")
        limit = target_named(self.target).weight
        number = dataclasses.replace(FORMATS.ours("int8"), limits=(-limit, limit))
        able = find_integers(program, weights)
        forms = choose_forms(program, able, number, context)
        stored = _stored(program, weights, able, forms, number, context)
        reads = {read: codes for weight, codes in zip(weights, stored, strict=True) for read in weight.reads}
        for layer in able:
            form = forms[layer.node]
            if form.kind != "float":
                write = _write_lstm if layer.states else _write_product
                write(program, layer, form, reads)
        for weight, codes in zip(weights, stored, strict=True):
            decode_for_readers(program, weight, codes)
        drop_dead(program.graph)  # final states that nobody reads
        program.module.recompile()
        return program


def _is_worth_it(weight: Weight, context: Context) -> bool:
    """Whether rows are longer than two entries; notes a weight whose rows are not."""
    if weight.tensor.numel() > 2 * weight.shape[0]:
        return True
    context.note("is left alone: its rows of one or two entries hardly get smaller", parameter=weight.name)
    return False


def _stored(
    program: Program,
    weights: Sequence[Weight],
    able: Sequence[Integers],
    forms: dict[fx.Node, Form],
    number: Format,
    context: Context,
) -> list[Stored]:
    """Stores every weight as codes, evened or in blocks as the forms of its readers say."""
    blocks = {layer.weights[0].name for layer in able if forms[layer.node].kind == "blocks"}
    for layer in able:  # a weight stored in blocks has no kernel with one range
        shared = not blocks.isdisjoint(weight.name for weight in layer.weights + layer.states)
        if shared and forms[layer.node].kind == "integers":
            forms[layer.node] = Form("float" if layer.states else "blocks")
            moved_to = "stays float" if layer.states else f"has a range for every {BLOCK} columns of each row"
            context.note(f"{moved_to}: a layer that shares its weight needs such ranges", layer.node)
    moved, named, noisy = dict[str, torch.Tensor](), set[str](), set[str]()
    for layer in able:
        form, names = forms[layer.node], {weight.name for weight in layer.weights}
        if form.factor is not None:
            moved |= dict.fromkeys(names, form.factor)
        if form.kind == "float":
            noisy |= names
        else:
            named |= names | {weight.name for weight in layer.states}
    decoded, whole = [weight for weight in weights if weight.name not in named], FORMATS.ours("int8")
    if context.calibration_data is not None:
        factors = even_columns(program, decoded, whole, context.fitting_batches())
    else:  # example inputs may be anything: they count only for layers that were noisy on them
        told = [weight for weight in decoded if weight.name in noisy]
        factors = even_columns(program, told, whole, [program.example_inputs])
    rounded = []
    for weight in track(weights, "round weights", context.show_progress):
        factor = moved.get(weight.name, factors.get(weight.name))
        matrix = weight.matrix if factor is None else weight.matrix * factor
        block_size = BLOCK if weight.name in blocks else matrix.shape[1]
        rounded.append((round_nearest(matrix, number if weight.name in named else whole, block_size), block_size))
    return [
        store(program, weight, codes, number, block_size, factors.get(weight.name))
        for weight, (codes, block_size) in zip(weights, rounded, strict=True)
    ]


def _divided(program: Program, layer: Integers, form: Form, call: Callable[..., fx.Node]) -> fx.Node:
    """The input of a layer, its columns divided by the form's factor if there is one."""
    if form.factor is None:
        return layer.input
    name = free_name(program, f"{layer.weights[0].name}_columns")
    register(program.module, name, form.factor.reciprocal())
    return call(aten.mul.Tensor, layer.input, program.graph.get_attr(name))


def _write_product(program: Program, layer: Integers, form: Form, stored: Mapping[fx.Node, Stored]) -> None:
    """Puts a product in integers in the place of a linear layer."""
    codes, bias = stored[layer.weights[0].reads[0]], arguments(layer.node)["bias"]
    call = _caller(program, layer.node)
    with program.graph.inserting_before(layer.node):
        x = _divided(program, layer, form, call)
    if form.kind == "blocks":
        args = (x, codes.codes, codes.scale, None, bias, *codes.layout, "int8")
        replace_reader(program, layer.node, PRODUCT, args)
    else:
        replace_reader(program, layer.node, DYNAMIC_PRODUCT, (x, codes.codes, codes.scale, bias))


def _caller(program: Program, node: fx.Node) -> Callable[..., fx.Node]:
    """A function that inserts calls which stand for a part of `node`."""

    def call(target: object, *args: object) -> fx.Node:
        new = program.graph.call_function(target, args)  # type: ignore[arg-type]
        inherit(new, node)
        return new

    return call


def _write_lstm(program: Program, layer: Integers, form: Form, stored: Mapping[fx.Node, Stored]) -> None:
    """Puts a call in integers in the place of an LSTM."""
    node = layer.node
    given, call = Recurrent.of(node), _caller(program, node)
    params = []
    for w, r, *biases in given.cells:
        params += [stored[w].codes, stored[w].scale, stored[r].codes, stored[r].scale, *biases]
    with program.graph.inserting_before(node):
        x = _divided(program, layer, form, call)
        x = call(aten.transpose.int, x, 0, 1) if given.batch_first else x
        new = call(DYNAMIC_LSTM, x, *given.states, params, given.directions)
        x, *finals = (call(operator.getitem, new, at) for at in range(3))
        outputs = [call(aten.transpose.int, x, 0, 1) if given.batch_first else x, *finals]
    replace_results(node, outputs)
