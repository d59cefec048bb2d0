"""Goals of a compilation, in units that a person uses: milliseconds, megabytes, points of a score."""

from __future__ import annotations

import dataclasses
import math
import re

from lobo_fx.errors import InvalidInput

__all__ = ["Goal", "Limit", "read_limit"]

_UNITS = {
    "latency": {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3},
    "size": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
_UNITS["memory"] = _UNITS["size"]
_NUMBER = re.compile(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*(\S*)\s*")


@dataclasses.dataclass(frozen=True)
class Limit:
    """The most that a quantity may be.

    Attributes:
        value: a share of the original's, or milliseconds (latency) or bytes (size, memory).
        is_share: which of the two.
    """

    value: float
    is_share: bool

    def of(self, original: float) -> float:
        """The limit as a value, given the original's."""
        return self.value * original if self.is_share else self.value


@dataclasses.dataclass(frozen=True)
class Goal:
    """Limits for a compiled model; what they leave open is optimised.

    With a limit of latency, size or memory, the loss is as small as it can be; with a limit of loss alone, the latency.
    What is measured of time and memory is noisy: up to 1.5 % above a limit counts as within it.

    Attributes:
        latency: latency of one row on one thread: a share of the original's, as `0.25`, or a time, as `"20ms"`.
        size: size of the file: a share, or as `"5MB"` (a million bytes each; `MiB` for 2**20).
        memory: peak memory that loading and running the file adds to a process; a share, or as `"90MB"`.
        drop: largest loss of `evaluate`'s score, in its units.
        decibels: least signal-to-noise ratio of the outputs against the original's, on held-out rows.

    Raises:
        InvalidInput: nothing is limited, a limit can't be read, or makes no sense.

    Example:
        >>> Goal(latency="20ms", drop=0.5)
        Goal(latency='20ms', drop=0.5)
    """

    latency: float | str | None = None
    size: float | str | None = None
    memory: float | str | None = None
    drop: float | None = None
    decibels: float | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in dataclasses.astuple(self)):
            raise InvalidInput("a goal limits something: latency=, size=, memory=, drop= or decibels=")
        self.limits  # noqa: B018  refused here
        for name in ("drop", "decibels"):
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or not 0 <= value < math.inf):
                raise InvalidInput(f"{name} is {value!r}; it must be a number of at least 0")
        if self.drop is not None and self.decibels is not None:
            raise InvalidInput("give one limit of the loss: drop= or decibels=")

    @property
    def limits(self) -> dict[str, Limit]:
        """The limits of latency, size and memory, by name."""
        named = {name: getattr(self, name) for name in _UNITS}
        return {name: read_limit(name, value) for name, value in named.items() if value is not None}

    def __repr__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return f"Goal({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"


def read_limit(name: str, value: float | str) -> Limit:
    """A limit from a share, a percentage, or a number with a unit.

    Raises:
        InvalidInput: it is none of these, or a share that is not above 0 and at most 1.
    """
    units = _UNITS[name]
    example = "20ms" if name == "latency" else "5MB"
    expected = f"give a share of the original's in (0, 1], as 0.25, or a number with a unit, as '{example}'"
    number, unit = value, ""
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value)
        try:
            number, unit = (float(found[1]), found[2]) if found else (math.nan, "")
        except ValueError:
            number = math.nan
    if not _is_number(number) or not 0 < float(number) < math.inf:
        raise InvalidInput(f"{name} is {value!r}; {expected}")
    if unit in ("", "%"):
        share = float(number) / (100 if unit else 1)
        if share > 1:
            raise InvalidInput(f"{name} is {value!r}, more than the original has; {expected}")
        return Limit(share, True)
    if unit not in units:
        raise InvalidInput(f"{name} is {value!r}; its unit must be one of {', '.join(units)}, %")
    return Limit(float(number) * units[unit], False)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
