"""Measurements of programs over data, kept in a folder so that another compilation of the model can reuse them.

The key of a measurement is a checksum of all that it depends on: the program's weights and graph, the data, and the
code. Where the folder grows too large, the files used longest ago are deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save

from lobo_fx.checksums import checksum_of_code, checksum_of_program
from lobo_fx.content import checksum_of
from lobo_fx.files import file_name, make_folder, write_files
from lobo_fx.graph.program import Program

__all__ = ["Measurements", "Tensors"]

Tensors = dict[str, torch.Tensor]
_DIGITS = 24
_LARGEST = 4 << 30
"""Most bytes of all files together."""


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Files of tensors, keyed by what they depend on.

    Attributes:
        folder: created when the first measurement is kept.
        depends: by name of the data, the checksum of all that its measurements share; empty where the data may
            differ at every read, so that nothing can be reused.
        largest: the most bytes that all files may take together.
    """

    folder: Path
    depends: dict[str, str]
    largest: int = _LARGEST

    def take(
        self, what: str, program: Program, over: str, settings: object, measure: Callable[[], Tensors]
    ) -> tuple[Tensors, str]:
        """The result of `measure`, from a kept file if there is one.

        Args:
            what: name of the measurement.
            program: the measured program.
            over: name of the data.
            settings: what else the measurement depends on.
            measure: called where no file holds the result.

        Returns:
            The tensors, and why they could not be kept; empty where they were.
        """
        told = checksum_of(what, settings, measure.__qualname__)
        if not (told and self.depends.get(over)):
            return measure(), ""
        described = f"{told}{checksum_of_program(program)}{self.depends[over]}{checksum_of_code(measure)}"
        name = f"{file_name(what)}-{hashlib.sha256(described.encode()).hexdigest()[:_DIGITS]}.safetensors"
        file = self.folder / name
        with contextlib.suppress(OSError, safetensors.SafetensorError):  # there is none, or it is damaged
            found = load_file(file)
            file.touch()
            return found, ""
        found = measure()
        try:
            make_folder(self.folder)
            write_files(self.folder, {name: save({key: value.contiguous() for key, value in found.items()})})
        except Exception as error:  # a full disk, or tensors that share memory: the measurement itself is still valid
            return found, " ".join(str(error).split()) or type(error).__name__
        self._make_room(file)
        return found, ""

    def _make_room(self, newest: Path) -> None:
        """Removes the files that were used longest ago."""
        with contextlib.suppress(OSError):  # other processes may remove some too
            files = sorted(self.folder.glob("*.safetensors"), key=lambda file: -file.stat().st_mtime)
            room = self.largest - newest.stat().st_size
            for file in files:
                room -= file.stat().st_size if file != newest else 0
                if room < 0 and file != newest:
                    file.unlink()
