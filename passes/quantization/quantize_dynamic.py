"""Dynamic int8 quantization: no calibration, activations are quantized by their own range when the file runs."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import ClassVar

from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.operators import aten
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import inherit
from lobo_fx.graph.recurrent import Recurrent
from lobo_fx.own_operators.formats import FORMATS, Format
from lobo_fx.own_operators.lstm import DYNAMIC_LSTM
from lobo_fx.own_operators.products import DYNAMIC_PRODUCT
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.quantization.codes.rounding import round_nearest
from lobo_fx.passes.quantization.codes.stored import Stored, decode_for_readers, replace_reader, store
from lobo_fx.passes.quantization.codes.weights import Weight, as_product, find_weights
from lobo_fx.passes.quantization.integers.targets import target_named

__all__ = ["QuantizeDynamic"]


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Every weight becomes int8 with a scale per output channel; products run in integers.

    Before: `linear(x, W, b)`. After: (1) `dynamic_product(x, W₈, s, b)`: `x` becomes uint8 by its own range, the
    product is one of integers (ONNX Runtime's DynamicQuantizeMatMul); (2) an LSTM becomes `dynamic_lstm` for each of
    its layers: `x` becomes uint8 as a whole, hidden states step by step (DynamicQuantizeLSTM; on several threads,
    the rows of each have their own range); (3) an embedding looks up rows of int8 and decodes them;
    (4) convolutions, whose integer kernels with dynamic ranges are slower than the float ones, and GRU, RNN and LSTM
    with projections, which have none, read `decode(W₈, s)`, decoded once when the file is loaded. A tied weight is
    stored once. Zeros of pruned weights stay zero.

    Attributes:
        target: the CPU's integers, as for `QuantizeStatic`: `x86-avx2` gives weights of products 7 bits, whose sums
            don't saturate.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018; ranges at run time as ONNX defines DynamicQuantizeLinear.
    """

    target: str = "auto"

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def __post_init__(self) -> None:
        target_named(self.target)

    def run(self, program: Program, context: Context) -> Program:
        strip_masks(program)
        fold_weights(program)
        # a row of one or two entries would not get smaller
        weights = [weight for weight in find_weights(program, context) if weight.tensor.numel() > 2 * weight.shape[0]]
        if not weights:
            context.note("quantize_dynamic found no weight to quantize")
        limit = target_named(self.target).weight
        number = dataclasses.replace(FORMATS["int8"], limits=(-limit, limit))
        stored = [_quantize(program, weight, number) for weight in weights]
        reads = {read: codes for weight, codes in zip(weights, stored, strict=True) for read in weight.reads}
        for node in program.graph.find_nodes(op="call_function", target=aten.lstm.input):
            _quantize_lstm(program, node, reads)
        for weight, codes in zip(weights, stored, strict=True):
            decode_for_readers(program, weight, codes)
        program.graph.eliminate_dead_code()  # final states that nobody reads
        program.module.recompile()
        return program


def _quantize(program: Program, weight: Weight, number: Format) -> Stored:
    """Stores the weight as codes; linear layers that read it read the codes."""
    matrix = weight.matrix
    columns = matrix.shape[1]
    stored = store(program, weight, round_nearest(matrix, number, columns), number, columns)
    for reader in weight.readers:
        product = as_product(reader, weight)
        if product is not None:
            args = (product.x, stored.codes, stored.scale, product.bias)
            replace_reader(program, reader, DYNAMIC_PRODUCT, args)
    return stored


def _quantize_lstm(program: Program, node: fx.Node, stored: Mapping[fx.Node, Stored]) -> None:
    """Puts a call in integers in the place of an LSTM, where all its weights are codes."""
    given, graph = Recurrent.of(node), program.graph
    if not given.is_single or not all(read in stored for cell in given.cells for read in cell[:2]):
        return

    def call(target: object, *args: object) -> fx.Node:
        new = graph.call_function(target, args)  # type: ignore[arg-type]
        inherit(new, node)
        return new

    params = []
    for w, r, *biases in given.cells:
        params += [stored[w].codes, stored[w].scale, stored[r].codes, stored[r].scale, *biases]
    with graph.inserting_before(node):
        x = call(aten.transpose.int, given.input, 0, 1) if given.batch_first else given.input
        layer = call(DYNAMIC_LSTM, x, *given.states, params, given.directions)
        x, *finals = (call(operator.getitem, layer, at) for at in range(3))
        outputs = [call(aten.transpose.int, x, 0, 1) if given.batch_first else x, *finals]
    for output in list(node.users):
        output.replace_all_uses_with(outputs[output.args[1]])  # type: ignore[index]
        graph.erase_node(output)
    graph.erase_node(node)
