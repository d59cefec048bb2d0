"""Which initializers hold codes of weights, and how: known where they are written, asked for where files are packed."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

__all__ = ["Codes", "codes_of", "mark_codes"]

_KEY = "lobo_fx.codes"


@dataclasses.dataclass(frozen=True)
class Codes:
    """How an initializer holds codes.

    Attributes:
        bits: of a code.
        block_size: neighbours in a row that share a zero point.
        zero_point: the initializer of the codes of zero, one a block, packed alike; None where zero has one code.
    """

    bits: int
    block_size: int = 0
    zero_point: ir.Value | None = None


def mark_codes(value: ir.Value | None, bits: int, block_size: int, zero_point: ir.Value | None = None) -> None:
    """Says of an initializer that it holds codes; a file does not say so."""
    assert value is not None
    value.meta[_KEY] = Codes(bits, block_size, zero_point)


def codes_of(value: ir.Value) -> Codes:
    """What is known of an initializer's codes; one that nothing was said of holds whole bytes."""
    found: Codes = value.meta.get(_KEY, Codes(8))
    return found
