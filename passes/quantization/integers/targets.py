"""The integers that CPUs multiply fast."""

from __future__ import annotations

import dataclasses

import torch

from lobo_fx.errors import InvalidInput
from lobo_fx.measures.machine import is_arm, products_saturate

__all__ = ["TARGETS", "Target", "target_named", "target_of_this_machine"]


@dataclasses.dataclass(frozen=True)
class Target:
    """The integers that a CPU multiplies fast.

    Attributes:
        activation: dtype and range of activations.
        weight: largest magnitude of an int8 weight.
    """

    activation: tuple[torch.dtype, int, int]
    weight: int


TARGETS = {
    "x86-vnni": Target((torch.uint8, 0, 255), 127),
    # without VNNI, sums of two products saturate at 16 bits: weights get one bit less
    "x86-avx2": Target((torch.uint8, 0, 255), 63),
    "arm": Target((torch.int8, -128, 127), 127),
}


def target_of_this_machine() -> str:
    """The name of this CPU's target."""
    if is_arm():
        return "arm"
    return "x86-avx2" if products_saturate() else "x86-vnni"


def target_named(name: str) -> Target:
    """The target of that name; `auto` is this machine's.

    Raises:
        InvalidInput: there is none.
    """
    if name not in ("auto", *TARGETS):
        raise InvalidInput(f"target is {name!r}; it must be one of auto, {', '.join(TARGETS)}")
    return TARGETS[target_of_this_machine() if name == "auto" else name]
