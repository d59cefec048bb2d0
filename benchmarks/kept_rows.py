"""Rows that a benchmark measured, in a JSON file: a run goes on where another was broken off; markdown beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lobo_fx.files import write_files
from lobo_fx.measures.machine import machine, versions

__all__ = ["KeptRows", "Row"]

Row = dict[str, Any]


class KeptRows:
    """Rows by name; those of other machines, or of other settings, stay beside them.

    Args:
        path: of the JSON file.
        settings: what every row depends on.
    """

    def __init__(self, path: Path, **settings: object) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Row]] = json.loads(path.read_text()) if path.is_file() else {}
        if not all(isinstance(row, dict) for rows in self.sections.values() for row in rows.values()):
            raise SystemExit(f"{path} holds no rows by machine; give another --output")
        packages = (f"{name} {version}" for name, version in versions().items() if name != "lobo_fx")
        own = ", ".join([machine(), *packages, *(f"{name} {value}" for name, value in settings.items())])
        self.rows = self.sections.setdefault(own, {})

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row of this name; what the file lacks is measured, and written down."""
        if name not in self.rows:
            self.rows[name] = measure()
            told = {key: value for key, value in self.rows[name].items() if not isinstance(value, list)}
            print(f"{name}: {told}", flush=True)
            write_files(self.path.parent, {self.path.name: json.dumps(self.sections, indent=1)})
        return self.rows[name]

    def write_markdown(self, about: str, table_of: Callable[[Mapping[str, Row]], str]) -> None:
        """Writes and prints what the figures are, and a table of each machine and its settings."""
        tables = [f"## {section}\n\n{table_of(rows)}" for section, rows in self.sections.items() if rows]
        text = "\n".join([f"{about}\n", *tables])
        write_files(self.path.parent, {self.path.with_suffix(".md").name: text})
        print(text)
