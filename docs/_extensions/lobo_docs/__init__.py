"""What the site says of passes, commands and names is written from the code itself, when the site is built.

Pages go to `docs/generated/`, which git ignores; only those that changed are written, so that a second build is short.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lobo_docs import api_pages, command_pages, docstrings, drawings, notebook_pages, pass_pages

__all__ = ["generate", "setup"]

PAGES: dict[str, Callable[[Path], dict[str, str]]] = {
    "api": api_pages.pages,
    "command_line": command_pages.pages,
    "drawings": drawings.pages,
    "notebooks": notebook_pages.pages,
    "passes": pass_pages.pages,
}
"""By folder of `docs/generated/`, what writes it: from the folder of the documentation to texts by file name."""


def generate(docs: Path) -> None:
    """Writes all generated pages; what no longer belongs there goes."""
    for name, make in PAGES.items():
        folder = docs / "generated" / name
        folder.mkdir(parents=True, exist_ok=True)
        made = make(docs)
        for path in folder.iterdir():
            if path.name not in made:
                path.unlink()
        for file, text in made.items():
            path = folder / file
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("builder-inited", lambda app: generate(Path(app.srcdir)))
    # before napoleon, which reads Google's sections
    app.connect("autodoc-process-docstring", docstrings.from_markdown, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
