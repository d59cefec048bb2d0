"""How files are tuned for a runtime: the settings, and the protocols of runtime and exporter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.protocols import Session
from lobo_fx.plugins.registry import RUNTIMES

if TYPE_CHECKING:
    from lobo_fx.graph.program import Program

__all__ = ["ChecksFiles", "Choice", "TunesFiles", "Tuning"]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Settings of tuning a file.

    Attributes:
        threads: counts of threads to choose from; the first is the baseline. The chosen count is written with the
            options. Empty: the file is measured on one thread, and the count is left to whoever loads the file.
        batch: rows of the input, where the batch is free.
        runtime: name of the runtime that will run the file.
    """

    threads: tuple[int, ...] = ()
    batch: int = 1
    runtime: str = RUNTIMES.default

    def __post_init__(self) -> None:
        if not isinstance(self.threads, tuple) or len(set(self.threads)) < len(self.threads):
            raise InvalidInput(f"threads is {self.threads!r}; it must be a tuple of different counts, such as (1, 2)")
        if not isinstance(self.runtime, str):
            raise InvalidInput(f"runtime is {self.runtime!r}; it must be the name of one")
        for name, value in (*(("threads", count) for count in self.threads), ("batch", self.batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInput(f"{name} holds {value!r}; it must be a whole number, at least 1")


class Choice(Protocol):
    """One thing that may make a file faster."""

    @property
    def name(self) -> str:
        """Its name, for reports."""

    @property
    def kind(self) -> str:
        """What it decides; at most one choice of each kind is kept."""

    @property
    def remark(self) -> str:
        """What a user must know of a file with this choice; may be empty."""


@runtime_checkable
class TunesFiles(Protocol):
    """A runtime that offers choices to make a file faster, as options beside the file or in it."""

    def choices(self, threads: Sequence[int]) -> Sequence[Choice]:
        """All choices that may help, in the order to try them.

        Args:
            threads: further counts of threads to choose from.
        """

    def write_tuned(self, path: Path, choices: Sequence[Choice], target: Path, threads: int | None) -> None:
        """Writes a file with choices, and all files that belong to it, into the folder of `target`.

        Args:
            path: a file that an exporter wrote; not changed.
            choices: choices of different kinds.
            target: the file to write, with the same name, in an otherwise empty folder.
            threads: count to write with the options, if no choice sets one; None leaves it open.

        Raises:
            ExportError: a choice does not fit the file.
        """

    def load(self, path: Path, threads: int | None) -> Session:
        """Loads a file with the options beside it.

        Args:
            path: the file.
            threads: count to run on; None takes the count in the options, or one if there is none.
        """

    def options_of(self, path: Path) -> str:
        """The options that `load` finds beside a file, in words; empty where there are none."""


@runtime_checkable
class ChecksFiles(Protocol):
    """An exporter that can compare a file that was changed after export with PyTorch."""

    def check(self, program: Program, path: Path, session: Session) -> tuple[float, dict[str, Any]]:
        """Compares a file with PyTorch: returns its parity, and details for the artifact.

        Args:
            program: the exported program.
            path: the file.
            session: the session that runs it.

        Raises:
            ExportError: the file is malformed, or disagrees with PyTorch.
        """
