"""What can go wrong, as types: one root, one subclass for each party that can act on it."""

import difflib
from collections.abc import Iterable


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


def near(pattern: str, names: Iterable[str]) -> str:
    """Names like a pattern that matched none, or else the first there are, for a message."""
    known = sorted({name for name in names if name})
    found = difflib.get_close_matches(pattern, known, n=5, cutoff=0.3)
    return f"near: {', '.join(found)}" if found else f"there are: {', '.join(known[:5]) or 'none'}"
