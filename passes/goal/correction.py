"""Corrects a model's predictions of one quantity by measurements of files near them."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["NEAR", "Correction", "tolerated"]

_OVER, NEAR = 0.015, 0.03
"""How far a measured quantity may be over its limit (so that it is within 3 % when measured again), and under it."""

_FARTHEST, _BISECTIONS = 16.0, 30
"""Largest factor by which a model may be wrong, and how often it is bisected to invert a correction."""
_LEAST = 1e-9


class Correction:
    """Maps predicted values to expected ones, by measurements of files.

    A model of times is wrong by a factor, a model of sizes by the bytes that files hold beside tensors. Between two
    measured files the error is interpolated, beyond them it is that of the nearest.

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
        """A copy that learns on its own from here on."""
        copy = Correction(self.adds)
        copy._measured = dict(self._measured)
        return copy

    def learn(self, predicted: float, measured: float) -> None:
        """Takes in a file's measurement."""
        self._measured[max(predicted, _LEAST)] = max(measured, _LEAST)

    def __call__(self, predicted: float) -> float:
        """The measurement to expect, given a prediction."""
        if not self._measured:
            return predicted
        places, values = map(np.array, zip(*sorted(self._measured.items()), strict=True))
        errors = values - places if self.adds else values / places
        error = float(np.interp(math.log(max(predicted, _LEAST)), np.log(places), errors))
        return predicted + error if self.adds else predicted * error

    def inverse(self, expected: float) -> float:
        """The prediction that gives an expected measurement."""
        low, high = math.log(expected / _FARTHEST), math.log(expected * _FARTHEST)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self(math.exp(middle)) > expected else (middle, high)
        return math.exp(low)


def tolerated(name: str, limit: float) -> float:
    """The most that a file may be measured to take: time and memory are noisy, bytes are exact."""
    return limit if name == "size" else (1 + _OVER) * limit
