"""The process's own state (random numbers, warnings, what torch.export keeps): threads take turns, or share it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

__all__ = ["CAPTURE", "Shared"]

CAPTURE = threading.RLock()
"""Held while a library captures a program, or follows its shapes: what torch.export keeps meanwhile, and what silences
it, is the process's, and fails or stays behind where two threads are at it."""


class Shared(contextlib.ContextDecorator):
    """A change of the process's state that threads, and calls within calls, share; a `with` block or a decorator.

    The first to enter makes it, the last to leave takes it back. Made by each of two threads, the one that leaves last
    would bring back what it had found, which is the change of the other.
    """

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self.change, self.made = change, contextlib.ExitStack()
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.made.enter_context(self.change())
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.made.close()
