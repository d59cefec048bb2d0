"""Makes an exporter from its name and settings."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.annotations import unread
from lobo_fx.plugins.protocols import Exporter
from lobo_fx.plugins.registry import EXPORTERS

__all__ = ["exporter_of"]


def exporter_of(exporter: str | Exporter, **settings: str | None) -> Exporter:
    """The exporter of that name, or the given one, with the settings that are not None.

    Raises:
        InvalidInput: no such exporter, or it has no such setting.
    """
    found: Any = EXPORTERS.get(exporter)() if isinstance(exporter, str) else exporter
    if isinstance(exporter, type) or not isinstance(exporter, (str, Exporter)):
        raise InvalidInput(f"exporter is {exporter!r}; expected the name of a format, or an exporter")
    given = {name: value for name, value in settings.items() if value is not None}
    known = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
    if unknown := sorted(given.keys() - known):
        fault = f"the exporter {type(found).__name__} has no setting {unknown[0]}="
        raise InvalidInput(unread(type(found), unknown[0]) or fault)
    return cast("Exporter", dataclasses.replace(found, **given) if given else found)
