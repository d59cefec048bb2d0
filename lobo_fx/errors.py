"""What can go wrong, as types: one root, one subclass for each party that can act on it."""

import difflib
import re
from collections.abc import Iterable

__all__ = ["ContractError", "ExportError", "InvalidInput", "LoboError", "TraceError", "suggestion"]


_ALIKE, _SHOWN = 0.5, 20
"""From which likeness on a name is suggested, and how many are listed where none is."""


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
    """Words for a message about a name or pattern that is not known: the nearest known ones.

    Where none is near, it is `otherwise`, or what there is.
    """
    scored = ((_likeness(name, entry), entry) for entry in set(known) if entry)
    near = sorted(scored, key=lambda pair: (-pair[0], pair[1]))
    best = [entry for score, entry in near if score >= max(_ALIKE, near[0][0] - 0.1)]
    if best:
        return f"did you mean {' or '.join(best[:3])}?"
    if otherwise:
        return otherwise
    others = sorted(entry for _, entry in near)
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return f"known: {', '.join(others[:_SHOWN]) or 'none'}{more}"


def _likeness(one: str, other: str) -> float:
    """From 0 to 1; case, hyphens and underscores don't count."""
    one, other = (re.sub(r"[\W_]", "", name).lower() for name in (one, other))
    return difflib.SequenceMatcher(None, one, other).ratio()
