"""Reads the annotations that declare a plug-in's settings."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from typing import Any

__all__ = ["types_of", "unread"]


def unread(kind: type, name: str) -> str:
    """The error for a setting that a class annotates but does not take, as it is no dataclass; else an empty string."""
    for base in kind.__mro__:
        written = vars(base).get("__annotations__", {}).get(name)
        if written is not None and "ClassVar" not in str(written) and "__dataclass_fields__" not in vars(base):
            return f"{base.__name__} is no dataclass: decorate it with @dataclasses.dataclass(frozen=True)"
    return ""


@functools.cache
def types_of(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name, each resolved in its class's module; unresolvable ones are left out."""
    found: dict[str, Any] = {}
    names = {field.name for field in dataclasses.fields(kind)}
    for base in reversed(kind.__mro__):
        for name, written in vars(base).get("__annotations__", {}).items():
            if name in names:
                holder = types.SimpleNamespace(__annotations__={name: written})
                try:
                    known = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
                    found[name] = typing.get_type_hints(holder, known, include_extras=True)[name]
                except (NameError, AttributeError, TypeError):
                    found.pop(name, None)
    return found
