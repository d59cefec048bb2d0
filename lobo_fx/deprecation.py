"""Deprecates public names: for some versions, calls warn at the caller's line."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["deprecated"]

F = TypeVar("F", bound=Callable[..., Any])


def deprecated(since: str, instead: str, removed_in: str) -> Callable[[F], F]:
    """Marks a function or a class that will be removed: it still works, and warns its callers.

    Args:
        since: the version that deprecates it.
        instead: the replacement, as a reader would write it.
        removed_in: the first version without it.

    Example:
        ```python
        from lobo_fx.deprecation import deprecated


        @deprecated(since="0.4", instead="lobo_fx.compile", removed_in="0.6")
        def optimize(model): ...
        ```
    """

    def mark(target: F) -> F:
        name = target.__qualname__
        message = f"{name} is deprecated since lobo-fx {since} and goes with {removed_in}; use {instead} instead"
        call: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

        @functools.wraps(call)
        def warning(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return call(*args, **kwargs)

        if isinstance(target, type):
            target.__init__ = warning  # type: ignore[misc]
            return target
        return warning  # type: ignore[return-value]

    return mark
