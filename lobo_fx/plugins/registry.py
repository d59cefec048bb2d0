"""Registries of plug-ins by name: built-in ones, and those that other packages offer through entry points."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lobo_fx.errors import InvalidInput, suggestion

__all__ = ["EXPORTERS", "PASSES", "RUNTIMES", "Registry", "snake_case"]

T = TypeVar("T")


@dataclasses.dataclass
class Registry(Generic[T]):
    """Names of one kind of plug-in.

    A package offers a plug-in through an entry point, which is imported on first use. Several entry points with
    the same value are one plug-in: the class name in snake case is its name, the others are aliases.

    Attributes:
        kind: what is registered, for messages ("pass").
        group: the entry-point group.
        default: the name used where the user gives none.
        named: whether users choose plug-ins by name; if not, all plug-ins are loaded, and names are ignored.
        own: built-in plug-ins from a table in the code; an `EntryPoint` is imported on first use.
        added: plug-ins registered at run time.
        must_be: what an entry point must name, for messages.
        fits: checks whether an imported object is a plug-in of this kind.
    """

    kind: str
    group: str
    default: str = ""
    named: bool = True
    own: Mapping[str, T | EntryPoint] = dataclasses.field(default_factory=dict)
    added: dict[str, T] = dataclasses.field(default_factory=dict)
    must_be: str = ""
    fits: Callable[[Any], bool] = lambda plugin: True

    @functools.cached_property
    def _points(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name; those of the same name but another value are different plug-ins."""
        points: dict[str, list[EntryPoint]] = defaultdict(list)
        for point in entry_points(group=self.group):
            known = points[point.name if self.named else point.value]
            if all(other.value != point.value for other in known):
                known.append(point)
        return dict(points)

    def _clash(self, name: str) -> str:
        """Why a name that several plug-ins share can't be used; empty where there is no clash."""
        points = self._points.get(name, [])
        others = [point for point in points if not _is_ours(point)]
        is_ours = name in self.own or len(others) < len(points)
        if len(others) + is_ours < 2:
            return ""
        origins = " and ".join(map(_origin, others))
        if is_ours:
            return f"the name '{name}' is taken by lobo-fx: {origins} must rename its {self.kind}"
        return f"two packages offer a {self.kind} called '{name}': {origins}; uninstall one"

    def names(self) -> dict[str, list[str]]:
        """Each plug-in's name with its aliases; a name that several plug-ins share has no aliases."""
        by_value: dict[str, list[str]] = defaultdict(list)
        found: dict[str, list[str]] = {name: [] for name in self.own}
        for name, points in self._points.items():
            if self._clash(name):
                found[name] = []
            else:
                by_value[points[0].value].append(name)
        for value, names in by_value.items():
            own = snake_case(value.rpartition(":")[2])
            names.sort(key=lambda name, own=own: (name != own, name))  # type: ignore[misc]
            found[names[0]] = names[1:]
        return found | {name: [] for name in self.added}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.added or name in self._points

    def __getitem__(self, name: str) -> T:
        return self.get(name)

    def loadable(self) -> tuple[dict[str, T], list[str]]:
        """All plug-ins that can be imported, by name, and the errors of those that can't."""
        found: dict[str, T] = {}
        failures = []
        for name in self:
            try:
                found[name] = self.get(name)
            except InvalidInput as error:
                failures.append(str(error))
        return found, failures

    def register(self, name: str, plugin: T) -> None:
        """Adds a plug-in for this process.

        Raises:
            InvalidInput: the name is taken, or the plug-in is of another kind.
        """
        if name in self:
            raise InvalidInput(f"a {self.kind} called '{name}' is registered already")
        if not self.fits(plugin):
            raise InvalidInput(f"'{name}' is no {self.kind}: it must be {self.must_be}")
        self.added[name] = plugin

    def unregister(self, name: str) -> None:
        """Removes a plug-in that was registered in this process.

        Raises:
            InvalidInput: none was added under this name.
        """
        if name not in self.added:
            raise InvalidInput(
                f"no {self.kind} called '{name}' was registered in this process; {suggestion(name, self.added)}"
            )
        del self.added[name]

    def get(self, name: str, others: Iterable[str] = ()) -> T:
        """The plug-in called `name`.

        Args:
            name: its name or an alias; hyphens count as underscores.
            others: further names to suggest in the error message.

        Raises:
            InvalidInput: there is none (the message suggests the nearest names), several packages offer it, it can't
                be imported, or it is of another kind.
        """
        self.check(name, others=others)
        key = self._key(name)
        if key in self.added:
            return self.added[key]
        return self.ours(key) if key in self.own else self._load(key, self._points[key][0])

    def ours(self, name: str) -> T:
        """The built-in plug-in of this name, even if other packages offer one; for lobo-fx's own code."""
        if name not in self.own:
            return self._load(name, next(point for point in self._points[name] if _is_ours(point)))
        own = self.own[name]
        return own.load() if isinstance(own, EntryPoint) else own

    def check(self, name: object, setting: str = "", others: Iterable[str] = ()) -> None:
        """Refuses a name that `get` would refuse, without importing the plug-in.

        Args:
            name: a name or an alias; converted to text.
            setting: the setting that has this value, for messages.
            others: as `get` takes them.

        Raises:
            InvalidInput: no plug-in has this name, or several packages offer one.
        """
        key = self._key(str(name))
        if key in self.added:
            return
        if clash := self._clash(key):
            raise InvalidInput(f"{setting} is {name!r}: {clash}" if setting else clash)
        if key not in self:
            fault = f"{setting} is {name!r}" if setting else f"no {self.kind} is called '{name}'"
            listed = (
                f"known: {', '.join(sorted(self))}; a package offers its own by an entry point in the group "
                f"'{self.group}', and must be installed again once it has it"
            )
            known = [*self.own, *self._points, *self.added, *others]
            raise InvalidInput(f"{fault}; {suggestion(str(name), known, listed)}")

    def origin(self, name: str) -> str:
        """Where the plug-in comes from, for messages."""
        if name in self.added:
            return "registered in this process"
        return " and ".join(map(_origin, self._points.get(self._key(name), []))) or "lobo-fx"

    def _key(self, name: str) -> str:
        return name if name in self else name.replace("-", "_")

    def _load(self, name: str, point: EntryPoint) -> T:
        try:
            plugin: T = point.load()
        except Exception as error:  # importing a package may raise anything
            raise InvalidInput(f"the {self.kind} '{name}' ({_origin(point)}) can't be imported: {error}") from error
        if not self.fits(plugin):
            raise InvalidInput(
                f"the entry point '{point.name}' in the group '{self.group}' ({_origin(point)}) names no {self.kind}: "
                f"it must name {self.must_be}"
            )
        return plugin


def _is_ours(point: EntryPoint) -> bool:
    return point.value.startswith("lobo_fx.")


def _origin(point: EntryPoint) -> str:
    """The object that an entry point names, and its package if that is known."""
    return point.value if point.dist is None else f"{point.value} of {point.dist.name} {point.dist.version}"


def snake_case(name: str) -> str:
    """`PruneWeights` → `prune_weights`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _makes(plugin: Any, method: str) -> bool:
    return isinstance(plugin, type) and callable(getattr(plugin, method, None))


PASSES: Registry[Any] = Registry("pass", "lobo_fx.passes", must_be="a class that derives from lobo_fx.Pass")
"""Passes by name."""
EXPORTERS: Registry[Any] = Registry(
    "exporter",
    "lobo_fx.exporters",
    default="onnx",
    must_be="a class as lobo_fx.plugins.protocols.Exporter says",
    fits=lambda plugin: _makes(plugin, "export"),
)
"""Exporters by name of the format."""
RUNTIMES: Registry[Any] = Registry(
    "runtime",
    "lobo_fx.runtimes",
    default="onnxruntime",
    must_be="a class as lobo_fx.plugins.protocols.Runtime says",
    fits=lambda plugin: _makes(plugin, "load"),
)
"""Runtimes by name."""
