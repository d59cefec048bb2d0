"""Changes of the process's state that threads share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from lobo_fx.process import Shared

STATE = ["found"]


@contextlib.contextmanager
def change() -> Iterator[None]:
    before, STATE[0] = STATE[0], "changed"
    try:
        yield
    finally:
        STATE[0] = before


def test_the_last_to_leave_takes_the_change_back() -> None:
    shared = Shared(change)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(shared)
    second.enter_context(shared)
    first.close()
    assert STATE == ["changed"]
    second.close()
    assert STATE == ["found"]


def test_a_change_that_is_not_shared_stays() -> None:
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(change())
    second.enter_context(change())
    first.close()
    second.close()
    assert STATE == ["changed"]
    STATE[0] = "found"


def test_as_a_decorator_and_after_an_error() -> None:
    @Shared(change)
    def fail() -> None:
        assert STATE == ["changed"]
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert STATE == ["found"]
