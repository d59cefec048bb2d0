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
from lobo_fx.passes.quantization.codes.rounding import Rounded, round_nearest
from lobo_fx.passes.quantization.codes.stored import decode_for_readers, replace_reader, store
from lobo_fx.passes.quantization.codes.weights import Product, Weight, as_product, find_weights
from lobo_fx.terminal.progress import track

__all__ = ["QuantizeWeights"]

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_METHODS = ("auto", "round", "hqq", "gptq")


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weights of products, convolutions, recurrent layers and embeddings become codes of few bits.

    So do tables that are added to activations, such as learned positions.

    Before: `linear(x, W, b)`. After: (1) `product(x, codes, scale, …, b)`, where ONNX Runtime multiplies with
    low-bit weights as fast as with float ones: int4 in blocks, and int8 in blocks with compute "int8";
    (2) anywhere else `linear(x, decode(codes, scale, …), b)`, which is decoded when the file is loaded: a small
    file at the speed of float. Where calibration data says that inputs differ in size, columns of what is decoded are
    evened before they are rounded. A tied weight is stored once. Zeros of pruned weights stay zero.

    Left alone, with the reason in the report: weights that are not float32, that other operators read too, or that
    would not get smaller.

    Attributes:
        format: `int8`, `int4` (with zero points), `log2_4`, `log2_6`, `log2_8`, or a minifloat `e4m3` (no infinity),
            `e5m2`, `e3m4`.
        block_size: neighbours along the inputs that share a scale: 16, 32, 64, 128 or 256; None for one scale
            per output channel, which shorter rows get as well.
        method: `round` to the nearest code, on the scale of least squared error; `hqq`, the same with outliers kept
            apart; `gptq`, which makes up for the error of each weight of a product in those that follow and needs
            calibration data; `auto` is `gptq` where there is such data, else `round`.
        compute: `float32`, or `int8`: activations of products are rounded to int8 in blocks. Faster, noisier.

    Source: see `lobo_fx.passes.quantization.codes.rounding`, `lobo_fx.own_operators.formats`.
    """

    format: Literal["int8", "int4", "log2_4", "log2_6", "log2_8", "e4m3", "e5m2", "e3m4"] = "int8"
    block_size: int | None = 32
    method: Literal["auto", "round", "hqq", "gptq"] = "auto"
    compute: Literal["float32", "int8"] = "float32"

    promise: ClassVar[Promise] = Promise.APPROXIMATE

    @property
    def needs(self) -> tuple[str, ...]:
        """Calibration data where the method is `gptq`."""
        return ("calibration_data",) if self.method == "gptq" else ()

    def __post_init__(self) -> None:
        _check("format", self.format, tuple(FORMATS))
        _check("block_size", self.block_size, (*_BLOCK_SIZES, None))
        _check("method", self.method, _METHODS)
        _check("compute", self.compute, ("float32", "int8"))
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
            program: whose weights are stored.
            context: its calibration data, if any; and for notes.
            leave: names of weights.
            factors: by what columns of weights are multiplied before they are rounded, by name.
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
        # all are rounded before the first is stored: the program is run for as long
        rounded = [self._round(weight, gram, (factors or {}).get(weight.name)) for weight, gram in pairs]
        for weight, (codes, factor) in zip(weights, rounded, strict=True):
            self._store(program, weight, codes, factor)
        return program

    def _shrinks(self, weight: Weight, context: Context) -> bool:
        rows, columns = weight.shape[0], weight.tensor.numel() // weight.shape[0]
        blocks = -(-columns // self._block_size(columns))
        bits = columns * self.number.bits + blocks * (36 if self.format == "int4" else 32)
        if bits * rows < 32 * weight.tensor.numel():
            return True
        context.note("is left alone: with its scales it would not get smaller", parameter=weight.name)
        return False

    def _block_size(self, columns: int) -> int:
        return columns if self.block_size is None else min(self.block_size, columns)

    def _round(
        self, weight: Weight, gram: Gram | None, factor: torch.Tensor | None
    ) -> tuple[Rounded, torch.Tensor | None]:
        """The codes of a weight, and by what its columns were multiplied."""
        matrix = weight.matrix
        block_size = self._block_size(matrix.shape[1])
        if factor is None and gram is not None and not any(self._products(weight)):
            factor = factor_for(matrix, self.number, block_size, gram.energy / gram.count)
        if factor is not None:
            matrix = matrix * factor
            gram = None if gram is None else gram.over(factor)
        if gram is not None:
            return round_compensated(matrix, self.number, block_size, gram.shrunk()), factor
        return round_nearest(matrix, self.number, block_size, "hqq" if self.method == "hqq" else "round"), factor

    def _products(self, weight: Weight) -> list[tuple[fx.Node, Product]]:
        """The readers that ONNX Runtime multiplies with codes no slower than with floats."""
        if not self._has_kernel(self._block_size(weight.matrix.shape[1])):
            return []
        found = [(reader, as_product(reader, weight)) for reader in weight.readers]
        return [(reader, product) for reader, product in found if product is not None]

    def _store(self, program: Program, weight: Weight, rounded: Rounded, factor: torch.Tensor | None) -> None:
        block_size = self._block_size(weight.matrix.shape[1])
        products = self._products(weight)
        stored = store(program, weight, rounded, self.number, block_size, factor)
        for reader, product in products:
            args = (product.x, stored.codes, stored.scale, stored.zero_point, product.bias, *stored.layout)
            replace_reader(program, reader, PRODUCT, (*args, self.compute))
        decode_for_readers(program, weight, stored)

    def _has_kernel(self, block_size: int) -> bool:
        """Whether ONNX Runtime multiplies with the codes no slower than with floats."""
        return block_size == self.block_size and (self.format == "int4" or self.compute == "int8")


def _check(name: str, value: object, possible: tuple[object, ...]) -> None:
    if not any(value is known or (type(value) is type(known) and value == known) for known in possible):
        raise InvalidInput(f"{name} is {value!r}; it must be one of {', '.join(map(str, possible))}")
