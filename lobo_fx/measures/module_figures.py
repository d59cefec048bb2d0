"""Figures of a module of a program; reading them needs no PyTorch."""

from __future__ import annotations

import dataclasses

__all__ = ["MIXED", "ModuleFigures", "is_inside"]

MIXED = "mixed"


@dataclasses.dataclass(frozen=True)
class ModuleFigures:
    """A module with all that is inside of it.

    Attributes:
        kind: what its own layer is called; empty where it only holds others.
        width: outputs (channels) of its own layer; null where it has none, or several that differ.
        parameters: weights and biases, quantized or not; a shared one counts where it is named first.
        nonzero: how many of them are not zero.
        bytes: memory of parameters and buffers, without masks.
        stored: number format of its weights; `mixed` for several, empty for none.
        computed: number format that its layers compute in; likewise.
        microseconds: time of a call that its nodes of the file took, by the runtime's profile; null if not measured.
    """

    kind: str
    width: int | None
    parameters: int
    nonzero: int
    bytes: int
    stored: str
    computed: str
    microseconds: float | None = None


def is_inside(name: str, module: str) -> bool:
    """Whether a module or tensor is another module or inside of it, by dotted names; the model's name is empty.

    Scale and zero point of a weight that is a module of its own here (`w1_scale`) count as inside of it.
    """
    return not module or name == module or name.startswith((f"{module}.", f"{module}_scale", f"{module}_zero_point"))
