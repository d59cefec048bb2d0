"""Weight-only quantization: a small file, activations as they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from torch import fx

from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.masks import strip_masks
from lobo_fx.graph.program import Program
from lobo_fx.own_operators.formats import FORMATS, Format
from lobo_fx.own_operators.products import PRODUCT
from lobo_fx.passes.fitting.gram import Gram
from lobo_fx.passes.fusion.fold_weights import fold_weights
from lobo_fx.passes.quantization.codes.compensation import with_grams
from lobo_fx.passes.quantization.codes.evening import factor_for
from lobo_fx.passes.quantization.codes.gptq import round_compensated
from lobo_fx.passes.quantization.codes.product_kernels import Candidate, choose_computes
from lobo_fx.passes.quantization.codes.rounding import Rounded, round_nearest
from lobo_fx.passes.quantization.codes.stored import decode_for_readers, replace_reader, store
from lobo_fx.passes.quantization.codes.weights import Product, Weight, as_product, find_weights
from lobo_fx.passes.quantization.integers.prices import check_costs
from lobo_fx.terminal.progress import track

__all__ = ["QuantizeWeights"]

_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weights of products, convolutions, recurrent layers and embeddings become codes of few bits.

    So do tables that are added to activations, such as learned positions.

    Before: `linear(x, W, b)`. After: (1) `product(x, codes, scale, …, b)`, where ONNX Runtime multiplies with
    int4 or int8 in blocks no slower than with floats, as measured on the CPU at hand (once; the table is kept);
    (2) anywhere else `linear(x, decode(codes, scale, …), b)`, which is decoded when the file is loaded: a small
    file at the speed of float. Where inputs differ in size on calibration data, `gptq` evens columns of decoded weights
    before it rounds them. A tied weight is stored once. Zeros of pruned weights stay zero.

    A product is measured with as many rows as the example inputs have, and with as few as free sizes allow: one, where
    a sequence is free. A way that is slower than float at either is not taken; of the others, the fastest over both is.

    Left alone, with the reason in the report: weights that are not float32, that other operators read too, or that
    would not get smaller.

    Attributes:
        format: `int8`, `int4` (with zero points), `log2_4`, `log2_6`, `log2_8`, or a minifloat `e4m3` (no infinity),
            `e5m2`, `e3m4`; or one that another package offers (`lobo_fx.own_operators.formats.FORMATS`).
        block_size: neighbours along the inputs that share a scale: 16, 32, 64, 128 or 256; None for one scale
            per output channel, which shorter rows get as well.
        method: `round` to the nearest code, on the scale of least squared error; `hqq`, the same with outliers set
            apart; `gptq`, where later weights of a product make up for the error of each, which needs calibration
            data; `auto` is `gptq` where there is such data, else `round`.
        compute: what products compute activations in: `float32`, or `int8` in blocks, which is faster and noisier;
            `int8` is taken wherever there is a kernel, and the report names products that are slower by it. `auto`
            takes the faster where it adds at most half a decibel to the noise of a layer's codes, measured on held-out
            calibration rows, or on the example inputs where there are none: mostly `int8` with int4, `float32` with
            int8.
        costs: path of a cost table that was measured on the target, instead of this machine's.

    Source: see `lobo_fx.passes.quantization.codes.rounding`, `lobo_fx.own_operators.formats`.
    """

    format: str = "int8"
    block_size: int | None = 32
    method: Literal["auto", "round", "hqq", "gptq"] = "auto"
    compute: Literal["auto", "float32", "int8"] = "auto"
    costs: str | None = None

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data where the method is `gptq`."""
        return ("calibration_data",) if self.method == "gptq" else ()

    def __post_init__(self) -> None:
        check_costs(self.costs)
        super().__post_init__()
        FORMATS.check(self.format, "format")
        if self.block_size not in (*_BLOCK_SIZES, None):
            sizes = ", ".join(map(str, _BLOCK_SIZES))
            raise InvalidInput(f"block_size is {self.block_size}; it must be one of {sizes}, None")
        if self.compute == "int8" and (not self.number.is_integer or self.block_size is None):
            raise InvalidInput(
                "compute 'int8' needs the format int4 or int8 and a block_size; ONNX Runtime has no other"
            )

    @property
    def number(self) -> Format:
        return FORMATS[self.format]

    def run(self, program: Program, context: Context) -> Program:
        return self.store(program, context)

    def store(
        self,
        program: Program,
        context: Context,
        leave: Collection[str] = (),
        factors: Mapping[str, torch.Tensor] | None = None,
    ) -> Program:
        """Stores all weights as codes but those that are named.

        Args:
            program: the program whose weights are stored.
            context: gives calibration data, if any; takes notes.
            leave: names of weights that stay as they are.
            factors: factors that columns of weights are multiplied by before they are rounded, by name.
        """
        strip_masks(program)
        fold_weights(program)
        found = [weight for weight in find_weights(program, context) if weight.name not in leave]
        weights = [weight for weight in found if self._shrinks(weight, context)]
        if not weights:
            context.note("quantize_weights found no weight to quantize")
        compensates = self.method in ("auto", "gptq") and context.calibration_data is not None
        pairs = (
            with_grams(program, weights, context)
            if compensates
            else ((weight, None) for weight in track(weights, "round weights", context.show_progress))
        )
        # round all weights before the first is stored: until then the program is run
        rounded = {weight.name: self._round(weight, gram, (factors or {}).get(weight.name)) for weight, gram in pairs}
        computes = choose_computes(program, self._candidates(weights, rounded), self.compute, self.costs, context)
        for weight in weights:
            self._store(program, weight, *rounded.pop(weight.name), computes)
        return program

    def _shrinks(self, weight: Weight, context: Context) -> bool:
        """Whether a weight gets smaller, with its scales; notes one that does not."""
        rows, columns = weight.shape[0], weight.tensor.numel() // weight.shape[0]
        if rows * self.row_bits(columns) < 32 * weight.tensor.numel():
            return True
        context.note("is left alone: with its scales it would not get smaller", parameter=weight.name)
        return False

    def row_bits(self, columns: int) -> int:
        """Bits that a row of a weight takes, with its scales and zero points."""
        blocks = -(-columns // self._block_size(columns))
        return columns * self.number.bits + blocks * (36 if self.format == "int4" else 32)

    def _block_size(self, columns: int) -> int:
        return columns if self.block_size is None else min(self.block_size, columns)

    def _round(
        self, weight: Weight, gram: Gram | None, factor: torch.Tensor | None
    ) -> tuple[Rounded, torch.Tensor | None]:
        """The codes of a weight, and the factors that its columns were multiplied by."""
        matrix = weight.matrix
        block_size = self._block_size(matrix.shape[1])
        if factor is None and gram is not None and not self._products(weight):
            factor = factor_for(matrix, self.number, block_size, gram.energy / gram.count)
        if factor is not None:
            matrix = matrix * factor
            gram = None if gram is None else gram.over(factor)
        if gram is not None:
            return round_compensated(matrix, self.number, block_size, gram.shrunk()), factor
        return round_nearest(matrix, self.number, block_size, "hqq" if self.method == "hqq" else "round"), factor

    def _products(self, weight: Weight) -> dict[fx.Node, Product]:
        """The readers for which ONNX Runtime has a kernel that multiplies with codes."""
        if not self.number.is_integer or self._block_size(weight.matrix.shape[1]) != self.block_size:
            return {}
        found = {reader: as_product(reader, weight) for reader in weight.readers}
        return {reader: product for reader, product in found.items() if product is not None}

    def _candidates(
        self, weights: list[Weight], rounded: Mapping[str, tuple[Rounded, torch.Tensor | None]]
    ) -> dict[fx.Node, Candidate]:
        """The products that may multiply with codes: those of weights whose columns were not evened."""
        found: dict[fx.Node, Candidate] = {}
        for weight in weights:
            codes, factor = rounded[weight.name]
            block_size = self._block_size(weight.matrix.shape[1])
            for reader, product in self._products(weight).items() if factor is None else ():
                found[reader] = Candidate(product.x, weight, codes, self.number, block_size)
        return found

    def _store(
        self,
        program: Program,
        weight: Weight,
        rounded: Rounded,
        factor: torch.Tensor | None,
        computes: Mapping[fx.Node, str],
    ) -> None:
        block_size = self._block_size(weight.matrix.shape[1])
        products = self._products(weight)
        stored = store(program, weight, rounded, self.number, block_size, factor)
        for reader, product in products.items():
            if reader in computes:
                args = (product.x, stored.codes, stored.scale, stored.zero_point, product.bias, *stored.layout)
                replace_reader(program, reader, PRODUCT, (*args, computes[reader]))
        decode_for_readers(program, weight, stored)
