"""Plug-ins by name, ours and those of other packages alike (entry points)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lobo_fx.errors import InvalidInput, suggestion

__all__ = ["EXPORTERS", "PASSES", "RUNTIMES", "Registry", "snake_case"]

T = TypeVar("T")


@dataclasses.dataclass
class Registry(Generic[T]):
    """Names of one kind of plug-in.

    A package offers a plug-in through an entry point; it is imported when it is asked for. Several entry points with
    the same value are one plug-in: the class name in snake case is its name, the others are aliases.

    Attributes:
        kind: what is registered, for messages ("pass").
        group: the entry-point group.
        default: the name taken where the user gives none.
        named: whether users call plug-ins by their names; where all are taken, any name will do, and goes unread.
        own: what comes with lobo-fx and stands in a table of its code; an `EntryPoint` is imported when it is asked
            for.
        added: plug-ins registered at run time.
    """

    kind: str
    group: str
    default: str = ""
    named: bool = True
    own: Mapping[str, T | EntryPoint] = dataclasses.field(default_factory=dict)
    added: dict[str, T] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self.own:
                raise InvalidInput(
                    f"lobo-fx and another package offer a {self.kind} called '{point.name}': {_origin(point)}; "
                    "uninstall it"
                )
            name = point.name if self.named else point.value
            if points.setdefault(name, point).value != point.value:
                raise InvalidInput(
                    f"two packages offer a {self.kind} called '{name}': "
                    f"{_origin(points[name])} and {_origin(point)}; uninstall one"
                )
        return points

    def names(self) -> dict[str, list[str]]:
        """Each plug-in's name with its aliases."""
        by_value: dict[str, list[str]] = defaultdict(list)
        for name, point in self._points.items():
            by_value[point.value].append(name)
        found: dict[str, list[str]] = {name: [] for name in self.own}
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
        """Every plug-in that can be imported by its name, and for each that can't be, why."""
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
            InvalidInput: the name is taken.
        """
        if name in self:
            raise InvalidInput(f"a {self.kind} called '{name}' is registered already")
        self.added[name] = plugin

    def unregister(self, name: str) -> None:
        """Takes a plug-in that was added for this process away again.

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
            name: its name or an alias; hyphens are underscores.
            others: names of another kind, to be suggested too.

        Raises:
            InvalidInput: there is none (the message suggests the nearest names), or it can't be imported.
        """
        if name in self.added:
            return self.added[name]
        if name in self.own:  # without a look at what is installed
            own = self.own[name]
            return own.load() if isinstance(own, EntryPoint) else own
        key = name.replace("-", "_")
        if key not in self._points:
            known = [*self.own, *self._points, *self.added, *others]
            raise InvalidInput(f"no {self.kind} is called '{name}'; {suggestion(name, known)}")
        try:
            plugin: T = self._points[key].load()
        except Exception as error:  # whatever a package does as it is imported
            origin = _origin(self._points[key])
            raise InvalidInput(f"the {self.kind} '{name}' ({origin}) can't be imported: {error}") from error
        return plugin


def _origin(point: EntryPoint) -> str:
    """Where a plug-in comes from: its package, if that is known, and what it names in it."""
    return point.value if point.dist is None else f"{point.value} of {point.dist.name} {point.dist.version}"


def snake_case(name: str) -> str:
    """`PruneWeights` → `prune_weights`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


PASSES: Registry[Any] = Registry("pass", "lobo_fx.passes")
"""Passes by name."""
EXPORTERS: Registry[Any] = Registry("exporter", "lobo_fx.exporters", default="onnx")
"""Exporters by name of the format."""
RUNTIMES: Registry[Any] = Registry("runtime", "lobo_fx.runtimes", default="onnxruntime")
"""Runtimes by name."""
