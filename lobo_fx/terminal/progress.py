"""Progress on the terminal, for anything that can take more than a second."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

from lobo_fx.terminal.tables import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["T", "Update", "no_progress", "spinner", "track", "training_bar"]

T = TypeVar("T")
Update = Callable[[int, float | None, float | None], None]
"""Takes the completed steps of a training, its last loss and its last score."""

_WANTED = contextvars.ContextVar("lobo_fx_progress", default=True)


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """Draws no progress within the context."""
    token = _WANTED.set(False)
    try:
        yield
    finally:
        _WANTED.reset(token)


def _console(show: bool) -> Console | None:
    """The console to draw on; None without a terminal, even if FORCE_COLOR makes rich take a log for one."""
    if not show or not _WANTED.get() or not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_interactive else None


def track(items: Iterable[T], description: str, show: bool = True, length: int | None = None) -> Iterator[T]:
    """Yields `items` with a progress bar on standard error; without a terminal, nothing is drawn.

    Args:
        items: what to yield.
        description: text before the bar.
        show: whether to draw it.
        length: number of items, where `items` does not tell.
    """
    if (console := _console(show)) is None:
        yield from items
        return
    from rich.progress import track as rich_track

    total = _length(items) if length is None else length
    yield from rich_track(iter(items), printable(description), total=total, console=console, transient=True)


def _length(items: Iterable[object]) -> int | None:
    """Number of items; None if unknown: the `len` of a DataLoader over a stream raises."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except (TypeError, NotImplementedError):
        return None


@contextlib.contextmanager
def spinner(description: str, show: bool = True) -> Iterator[None]:
    """Shows that work of unknown length is in progress."""
    if (console := _console(show)) is None:
        yield
        return
    with console.status(printable(description)):
        yield


@contextlib.contextmanager
def training_bar(total: int, description: str, show: bool = True) -> Iterator[Update]:
    """A progress bar with loss, score and remaining time; without a terminal, nothing is drawn."""
    if (console := _console(show)) is None:
        yield lambda done, loss, score: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}")]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(printable(description), total=total, said="")

        def update(done: int, loss: float | None, score: float | None) -> None:
            named = {"loss": loss, "score": score}
            said = " ".join(f"{name} {value:.4g}" for name, value in named.items() if value is not None)
            bar.update(task, completed=done, said=said)

        yield update
