"""Passes, exporters and runtimes by name, ours and those of other packages alike (entry points)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lobo_fx.errors import InvalidInput, suggestion

__all__ = ["EXPORTERS", "PASSES", "RUNTIMES", "Registry", "snake_case"]


@dataclasses.dataclass
class Registry:
    """Names of one kind of plug-in.

    A package offers a plug-in through an entry point. Several entry points with the same value are
    one plug-in: the class name in snake case is its name, the others are aliases.

    Attributes:
        kind: what is registered, for messages ("pass").
        group: the entry-point group.
        default: the name taken where the user gives none.
        added: plug-ins registered at run time.
    """

    kind: str
    group: str
    default: str = ""
    added: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if points.setdefault(point.name, point).value != point.value:
                raise InvalidInput(
                    f"two packages offer a {self.kind} called '{point.name}': "
                    f"{points[point.name].value} and {point.value}; uninstall one"
                )
        return points

    def names(self) -> dict[str, list[str]]:
        """Each plug-in's name with its aliases."""
        by_value: dict[str, list[str]] = defaultdict(list)
        for name, point in self._points.items():
            by_value[point.value].append(name)
        found: dict[str, list[str]] = {}
        for value, names in by_value.items():
            own = snake_case(value.rpartition(":")[2])
            names.sort(key=lambda name, own=own: (name != own, name))  # type: ignore[misc]
            found[names[0]] = names[1:]
        return found | {name: [] for name in self.added}

    def register(self, name: str, plugin: Any) -> None:
        """Adds a plug-in for this process.

        Raises:
            InvalidInput: the name is taken.
        """
        if name in self.added or name in self._points:
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

    def get(self, name: str, others: Iterable[str] = ()) -> Any:
        """The plug-in called `name`.

        Args:
            name: its name or an alias; hyphens are underscores.
            others: names of another kind, to be suggested too.

        Raises:
            InvalidInput: there is none (the message suggests the nearest names), or it can't be imported.
        """
        if name in self.added:
            return self.added[name]
        key = name.replace("-", "_")
        if key not in self._points:
            known = [*self._points, *self.added, *others]
            raise InvalidInput(f"no {self.kind} is called '{name}'; {suggestion(name, known)}")
        try:
            return self._points[key].load()
        except (ImportError, AttributeError) as error:
            origin = self._points[key].value
            raise InvalidInput(f"the {self.kind} '{name}' ({origin}) can't be imported: {error}") from error


def snake_case(name: str) -> str:
    """`PruneWeights` → `prune_weights`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


PASSES = Registry("pass", "lobo_fx.passes")
"""Passes by name."""
EXPORTERS = Registry("exporter", "lobo_fx.exporters", default="onnx")
"""Exporters by name of the format."""
RUNTIMES = Registry("runtime", "lobo_fx.runtimes", default="onnxruntime")
"""Runtimes by name."""
