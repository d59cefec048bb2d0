"""The exception types: one root, and a subclass for each party that can act on an error."""

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = ["ContractError", "ExportError", "InvalidInput", "LoboError", "TraceError", "first_few", "suggestion"]


_ALIKE, _SHOWN = 0.5, 20
"""The least likeness at which a name is suggested; how many known names are listed where none is alike."""


class LoboError(Exception):
    """Root of every error this package raises on purpose."""


class InvalidInput(LoboError, ValueError):
    """The caller passed something that can't work: a setting, a name, a tensor, data or a path."""


class TraceError(LoboError):
    """`torch.export` could not capture the model; the message shows the user's own line."""


class ContractError(LoboError):
    """A pass broke its promise; the message names the pass, the node and the user's module."""


class ExportError(LoboError):
    """The program could not be written faithfully in the target format; no file was left."""


def suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message about an unknown name or pattern: suggests the most similar known names.

    Where no known name is similar, returns `otherwise`, or a list of the known names if that is empty.
    """
    scored = ((_likeness(name, entry), entry) for entry in set(known) if entry)
    near = sorted(scored, key=lambda pair: (-pair[0], pair[1]))
    best = [entry for score, entry in near if score >= max(_ALIKE, near[0][0] - 0.1)]
    if best:
        return f"did you mean {' or '.join(best[:3])}?"
    if otherwise:
        return otherwise
    others = sorted(entry for _, entry in near)
    return f"known: {first_few(others, _SHOWN) or 'none'}"


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are: `a, b, c and 4 more`."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def _likeness(one: str, other: str) -> float:
    """Similarity of two names, from 0 to 1; ignores case, hyphens and underscores."""
    one, other = (re.sub(r"[\W_]", "", name).lower() for name in (one, other))
    return difflib.SequenceMatcher(None, one, other).ratio()
