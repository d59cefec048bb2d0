"""Names that go: they work on, and warn at the caller's line."""

from __future__ import annotations

import warnings

import pytest

from lobo_fx.deprecation import deprecated


@deprecated(since="0.4", instead="new(x)", removed_in="0.6")
def old(x: int, *, y: int = 1) -> int:
    """What it does."""
    return x + y


@deprecated(since="0.4", instead="New", removed_in="0.6")
class Old:
    def __init__(self, x: int) -> None:
        self.x = x


def test_a_function_works_on_and_warns_at_the_callers_line() -> None:
    with pytest.warns(DeprecationWarning, match="old is deprecated") as caught:
        found = old(1, y=2)  # this line
    assert found == 3
    (warning,) = caught
    assert str(warning.message) == "old is deprecated since lobo-fx 0.4 and goes with 0.6; use new(x) instead"
    assert warning.filename == __file__
    with open(__file__, encoding="utf-8") as file:
        assert "# this line" in file.read().splitlines()[warning.lineno - 1]
    assert (old.__name__, old.__doc__) == ("old", "What it does.")


def test_a_class_is_still_a_class() -> None:
    with pytest.warns(DeprecationWarning, match="Old is deprecated") as caught:
        made = Old(3)
    assert isinstance(made, Old)
    assert made.x == 3
    assert caught[0].filename == __file__


def test_what_is_not_called_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @deprecated(since="0.4", instead="new", removed_in="0.6")
        def unused() -> None: ...
