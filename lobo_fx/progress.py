"""Progress on the terminal, for anything that can take more than a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, show: bool = True) -> Iterator[T]:
    """Yields `items` behind a progress bar on standard error; nothing is drawn off a terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=console, transient=True)


@contextlib.contextmanager
def spinner(description: str, show: bool = True) -> Iterator[None]:
    """Shows that work of unknown length goes on."""
    from rich.console import Console

    console = Console(stderr=True)
    if not show or not console.is_terminal:
        yield
        return
    with console.status(description):
        yield
