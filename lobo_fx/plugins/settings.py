"""Settings of plug-ins, checked against the types that they are declared with."""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from typing import Annotated, Any, Literal, TypeGuard, Union

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.plugins.annotations import types_of, unread

__all__ = ["Range", "check_names", "check_settings", "named_settings"]


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a numeric setting: `Annotated[float, Range(above=0, most=1)]`.

    Attributes:
        least: inclusive minimum.
        most: inclusive maximum.
        above: exclusive minimum.
        below: exclusive maximum.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = None if self.above is self.least is None else f"({self.above}" if self.least is None else f"[{self.least}"
        high = None if self.below is self.most is None else f"{self.below})" if self.most is None else f"{self.most}]"
        if low and high:
            return f"in {low}, {high}"
        words = {"of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below}
        return " and ".join(f"{word} {limit}" for word, limit in words.items() if limit is not None)


def check_names(kind: type, given: collections.abc.Iterable[str]) -> None:
    """Refuses settings that a class doesn't have.

    Raises:
        InvalidInput: an unknown setting; the nearest is suggested.
    """
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    known = [field.name for field in fields if field.init]
    for name in given:
        if name not in known:
            fault = f"{kind.__name__} has no setting '{name}'; {suggestion(name, known)}"
            raise InvalidInput(unread(kind, name) or fault)


def named_settings(value: object) -> tuple[Any, dict[str, Any]] | None:
    """The name and the settings of `{name: {setting: value}}`, as in recipes; None for any other value."""
    if not isinstance(value, collections.abc.Mapping) or len(value) != 1:
        return None
    ((name, settings),) = value.items()
    settings = {} if settings is None else settings
    is_settings = isinstance(settings, collections.abc.Mapping) and all(isinstance(key, str) for key in settings)
    return (name, dict(settings)) if is_settings else None


def check_settings(settings: object) -> None:
    """Checks the fields of a dataclass against their type annotations.

    Checks `bool`, `int`, `float`, `str`, `None`, `Literal`, unions, `Annotated` with a `Range`, sequences, tuples,
    mappings, callables and classes. Other types are not checked, nor are types that can't be resolved (names that are
    imported for type checkers only). `lobo_fx.Pass` and criteria call it after construction; a class with its own
    `__post_init__` calls `super().__post_init__()` first.

    Args:
        settings: an instance of a dataclass.

    Raises:
        InvalidInput: names the setting, what it is and what it must be.
    """
    kind: Any = type(settings)
    for name, hint in types_of(kind).items():
        value = getattr(settings, name)
        if not _fits(value, hint):
            raise InvalidInput(f"{name} is {value!r}; it must be {_words(hint)}")


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is Annotated:
        ranges = [note for note in hint.__metadata__ if isinstance(note, Range)]
        return _fits(value, arguments[0]) and (not _is_number(value) or all(value in within for within in ranges))
    if hint in (int, float):
        return _is_number(value) and isinstance(value, (int, hint))
    if _is_sequence(hint, origin):
        return isinstance(value, (list, tuple)) and _items_fit(value, origin, arguments)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        key, item = arguments or (Any, Any)
        return isinstance(value, collections.abc.Mapping) and all(
            _fits(k, key) and _fits(v, item) for k, v in value.items()
        )
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return callable(value)
    kind = origin or hint
    is_plain = isinstance(kind, type) and not (getattr(kind, "_is_protocol", False) or kind is object)
    return isinstance(value, kind) if is_plain else True


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_sequence(hint: Any, origin: Any) -> bool:
    kind = origin or hint
    return isinstance(kind, type) and issubclass(kind, collections.abc.Sequence) and not issubclass(kind, (str, bytes))


def _items_fit(value: collections.abc.Sequence[object], origin: Any, arguments: tuple[Any, ...]) -> bool:
    if origin is tuple and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    return not arguments or all(_fits(item, arguments[0]) for item in value)


_PLAIN = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "None",
    Any: "anything",
}


def _words(hint: Any) -> str:
    """What a value of this type must be, in words for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in (Union, types.UnionType):
        return ", or ".join(map(_words, arguments))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is Annotated:
        ranges = [str(note) for note in hint.__metadata__ if isinstance(note, Range)]
        words = _words(arguments[0])
        return (
            " and ".join(ranges) if arguments[0] is float and "in" in " ".join(ranges) else " ".join([words, *ranges])
        )
    if _is_sequence(hint, origin):
        items = [_words(argument) for argument in arguments if argument is not Ellipsis]
        return " ".join(["a list", *["of"] * bool(items), ", ".join(items)]).strip()
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return " ".join(["a mapping", *(["from", " to ".join(map(_words, arguments))] if arguments else [])])
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return "a function"
    return f"a {getattr(origin or hint, '__name__', hint)}"
