"""Figures stand in one place, the README; pages show its paragraphs."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["pages", "paragraph"]

_WHERE = "The machine is named at the head of [all figures](../figures/index.md)."


def pages(docs: Path) -> dict[str, str]:
    """The README's section of figures as a page."""
    return {"index.md": f"# Figures\n{_section(docs)}"}


def paragraph(docs: Path, title: str) -> str:
    """What the README says under a bold title, tables included.

    Raises:
        ValueError: it has no such paragraph.
    """
    found = re.search(rf"^\*\*{re.escape(title)}\*\*.*?(?=^\*\*|\Z)", _section(docs), re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the figures of README.md have no paragraph that starts with **{title}**")
    return f"{found[0].strip()}\n\n{_WHERE}"


def _section(docs: Path) -> str:
    """The text between `## Figures` and the next title; links are those of a page of `docs/generated/FOLDER/`."""
    text = (docs.parent / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## Figures\n")[2].partition("\n## ")[0]
    return section.replace("](docs/", "](../../")
