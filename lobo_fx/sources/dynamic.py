"""Free sizes as the command line states them: `auto`, or names and bounds by input and dimension."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch.export import Dim

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.graph.inputs import FREED, DynamicShapes

__all__ = ["for_all_inputs", "read_dynamic"]

_NONE, _AUTO = "none", "auto"
_ENTRY = re.compile(r"(?P<input>\w+):(?P<dim>\d+)=(?P<name>[A-Za-z_]\w*)(?:\[(?P<low>\d*)\.\.(?P<high>\d*)\])?")
_EXAMPLE = "images:0=batch,images:2=height[32..512]"


def read_dynamic(text: str) -> DynamicShapes:
    """Reads `auto`, `batch`, `all` or `none`; or `input:dimension=name[lowest..highest]`, separated by commas.

    Both bounds are optional. Sizes of the same name are equal, and its bounds are given at one of them. For the name
    `auto`, torch finds out which sizes are possible.

    Returns:
        A value for `dynamic_shapes=` of `lobo_fx.compile`, with only the inputs named here.

    Raises:
        InvalidInput: the syntax is wrong, a dimension is named twice, or bounds make no sense.
    """
    if text == _NONE:
        return None
    if text in FREED:
        return text
    if ":" not in text and "=" not in text:
        raise InvalidInput(
            f"--dynamic is '{text}', which names no sizes as {_EXAMPLE} does; {suggestion(text, [*FREED, _NONE])}"
        )
    found: dict[str, dict[int, Any]] = {}
    dims: dict[str, Any] = {_AUTO: Dim.AUTO}
    bounds: dict[str, tuple[int | None, int | None]] = {}
    for part in text.split(","):
        entry = _ENTRY.fullmatch(part.strip())
        if entry is None:
            raise InvalidInput(f"--dynamic: '{part.strip()}' is not input:dimension=name[lowest..highest]: {_EXAMPLE}")
        name, given = entry["name"], _bounds(entry)
        if name == _AUTO and given != (None, None):
            raise InvalidInput(f"--dynamic: '{part.strip()}' has bounds, and needs a name of its own: {_EXAMPLE}")
        if given != (None, None) and bounds.setdefault(name, given) != given:
            raise InvalidInput(f"--dynamic: '{name}' has two different bounds; give them once")
        sizes = found.setdefault(entry["input"], {})
        if int(entry["dim"]) in sizes:
            raise InvalidInput(f"--dynamic: dimension {entry['dim']} of '{entry['input']}' is given twice")
        sizes[int(entry["dim"])] = name
    for name in {name for sizes in found.values() for name in sizes.values()} - {_AUTO}:
        low, high = bounds.get(name, (None, None))
        dims[name] = Dim(name, min=low, max=high)
    return {which: {dim: dims[name] for dim, name in sizes.items()} for which, sizes in found.items()}


def _bounds(entry: re.Match[str]) -> tuple[int | None, int | None]:
    low, high = (int(end) if (end := entry[which]) else None for which in ("low", "high"))
    if high is not None and high <= (low or 0):
        raise InvalidInput(f"--dynamic: '{entry[0]}' has no size in its bounds; write {entry['name']}[32..512]")
    return low, high


def for_all_inputs(given: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """A specification for `torch.export`, which must name every input.

    Args:
        given: result of `read_dynamic`.
        names: every input of `forward`, with nothing free.

    Raises:
        InvalidInput: the model has no input of a given name; similar ones are suggested.
    """
    for name in given:
        if name not in names:
            raise InvalidInput(f"--dynamic: the model has no input '{name}'; {suggestion(name, names)}")
    return {**names, **given}
