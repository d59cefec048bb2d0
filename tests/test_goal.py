"""Goals in words: units, shares, percentages, and every limit that is refused, with its sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx import Goal, InvalidInput
from lobo_fx.goal import Limit, read_limit

TIMES = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
EXPECTED = "a share of the original's in (0, 1], as 0.25, or a number with a unit, as '"
UNITS = [*(("latency", unit) for unit in TIMES), *((name, unit) for name in ("size", "memory") for unit in BYTES)]


@given(
    number=st.floats(1e-6, 1e9),
    unit=st.sampled_from(UNITS),
    form=st.sampled_from(["{!r}", "{:e}", "{:.3E}", "{:.9f}"]),
    gap=st.sampled_from(["", " ", "  "]),
    edge=st.sampled_from(["", " "]),
)
def test_a_number_with_a_unit_is_milliseconds_or_bytes(
    number: float, unit: tuple[str, str], form: str, gap: str, edge: str
) -> None:
    name, symbol = unit
    text = form.format(number)
    if float(text) == 0:
        return
    limit = read_limit(name, f"{edge}{text}{gap}{symbol}{edge}")
    assert not limit.is_share
    assert limit.value == pytest.approx(float(text) * (TIMES if name == "latency" else BYTES)[symbol], rel=1e-15)
    assert limit.of(123.0) == limit.value


@given(share=st.floats(0, 1, exclude_min=True), name=st.sampled_from(["latency", "size", "memory"]))
def test_a_bare_number_or_a_percentage_is_a_share(share: float, name: str) -> None:
    for written in (share, repr(share)):
        limit = read_limit(name, written)
        assert limit == Limit(share, True)
        assert limit.of(80.0) == share * 80.0
    if share > 1e-300:
        assert read_limit(name, f"{share * 100!r}%").value == pytest.approx(share, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("latency", "20ms", Limit(20.0, False)),
        ("latency", "0.02 s", Limit(20.0, False)),
        ("latency", "250us", Limit(0.25, False)),
        ("latency", "2e4µs", Limit(20.0, False)),
        ("size", "5MB", Limit(5e6, False)),
        ("size", "5MiB", Limit(5 * 2.0**20, False)),
        ("memory", "1.5 GB", Limit(1.5e9, False)),
        ("memory", ".5GiB", Limit(2.0**29, False)),
        ("latency", "25%", Limit(0.25, True)),
        ("latency", "25 %", Limit(0.25, True)),
        ("size", "0.25", Limit(0.25, True)),
        ("size", 1, Limit(1.0, True)),
    ],
)
def test_limits_are_read(name: str, value: Any, limit: Limit) -> None:
    assert read_limit(name, value) == limit


@pytest.mark.parametrize("name", ["latency", "size", "memory"])
@pytest.mark.parametrize(
    "value",
    [0, -1, -0.25, math.nan, math.inf, True, None, [], "", " ", "fast", "ms", "-5ms", "1.2.3ms", ".", "0ms", "1e999s"],
)
def test_what_is_no_limit_is_refused(name: str, value: Any) -> None:
    example = "20ms" if name == "latency" else "5MB"
    with pytest.raises(InvalidInput) as caught:
        read_limit(name, value)
    assert str(caught.value) == f"{name} is {value!r}; give {EXPECTED}{example}'"


@pytest.mark.parametrize("value", [1.01, 2, "3", "101%", "1e3 %"])
def test_more_than_the_original_has_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_limit("size", value)
    assert str(caught.value) == f"size is {value!r}, more than the original has; give {EXPECTED}5MB'"


@pytest.mark.parametrize(
    ("name", "value", "units"),
    [
        ("latency", "5MB", "us, µs, ms, s, %"),
        ("latency", "5 MS", "us, µs, ms, s, %"),
        ("latency", "5e", "us, µs, ms, s, %"),
        ("size", "20ms", "B, kB, MB, GB, KiB, MiB, GiB, %"),
        ("memory", "20mb", "B, kB, MB, GB, KiB, MiB, GiB, %"),
    ],
)
def test_another_unit_is_refused_with_those_there_are(name: str, value: str, units: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Goal(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name} is {value!r}; its unit must be one of {units}"


@pytest.mark.parametrize("text", ["5ms 6ms", "5 ms!", "5,0ms", "five ms", "+5ms", "5mss"])
def test_text_around_a_limit_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"^latency is "):
        read_limit("latency", text)


@given(text=st.text(max_size=12))
def test_any_text_is_a_limit_or_refused_in_words(text: str) -> None:
    told, value = "", 1.0
    try:
        value = read_limit("latency", text).value
    except InvalidInput as error:
        told = str(error)
    assert told.startswith(f"latency is {text!r}") if told else 0 < value < math.inf


def test_a_goal_limits_something() -> None:
    with pytest.raises(InvalidInput) as caught:
        Goal()
    assert str(caught.value) == "a goal limits something: latency=, size=, memory=, drop= or decibels="


@pytest.mark.parametrize("name", ["drop", "decibels"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "1", [1]])
def test_a_loss_is_a_number_that_is_not_negative(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        Goal(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be a number of at least 0"


def test_the_loss_has_one_limit() -> None:
    with pytest.raises(InvalidInput) as caught:
        Goal(drop=0.5, decibels=20)
    assert str(caught.value) == "give one limit of the loss: drop= or decibels="


def test_a_goal_says_what_was_given_and_holds_its_limits() -> None:
    goal = Goal(latency="20ms", size=0.5, drop=0)
    assert repr(goal) == "Goal(latency='20ms', size=0.5, drop=0)"
    assert goal.limits == {"latency": Limit(20.0, False), "size": Limit(0.5, True)}
    assert Goal(drop=0.5).limits == Goal(decibels=0).limits == {}
    assert goal == Goal(latency="20ms", size=0.5, drop=0) != Goal(latency="20ms", size=0.5)


@pytest.mark.parametrize("goal", [0.25, "20ms", {"latency": 0.25}, Goal])
def test_compile_takes_a_goal_and_nothing_else(goal: Any) -> None:
    model, rows = nn.Linear(4, 4).eval(), torch.randn(8, 4)
    with pytest.raises(InvalidInput) as caught:
        lobo_fx.compile(model, goal=goal, example_inputs=rows, calibration_data=[rows], progress=False)
    kind = type(goal).__name__
    assert str(caught.value) == f"goal is a {kind}; expected lobo_fx.Goal(latency=0.25), for instance"


def test_a_goal_asks_for_the_data_that_it_needs() -> None:
    model, rows = nn.Linear(4, 4).eval(), torch.randn(8, 4)
    with pytest.raises(InvalidInput, match="fit_goal needs calibration_data="):
        lobo_fx.compile(model, goal=Goal(latency=0.5), example_inputs=rows, progress=False)
    with pytest.raises(InvalidInput, match="drop= of the goal needs evaluate="):
        lobo_fx.compile(model, goal=Goal(drop=1), example_inputs=rows, calibration_data=[rows], progress=False)
