"""Which initializers hold codes of weights, and how: recorded when they are written, read when files are packed."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

__all__ = ["Codes", "codes_of", "mark_codes"]

_KEY = "lobo_fx.codes"


@dataclasses.dataclass(frozen=True)
class Codes:
    """How an initializer holds codes.

    Attributes:
        bits: bits of a code.
        block_size: neighbours in a row that share a zero point.
        zero_point: the initializer of the zero points, one for each block, packed alike; None if zero has one code.
    """

    bits: int
    block_size: int = 0
    zero_point: ir.Value | None = None


def mark_codes(value: ir.Value | None, bits: int, block_size: int, zero_point: ir.Value | None = None) -> None:
    """Records that an initializer holds codes, which a file does not say."""
    assert value is not None
    value.meta[_KEY] = Codes(bits, block_size, zero_point)


def codes_of(value: ir.Value) -> Codes:
    """How an initializer holds codes; one that was not marked holds whole bytes."""
    found: Codes = value.meta.get(_KEY, Codes(8))
    return found
