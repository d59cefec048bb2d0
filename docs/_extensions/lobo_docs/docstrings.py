"""Docstrings: Google's sections, and the Markdown in them as reStructuredText."""

from __future__ import annotations

import inspect
import re
from typing import Any

__all__ = ["Docstring", "as_rst", "from_markdown", "read"]

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Source):\s*(.*)$")
_ENTRY = re.compile(r"^(\w+): (.*)$")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=:\n\n)((?: {4}.*\n|\n)+)(?=\S)")
"""A block of code without a fence, after a paragraph that ends with a colon."""

_CODE = re.compile(r"``.*?``|`([^`]+)`(\w?)", re.DOTALL)


class Docstring:
    """A docstring in parts.

    Attributes:
        text: what stands before the first section, Markdown.
        sections: by their names, the text of each.
    """

    def __init__(self, documented: object) -> None:
        lines, name, found = (inspect.getdoc(documented) or "").splitlines(), "", {"": list[str]()}
        for line in lines:
            if head := _SECTION.match(line):
                name = head[1]
                found[name] = [head[2]]
            else:
                found[name].append(line)
        self.text = "\n".join(found.pop("")).strip()
        self.sections = {name: _dedent(lines) for name, lines in found.items()}

    @property
    def summary(self) -> str:
        """The first sentence, in one line."""
        return " ".join(self.text.partition("\n\n")[0].split())

    def entries(self, name: str) -> dict[str, str]:
        """The entries of a section such as `Attributes`, each in one line."""
        entries: dict[str, str] = {}
        at = ""
        for line in self.sections.get(name, "").splitlines():
            if head := _ENTRY.match(line):
                at = head[1]
                entries[at] = head[2]
            elif at:
                entries[at] += f" {line.strip()}"
        return entries


def _dedent(lines: list[str]) -> str:
    return inspect.cleandoc("\n".join(lines)).strip()


def read(documented: object) -> Docstring:
    """The docstring of a class, function or module."""
    return Docstring(documented)


def from_markdown(app: Any, what: str, name: str, documented: object, options: Any, lines: list[str]) -> None:
    """Turns the Markdown of a docstring into what Sphinx reads, in place."""
    lines[:] = as_rst("\n".join(lines)).splitlines()


def as_rst(markdown: str) -> str:
    """Markdown as docstrings have it, its fences and code between backticks, as reStructuredText."""
    text = _INDENTED.sub(r".. code-block:: python\n\n\1", _FENCE.sub(_code_block, markdown))
    return "".join(
        part if is_block else _CODE.sub(_literal, re.sub(r"(?<![`\w])\|(?=\w)", r"\\|", part))
        for is_block, part in _parts(text)
    )


def _code_block(match: re.Match[str]) -> str:
    indent, language, body = match.groups()
    inner = "\n".join(f"    {line}".rstrip() for line in body.splitlines())
    return f"{indent}.. code-block:: {language or 'text'}\n\n{inner}\n"


def _literal(match: re.Match[str]) -> str:
    """Code that runs over two lines is one; a letter after it needs a break that is not seen."""
    if match[1] is None:
        return match[0]
    after = f"\\ {match[2]}" if match[2] else ""
    return f"``{' '.join(match[1].split())}``{after}"


def _parts(text: str) -> list[tuple[bool, str]]:
    """Text in turn with code blocks: what is inside of a block stays as it is."""
    block = re.compile(r"(^ *\.\. code-block::.*?(?=^\S|\Z))", re.MULTILINE | re.DOTALL)
    return [(index % 2 == 1, part) for index, part in enumerate(block.split(text))]
