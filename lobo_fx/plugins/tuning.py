"""How files are tuned for a runtime: what may be asked for, and what the runtime and the exporter must offer."""

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
    """What a file is tuned for.

    Attributes:
        threads: counts to choose from, the first is what others must beat; a count that is kept is written down with
            the options. Empty: one thread while it is measured, and whoever loads the file chooses.
        batch: rows of the input, where the batch is free.
        runtime: name of what is to run the file.
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
        """What it is, for reports."""

    @property
    def kind(self) -> str:
        """What it decides: of choices of one kind, one is taken."""

    @property
    def remark(self) -> str:
        """What a user must know of a file that has it; empty for nothing."""


@runtime_checkable
class TunesFiles(Protocol):
    """A runtime that offers choices beside a file, or in it."""

    def choices(self, threads: Sequence[int]) -> Sequence[Choice]:
        """All that may help, in the order to try it in.

        Args:
            threads: further counts of threads to choose from.
        """

    def write_tuned(self, path: Path, choices: Sequence[Choice], target: Path, threads: int | None) -> None:
        """Writes a file with choices, and all that belongs to it, into the folder of `target`.

        Args:
            path: a file that an exporter wrote; it stays as it is.
            choices: of different kinds.
            target: the file to write, of the same name, in a folder that holds nothing else.
            threads: count to write down, where no choice is one; None leaves it open.

        Raises:
            ExportError: a choice does not fit the file.
        """

    def load(self, path: Path, threads: int | None) -> Session:
        """Loads a file with the options beside it.

        Args:
            path: the file.
            threads: count to run on; None is what the options say, else one.
        """

    def options_of(self, path: Path) -> str:
        """The options that `load` finds beside a file, in words; empty where there are none."""


@runtime_checkable
class ChecksFiles(Protocol):
    """An exporter that can compare a file which was changed since with PyTorch, as it does before it writes one."""

    def check(self, program: Program, path: Path, session: Session) -> tuple[float, dict[str, Any]]:
        """The parity of a file, and what is to be said of it.

        Args:
            program: what was exported.
            path: the file.
            session: what runs it.

        Raises:
            ExportError: it is malformed, or disagrees.
        """
