"""Phrases that name operators, modules and source lines."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["phrase"]


def phrase(operator: str, modules: str | Sequence[str], line: str) -> str:
    """`aten.linear.default in module 'head' (model.py:12: …)`; of three or more modules, the first two are named."""
    names = [f"'{name}'" for name in ([modules] if isinstance(modules, str) else modules) if name]
    where = f" in module{'s' * (len(names) - 1)} {' and '.join(names)}" if names else ""
    if len(names) > 2:
        where = f" in {len(names)} modules, {names[0]}, {names[1]} and others"
    return f"{operator}{where}" + (f" ({line})" if line else "")
