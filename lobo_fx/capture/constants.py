"""Finds where `torch.export` makes a free size a constant: it does not record the line, so it is watched meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lobo_fx.graph.provenance import user_line
from lobo_fx.process import CAPTURE_LOCK

__all__ = ["Constants", "constants_located"]


@dataclasses.dataclass
class Constants:
    """The sizes of one export that became constants.

    Attributes:
        lines: by symbol, the user's line where it became a constant; empty if no frame is the user's.
        environment: torch's shape environment, which maps the inputs' sizes to symbols.
    """

    lines: dict[sympy.Symbol, str] = dataclasses.field(default_factory=dict)
    environment: Any = None

    def line(self, source: str) -> str:
        """The user's line that made a size, or one equal to it, a constant; empty if not known.

        Args:
            source: torch's name of the size, `L['x'].size()[1]`.
        """
        symbol = getattr(self.environment, "source_to_var", {}).get(source)
        while symbol is not None and symbol not in self.lines:
            symbol = self.environment.replacements.get(symbol)
        return self.lines.get(symbol, "")


@contextlib.contextmanager
def constants_located(found: Constants | None = None) -> Iterator[Constants]:
    """Collects which sizes become constants in this thread, and where; one thread at a time."""
    found = Constants() if found is None else found
    thread, replace = threading.get_ident(), ShapeEnv._set_replacement
    depth = len(traceback.extract_stack())

    @functools.wraps(replace)
    def located(self: Any, symbol: sympy.Symbol, value: sympy.Expr, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread and value.is_number:
            found.environment = self
            found.lines.setdefault(symbol, user_line("".join(traceback.format_stack()[depth:])))
        replace(self, symbol, value, *args, **kwargs)

    with CAPTURE_LOCK:
        ShapeEnv._set_replacement = located  # type: ignore[method-assign, assignment]
        try:
            yield found
        finally:
            ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
