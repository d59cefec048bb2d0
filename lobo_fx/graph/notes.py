"""Notes for the report: sentences that know which operator, module and parameter they are about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lobo_fx.graph.wording import phrase

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Note", "brief", "gathered", "note_of", "notes_from_json"]

_QUANTITY = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?=(?: (?:µs|ms|dB)\b|%))")
_FIELDS = ("reason", "made_by", "operator", "module", "line", "parameter")


class Note(str):
    """What a user should know of a compilation: what was left as it was, or done otherwise than asked, and why.

    A note is the whole sentence; its attributes say what the sentence is about, so that nothing has to read it.

    Attributes:
        reason: what is said of the operator or the parameter; the whole sentence where it is about neither.
        made_by: name of the pass; empty for what the compiler itself has to say.
        operator: the ATen operator, as `aten.linear.default`.
        module: dotted name of the user's module that it was called in.
        line: the user's source line, as `file.py:12: code`.
        parameter: dotted name of a parameter.
    """

    reason: str
    made_by: str
    operator: str
    module: str
    line: str
    parameter: str

    def __new__(
        cls, reason: str, made_by: str = "", operator: str = "", module: str = "", line: str = "", parameter: str = ""
    ) -> Note:
        subject = phrase(operator, module, line) if operator else f"'{parameter}'" if parameter else ""
        note = super().__new__(cls, f"{subject} {reason}".lstrip())
        note.reason, note.made_by, note.operator = reason, made_by, operator
        note.module, note.line, note.parameter = module, line, parameter
        return note

    def __reduce__(self) -> tuple[Any, ...]:
        return Note, tuple(self.as_json().values())

    def as_json(self) -> dict[str, str]:
        """The attributes by name; `Note(**note.as_json())` is the note again."""
        return {field: getattr(self, field) for field in _FIELDS}


def note_of(node: fx.Node, reason: str, made_by: str = "") -> Note:
    """A note about an operator call."""
    from lobo_fx.graph.provenance import module_name, source_line  # reading notes needs no PyTorch

    return Note(reason, made_by, str(node.target), module_name(node), source_line(node))


def gathered(notes: Iterable[str]) -> list[str]:
    """Sentences for users; notes that differ only in the module or the parameter are joined into one."""
    alike: dict[tuple[object, ...], list[Note]] = {}
    for note in (entry if isinstance(entry, Note) else Note(entry) for entry in notes):
        key = (note.reason, note.operator, note.line, bool(note.module), bool(note.parameter))
        alike.setdefault(key, []).append(note)
    return [_together(group) for group in alike.values()]


def brief(notes: Iterable[str]) -> list[str]:
    """One line for each reason: the user's modules (or parameters) first, without operators and source lines.

    Reasons that differ only in quantities, such as microseconds, are one reason with the least and the largest of each.
    """
    alike: dict[str, list[Note]] = {}
    for note in (entry if isinstance(entry, Note) else Note(entry) for entry in notes):
        alike.setdefault(_QUANTITY.sub("", note.reason), []).append(note)
    return [_line(group) for group in alike.values()]


def _line(notes: Sequence[Note]) -> str:
    reason = " ".join(_with_ranges([note.reason for note in notes]).split())
    subjects = dict.fromkeys(filter(None, (note.module or note.parameter or note.operator for note in notes)))
    names = [subject if subject.startswith("aten.") else f"'{subject}'" for subject in subjects]
    return f"{_enumerated(names)}{': each' * (len(names) > 1)} {reason}".lstrip()


def _with_ranges(reasons: Sequence[str]) -> str:
    """A reason whose quantities differ from one to another, with the range of each quantity."""
    columns = zip(*(_QUANTITY.findall(reason) for reason in reasons), strict=True)
    ends = ((min(column, key=float), max(column, key=float)) for column in columns)
    ranges = (low if low == high else f"{low} to {high}" for low, high in ends)
    return _QUANTITY.sub(lambda _: next(ranges), reasons[0])


def _enumerated(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and 3 others`."""
    if len(names) < 3:
        return " and ".join(names)
    return f"{names[0]}, {names[1]} and {len(names) - 2} other{'s' * (len(names) > 3)}"


def _together(notes: Sequence[Note]) -> str:
    """Joins notes with the same reason about several modules or parameters into one sentence."""
    first = notes[0]
    modules = list(dict.fromkeys(note.module for note in notes if note.module))
    parameters = list(dict.fromkeys(note.parameter for note in notes if note.parameter))
    if len(modules) > 1:
        return f"{phrase(first.operator, modules, first.line)} {first.reason}"
    if len(parameters) > 1:
        names = [f"'{name}'" for name in parameters]
        return f"{_enumerated(names)}: each {first.reason}"
    return str(first)


def notes_from_json(saved: Iterable[str | Mapping[str, str]]) -> list[Note]:
    """Reads what `Note.as_json` gave; plain sentences, as older reports have them, become notes without a subject."""
    return [Note(entry) if isinstance(entry, str) else Note(**entry) for entry in saved]
