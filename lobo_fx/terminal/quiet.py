"""Silences output of libraries that users can't act on."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from lobo_fx.process import CAPTURE_LOCK

__all__ = ["no_errors_printed", "no_warnings", "quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences warnings and log records below ERROR while a library works; errors still come through.

    One thread at a time.
    """
    with no_warnings():
        before = logging.root.manager.disable
        if before >= logging.WARNING:  # already silenced; setting it again would clear the caches of all loggers
            yield
            return
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Silences warnings, one thread at a time."""
    with CAPTURE_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def no_errors_printed() -> Iterator[None]:
    """Drops what this thread writes to standard error, where some libraries print part of an error that they raise."""
    with CAPTURE_LOCK, contextlib.redirect_stderr(_ForOtherThreads(sys.stderr)):
        yield


class _ForOtherThreads:
    """A stream that drops what its creating thread writes, and passes on the rest."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silent else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
