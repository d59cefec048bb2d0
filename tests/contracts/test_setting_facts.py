"""Settings of passes, read from dataclasses and docstrings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lobo_fx.contracts.setting_facts import SettingFacts, description_of, example_of, settings_of
from lobo_fx.errors import InvalidInput
from lobo_fx.passes import FineTune, FitGoal, QuantizeStatic
from lobo_fx.passes.quantization.integers.targets import TARGETS
from lobo_fx.plugins.settings import Range

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]


@dataclasses.dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
        amount: how much,
            in percent.
    """

    amount: float = 0.5


@dataclasses.dataclass(frozen=True)
class Example(Base):
    """What it does.

    More of it.

    Attributes:
        mode: `fast` or `slow`; `never` is what it was called once.
        way: one of two.
        free: any name, `anything` too.
        listed: many.

    Source: a book.
    """

    mode: str = "fast"
    way: Literal["in", "out"] | None = None
    free: str = "x"
    listed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in ("fast", "slow"):
            raise InvalidInput(f"mode is {self.mode}")


def test_everything_there_is_to_know_of_a_setting() -> None:
    assert settings_of(Example) == [
        SettingFacts("amount", "float", (), "0.5", "how much, in percent."),
        SettingFacts(
            "mode", "str", ("fast", "slow"), "'fast'", "`fast` or `slow`; `never` is what it was called once."
        ),
        SettingFacts("way", "'in' | 'out' | None", ("in", "out"), "None", "one of two."),
        SettingFacts("free", "str", (), "'x'", "any name, `anything` too."),
        SettingFacts("listed", "dict[str, Any]", (), "{}", "many."),
    ]
    assert description_of(Example) == "What it does.\n\nMore of it."
    assert example_of("example", Example) == "example:mode=slow"
    assert example_of("base", Base) == "base:amount=0.25"


def test_a_class_without_settings_has_none() -> None:
    class Plain:
        """No dataclass."""

    assert settings_of(Plain) == []
    assert example_of("plain", Plain) == "plain"


@dataclasses.dataclass(frozen=True)
class Typed:
    count: Annotated[int, Range(1, 126)] = 1
    share: Annotated[float, Range(above=0, most=1)] | None = None
    at_least: Annotated[int, Range(1)] | Literal["auto"] = "auto"
    names: Mapping[str, Sequence[Annotated[int, Range(below=3)]]] = dataclasses.field(default_factory=dict)
    pair: tuple[int, ...] = ()
    function: Callable[[int], str] | None = None
    unknown: Unknown = None


def test_types_are_written_for_people() -> None:
    assert [setting.type for setting in settings_of(Typed)] == [
        "int in [1, 126]",
        "float in (0, 1] | None",
        "int of at least 1 | 'auto'",
        "Mapping[str, Sequence[int below 3]]",
        "tuple[int, ...]",
        "Callable[[int], str] | None",
        "Unknown",
    ]


def test_a_class_without_a_docstring_of_its_own_has_no_description() -> None:
    class Undescribed(Example):
        way: Literal["in"] | None = None

    assert description_of(Undescribed) == description_of(dataclasses.dataclass(frozen=True)(Undescribed))
    assert description_of(Undescribed) == description_of(Typed) == "no description"


def test_every_target_of_a_goal_is_told_on_any_machine() -> None:
    target = next(setting for setting in settings_of(FitGoal) if setting.name == "target")
    assert target.values == ("auto", *TARGETS)


def test_words_and_inherited_meanings_of_our_passes() -> None:
    observer = next(setting for setting in settings_of(QuantizeStatic) if setting.name == "observer")
    assert observer.values == ("histogram", "mse", "entropy", "percentile", "min_max", "moving_average")
    assert all(setting.meaning for setting in settings_of(FineTune))
