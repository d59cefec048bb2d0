"""Rows that a benchmark measured, in a JSON file: a run goes on where another was broken off; markdown beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lobo_fx.files import write_files

__all__ = ["KeptRows"]


class KeptRows:
    """Rows by name.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this name; what the file lacks is measured, printed and written down."""
        if name not in self.rows:
            self.rows[name] = measure()
            print(f"{name}: {self.rows[name]}", flush=True)
            write_files(self.path.parent, {self.path.name: json.dumps(self.rows, indent=1)})
        found: dict[str, Any] = self.rows[name]
        return found

    def tell(self, text: str) -> None:
        """Writes the markdown, and prints it."""
        write_files(self.path.parent, {self.path.with_suffix(".md").name: text})
        print(text)
