"""At 80 columns tables fit, and numbers stay whole; charts of characters."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from lobo_fx.terminal.bars import bars
from lobo_fx.terminal.tables import new_table, render

NUMBERS = ["25,557,032", "1.2e-05", "4,089,184,256", "102.23", "not measured", "0.0123456789"]


def wide(columns: int = 12) -> str:
    table = new_table("a title that is " + "long " * 20, ["pass", *(f"column {index}" for index in range(columns))])
    table.add_row("PruneChannels(ratio=0.5, " + "importance='l1', " * 6 + ")", *(NUMBERS * 3)[:columns])
    return render(table, 80)


def test_a_wide_table_folds_into_records_at_80_columns() -> None:
    text = wide()
    assert max(map(len, text.splitlines())) <= 80
    for number in NUMBERS:
        assert number in text, "torn apart"
    assert text.count("column ") == 12
    assert "column 11" in text


def test_a_blank_line_ends_records() -> None:
    table = new_table("t", ["a", "b"])
    table.add_row("x", "1")
    assert render(table, 4) == "t\n\nx\n  b  1\n\n"
    assert not render(table, 80).endswith("\n\n")


def test_a_table_that_fits_stays_a_table() -> None:
    table = new_table("t", ["a", "b"])
    table.add_row("x", "1,234")
    assert "┃" in render(table, 80)
    assert render(table, 80) == render(table, 180)
    assert "┃" not in render(table, 12), "too narrow for it"


def test_the_terminal_says_how_wide_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    table = new_table("t", ["a", *(f"a long heading {index}" for index in range(6))])
    table.add_row(*"abcdefg")
    assert "┃" in render(table)
    monkeypatch.setenv("COLUMNS", "60")
    assert "┃" not in render(table)


def test_bars_are_as_long_as_their_values_say() -> None:
    text = bars("Size", [("original", 66.4), ("half", 33.2), ("none", 0.0), ("unknown", None), ("equal", math.inf)])
    lines = {line.split(" ")[0]: line for line in text.splitlines()[3:]}
    assert max(map(len, text.splitlines())) <= 80
    assert lines["half"].count("█") == pytest.approx(lines["original"].count("█") / 2, abs=0.5)
    assert lines["none"].count("█") == 0
    assert lines["none"].endswith("0.00")
    assert lines["unknown"].count("█") == 0
    assert lines["unknown"].endswith("not measured")
    assert lines["equal"].endswith("inf")


def test_labels_of_charts_are_no_terminal_codes() -> None:
    text = bars("a\x1b[2J", [("b\x1b[31m\nc" + "x" * 50, 1.0)])
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4
    assert max(map(len, text.splitlines())) <= 80


def test_a_number_with_an_exponent_is_not_torn_at_its_sign() -> None:
    table = new_table("t", ["a", "kernels"])
    table.add_row("x" * 30, " ".join(f"{index}e-05" for index in range(40)))
    text = render(table, 60)
    assert all(f"{index}e-05" in text for index in range(40))
    assert max(map(len, text.splitlines())) <= 60


def test_the_first_table_leaves_the_random_state() -> None:
    """In a process of its own, as rich draws a number when it is imported."""
    body = """
import random
from lobo_fx.terminal.tables import new_table
state = random.getstate()
new_table("a table", ["a column"])
assert random.getstate() == state
"""
    subprocess.run([sys.executable, "-c", body], check=True)
