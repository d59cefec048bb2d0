"""What a model predicts of one quantity, set right by what was measured of files near it."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["NEAR", "Correction", "most"]

_OVER, NEAR = 0.015, 0.03
"""By what a measured quantity may be over its limit, so that it is within 3 % when measured again; and under it."""

_FARTHEST, _BISECTIONS = 16.0, 30
"""By what factor a model may be wrong."""
_LEAST = 1e-9


class Correction:
    """From predicted to expected values, through those that were measured.

    A model of times is wrong by a factor, a model of sizes by what files hold beside tensors. Between two files that
    were measured the error is interpolated, beyond them it is that of the nearest.

    Args:
        adds: whether errors add to what is predicted; else they multiply it.
    """

    def __init__(self, adds: bool = False) -> None:
        self.adds, self._measured = adds, dict[float, float]()

    @classmethod
    def of(cls, quantity: str) -> Correction:
        """For a quantity by its name: errors of sizes add, others multiply."""
        return cls(adds=quantity == "size")

    def copy(self) -> Correction:
        """One that learns on its own from here."""
        copy = Correction(self.adds)
        copy._measured = dict(self._measured)
        return copy

    def learn(self, predicted: float, measured: float) -> None:
        """Takes in a file's measurement."""
        self._measured[max(predicted, _LEAST)] = max(measured, _LEAST)

    def __call__(self, predicted: float) -> float:
        """What is expected to be measured where so much is predicted."""
        if not self._measured:
            return predicted
        places, values = map(np.array, zip(*sorted(self._measured.items()), strict=True))
        errors = values - places if self.adds else values / places
        error = float(np.interp(math.log(max(predicted, _LEAST)), np.log(places), errors))
        return predicted + error if self.adds else predicted * error

    def inverse(self, expected: float) -> float:
        """What is predicted where so much is expected."""
        low, high = math.log(expected / _FARTHEST), math.log(expected * _FARTHEST)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self(math.exp(middle)) > expected else (middle, high)
        return math.exp(low)


def most(name: str, limit: float) -> float:
    """What a file may be measured to take: what is measured of time and memory is noisy, bytes are bytes."""
    return limit if name == "size" else (1 + _OVER) * limit
