"""Dynamic int8 quantization: no calibration, activations are quantized by their own range when the file runs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lobo_fx.context import Context
from lobo_fx.formats import FORMATS
from lobo_fx.masks import strip_masks
from lobo_fx.own_operators import DYNAMIC_PRODUCT
from lobo_fx.passbase import Pass, Promise
from lobo_fx.passes.stored_weights import Weight, as_product, decode_for_readers, find_weights, replace_reader, store
from lobo_fx.passes.weight_rounding import round_nearest
from lobo_fx.program import Program


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Every weight becomes int8 with a scale per output channel; products run in integers.

    Before: `linear(x, W, b)`. After: (1) `dynamic_product(x, W₈, s, b)`: `x` becomes uint8 by its own range, the
    product is one of integers (ONNX Runtime's DynamicQuantizeMatMul); (2) an embedding looks up rows of int8 and
    decodes them; (3) convolutions and recurrent layers read `decode(W₈, s)`, decoded once when the file is loaded:
    their integer kernels with dynamic ranges are slower than the float ones. A tied weight is stored once. Zeros of
    pruned weights stay zero.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018; ranges at run time as ONNX defines DynamicQuantizeLinear.
    """

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    def run(self, program: Program, context: Context) -> Program:
        strip_masks(program)
        # a row of one or two entries would not get smaller
        weights = [weight for weight in find_weights(program, context) if weight.tensor.numel() > 2 * weight.shape[0]]
        if not weights:
            context.note("quantize_dynamic found no weight to quantize")
        for weight in weights:
            _quantize(program, weight)
        return program


def _quantize(program: Program, weight: Weight) -> None:
    matrix, number = weight.matrix, FORMATS["int8"]
    columns = matrix.shape[1]
    stored = store(program, weight, round_nearest(matrix, number, columns), number, columns)
    for reader in weight.readers:
        product = as_product(reader, weight)
        if product is not None:
            args = (product.x, stored.codes, stored.scale, product.bias)
            replace_reader(program, reader, DYNAMIC_PRODUCT, args)
    decode_for_readers(program, weight, stored)
