"""Which rows of the calibration data are held out: decided when a row is first met, and known again by its content."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

__all__ = ["Split", "is_held_out"]

_MANY = 64
"""Rows of which a quarter is held out; a quarter of more would be missed by the fit and judge no better."""
_BYTES = 16


def is_held_out(row: int) -> bool:
    """Whether a row of the calibration data, counted as rows are first met, is kept from fits, to judge them."""
    return row % (4 if row < _MANY else 8) == 1


@dataclasses.dataclass
class Split:
    """The rows met so far, by a hash of their content.

    A loader that shuffles gives its rows in another order at every read: by their place, rows held out in one read
    would be fitted in the next. By content, no generator of the user's need be known or moved, and equal rows are never
    on both sides. Rows made anew at every read (augmentation) are new rows.

    Attributes:
        held_out: by hash, whether the row is held out; a few bytes a row, whatever its size.
    """

    held_out: dict[bytes, bool] = dataclasses.field(default_factory=dict)

    def of(self, row: Sequence[torch.Tensor]) -> bool:
        """Whether a row is held out.

        Args:
            row: its tensors.
        """
        content = hashlib.blake2b(digest_size=_BYTES)
        for tensor in row:
            content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return self.held_out.setdefault(content.digest(), is_held_out(len(self.held_out)))
