"""Splits the rows of the calibration data: which are held out is decided when a row is first read, and remembered."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

__all__ = ["Split", "is_held_out"]

_MANY = 64
"""First rows, of which a quarter is held out; of later ones an eighth is, as more would not judge any better."""
_BYTES = 16


def is_held_out(row: int) -> bool:
    """Whether a row is held out from fits to judge them; rows are numbered as they are first read."""
    return row % (4 if row < _MANY else 8) == 1


@dataclasses.dataclass
class Split:
    """The rows read so far, by a hash of their content.

    A loader that shuffles yields rows in another order at every read: split by position, rows held out in one read
    would be fitted in the next. Split by content, the random generators of the user need not be touched, and equal rows
    are always on the same side. Rows changed at every read (augmentation) count as new rows.

    Attributes:
        held_out: by hash, whether the row is held out; 16 bytes a row, whatever its size.
    """

    held_out: dict[bytes, bool] = dataclasses.field(default_factory=dict)

    def of(self, row: Sequence[torch.Tensor]) -> bool:
        """Whether a row is held out.

        Args:
            row: the tensors of the row.
        """
        content = hashlib.blake2b(digest_size=_BYTES)
        for tensor in row:
            content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return self.held_out.setdefault(content.digest(), is_held_out(len(self.held_out)))
