"""State of the whole process (random numbers, warnings, torch.export's) that threads take turns with, or share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable

__all__ = ["CAPTURE_LOCK", "Shared", "release_memory"]

CAPTURE_LOCK = threading.RLock()
"""Held while a library captures a program or propagates shapes. The state of torch.export, and of what silences it, is
the process's: with two threads at once, it would fail or not be restored."""


class Shared(contextlib.ContextDecorator):
    """A change of the process's state that threads and nested calls share; a `with` block or a decorator.

    The first to enter makes the change, and the last to leave reverts it. If two threads each made it, the last to
    leave would restore the state that it found, which includes the change of the other thread.
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


def release_memory() -> None:
    """Frees what is no longer used: dropped graphs, which refer to themselves, and pages that the C library holds.

    Python looks for such cycles after many new objects, not after many bytes: ten copies of a model may wait for it.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
