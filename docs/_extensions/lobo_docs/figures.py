"""Figures stand in one place, `docs/figures.md`; pages of passes show its paragraphs."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["paragraph"]

_WHERE = "The machine is named at the head of [all figures](../../figures.md)."


def paragraph(docs: Path, title: str) -> str:
    """What `figures.md` says under a bold title, tables included; links are those of a page of `generated/FOLDER/`.

    Raises:
        ValueError: it has no such paragraph.
    """
    text = re.sub(r"\]\((?!https?:|#)", "](../../", (docs / "figures.md").read_text(encoding="utf-8"))
    found = re.search(rf"^\*\*{re.escape(title)}\*\*.*?(?=^\*\*|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"docs/figures.md has no paragraph that starts with **{title}**")
    return f"{found[0].strip()}\n\n{_WHERE}"
