"""Notebooks as pages: their text and code; what they print, a reader sees by running them."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["pages"]


def pages(docs: Path) -> dict[str, str]:
    """A page a notebook of `docs/notebooks`, and a list of them."""
    notebooks = sorted((docs / "notebooks").glob("*.ipynb"))
    made = {f"{path.stem}.md": _page(path) for path in notebooks}
    listed = "\n".join(path.stem for path in notebooks)
    made["index.md"] = f"# Notebooks\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    return made


def _page(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in texts]
    link = f"{{download}}`Download this notebook <../../notebooks/{path.name}>`"
    return "\n\n".join([parts[0], link, *parts[1:]]) + "\n"
