"""Describes the settings of a pass or an exporter for users, from its dataclass and its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from lobo_fx.contracts.passbase import shown
from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.annotations import types_of
from lobo_fx.plugins.settings import Range

__all__ = ["SettingFacts", "description_of", "example_of", "settings_of"]

_SECTION = re.compile(r"^(Args|Attributes|Example|Examples|Raises|Returns|Source|Sources|Yields):", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_WORD = re.compile(r"`([\w:-]+)`")
_NO_VALUE = "no such value"


@dataclasses.dataclass(frozen=True)
class SettingFacts:
    """The facts of one setting.

    Attributes:
        name: its name in Python, recipes and on the command line.
        type: its annotation, with literals and ranges spelled out: `float | 'auto'`, `int in [1, 8]`.
        values: the words that it may be; empty where it is not a choice of words.
        default: as Python writes it; empty where the setting is required.
        meaning: its description from the docstring, in one line.
    """

    name: str
    type: str
    values: tuple[str, ...]
    default: str
    meaning: str


def settings_of(kind: type[Any]) -> list[SettingFacts]:
    """The settings of a dataclass in the order of its constructor; keyword-only settings, which many share, come last.

    The words that a setting may be come from its `Literal`. Without one, they are the words in backticks in its
    docstring that the class accepts, provided that it refuses other words.

    Args:
        kind: a pass, an exporter, or any other dataclass whose docstring has a section `Attributes:`;
            inherited fields are looked up where they come from.
    """
    hints = types_of(kind) if dataclasses.is_dataclass(kind) else {}
    meanings = {name: text for base in reversed(kind.__mro__) for name, text in _meanings(base)}
    found = []
    for field in _fields(kind):
        meaning = meanings.get(field.name, "")
        hint = hints.get(field.name, field.type)
        values = tuple(dict.fromkeys(map(str, _literals(hint)))) or _accepted(kind, field.name, meaning)
        found.append(SettingFacts(field.name, _type(hint), values, _default(field), meaning))
    return found


def description_of(kind: type[Any]) -> str:
    """The class's own docstring up to its first section; the signature that `dataclass` generates does not count."""
    text = _SECTION.split(inspect.cleandoc(kind.__doc__ or ""))[0].strip()
    return "no description" if not text or text.startswith(f"{kind.__name__}(") else text


def example_of(name: str, kind: type[Any]) -> str:
    """A pass as `--pass` takes it, with one setting changed from its default if possible."""
    for setting in settings_of(kind):
        for value in setting.values:
            if repr(value) != setting.default and _takes(kind, setting.name, value):
                return f"{name}:{setting.name}={value}"
    for field in _fields(kind):
        if isinstance(field.default, float) and _takes(kind, field.name, field.default / 2):
            return f"{name}:{field.name}={field.default / 2:g}"
    return name


def _fields(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    found = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    return sorted((field for field in found if field.init), key=lambda field: field.kw_only is True)


def _meanings(kind: type[Any]) -> Iterator[tuple[str, str]]:
    parts = _SECTION.split(inspect.cleandoc(kind.__doc__ or ""))
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title == "Attributes":
            yield from ((name, " ".join(text.split())) for name, text in _ENTRY.findall(body))


def _literals(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(value for part in typing.get_args(hint) for value in _literals(part))


def _accepted(kind: type[Any], name: str, meaning: str) -> tuple[str, ...]:
    words = dict.fromkeys(_WORD.findall(meaning))
    if not words or _takes(kind, name, _NO_VALUE):
        return ()
    return tuple(word for word in words if _takes(kind, name, word))


def _takes(kind: type[Any], name: str, value: object) -> bool:
    try:
        kind(**{name: value})
    except (InvalidInput, TypeError):
        return False
    return True


def _type(hint: Any) -> str:
    """An annotation as users read it; unresolved ones as they are written."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, (str, list)):
        return hint if isinstance(hint, str) else f"[{', '.join(map(_type, hint))}]"
    if hint in (type(None), Ellipsis):
        return "None" if hint is not Ellipsis else "..."
    if origin is Annotated:
        return " ".join([_type(arguments[0]), *(str(note) for note in hint.__metadata__ if isinstance(note, Range))])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(_type, arguments))}]" if arguments else name


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return "" if field.default is dataclasses.MISSING else shown(field.default)
