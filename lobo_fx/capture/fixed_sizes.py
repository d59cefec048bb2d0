"""Where a model's code fixes a size that was to stay free: torch says that it does, but not where."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lobo_fx.graph.provenance import user_line
from lobo_fx.process import CAPTURE

__all__ = ["fixing_lines"]


@contextlib.contextmanager
def fixing_lines() -> Iterator[list[str]]:
    """The user's lines at which `torch.export`, while it runs within, replaces a free size by a number."""
    lines: list[str] = []
    depth = len(traceback.extract_stack())
    replace = ShapeEnv._set_replacement

    def see(self: ShapeEnv, a: Any, tgt: Any, msg: str) -> None:
        if tgt.is_number and (line := user_line("".join(traceback.format_stack()[depth:]))):
            lines.append(line)
        replace(self, a, tgt, msg)

    with CAPTURE:
        ShapeEnv._set_replacement = see  # type: ignore[method-assign]
        try:
            yield lines
        finally:
            ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
