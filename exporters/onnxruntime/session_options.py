"""Session options beside a file: `model.onnx.session.json` says how ONNX Runtime is to run `model.onnx`.

The file holds data alone. Whoever loads a model without lobo-fx needs three lines for it, whatever is tuned:

    saved, options = json.load(open("model.onnx.session.json")), onnxruntime.SessionOptions()
    [setattr(options, name, type(getattr(options, name))(value)) for name, value in saved["options"].items()]
    [options.add_session_config_entry(name, value) for name, value in saved["entries"].items()]

and passes `options` to `onnxruntime.InferenceSession("model.onnx", options)`. `OnnxRuntime.load` does so by itself, and
ignores options that were written for another file than the one that stands there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lobo_fx.errors import InvalidInput, suggestion
from lobo_fx.files import checksum, followed, read_json

__all__ = ["ONLY_FATAL", "SUFFIX", "SavedOptions", "read_options", "write_options"]

ONLY_FATAL = 4
"""Log level at which ONNX Runtime prints nothing but what ends it: errors are told by its exceptions."""
SUFFIX = ".session.json"
"""Ending of a file with options, after the model's name."""

_FORMAT = 1
_PARTS = {"format", "model", "options", "entries"}
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "graph_optimization_level": (1, 2, 3, 99),
    "enable_cpu_mem_arena": (False, True),
    "enable_mem_pattern": (False, True),
    "intra_op_num_threads": tuple(range(1, 1025)),
}
"""Values that attributes of `onnxruntime.SessionOptions` may have, by name."""
_ENTRIES: dict[str, tuple[Any, ...]] = {
    "session.disable_prepacking": ("0", "1"),
    "session.set_denormal_as_zero": ("0", "1"),
}
"""The same for keys of `SessionOptions.add_session_config_entry` (onnxruntime_session_options_config_keys.h)."""


@dataclasses.dataclass(frozen=True)
class SavedOptions:
    """Session options that differ from ONNX Runtime's defaults.

    Attributes:
        options: attributes of `onnxruntime.SessionOptions`, by name; an enumeration as its number.
        entries: its config entries, by key.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {**self.options, **self.entries}.items())

    def apply(self, options: Any) -> None:
        """Sets them on an `onnxruntime.SessionOptions`."""
        for name, value in self.options.items():
            setattr(options, name, type(getattr(options, name))(value))
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)


def write_options(saved: SavedOptions, model: Path) -> Path:
    """Writes options beside the model that they are meant for, which stands there already."""
    path = model.with_name(f"{model.name}{SUFFIX}")
    content = {"format": _FORMAT, "model": checksum(model), **dataclasses.asdict(saved)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read_options(model: Path) -> SavedOptions | None:
    """The options that stand beside a model; None where there are none, or they were written for another file.

    Raises:
        InvalidInput: they are damaged, of a newer version, or hold what no option may be.
    """
    model = followed(model)
    path = model.with_name(f"{model.name}{SUFFIX}")
    if not path.exists():
        return None
    try:
        saved = read_json(path)
        if (found := saved.get("format")) != _FORMAT:
            raise InvalidInput(f"{path} has format {found!r}; this version reads format {_FORMAT}")
        if different := sorted(_PARTS ^ saved.keys()):
            raise InvalidInput(f"{path} {'has' if different[0] in saved else 'lacks'} '{different[0]}'")
        for part, one, known in (("options", "option", _OPTIONS), ("entries", "entry", _ENTRIES)):
            if not isinstance(saved[part], dict):
                raise InvalidInput(f"{path} holds {part} that are no object")
            _check(path, one, saved[part], known)
    except InvalidInput as error:
        raise InvalidInput(f"{error}. Without that file, {model.name} runs with default options") from error
    if saved["model"] != checksum(model):
        return None
    return SavedOptions(saved["options"], saved["entries"])


def _check(path: Path, one: str, found: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in found.items():
        if name not in known:
            raise InvalidInput(f"{path} has the unknown {one} '{name}'; {suggestion(name, known)}")
        if not any(type(value) is type(allowed) and value == allowed for allowed in known[name]):
            raise InvalidInput(f"{path} has {name} = {value!r}, which it may not be")
