"""Settings held against their types: what fits, what does not, and in which words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pytest

import lobo_fx
from lobo_fx.contracts.setting_facts import settings_of
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.passes.pruning import criteria
from lobo_fx.passes.pruning.criteria import CRITERIA, Consensus, Criterion, Fisher, Taylor
from lobo_fx.plugins.exporters import exporter_of
from lobo_fx.plugins.registry import PASSES
from lobo_fx.plugins.settings import Range, check_settings
from lobo_fx.recipe import build, read_pass, read_recipe, resolve

if TYPE_CHECKING:
    from somewhere import Unknown  # type: ignore[import-not-found]


@dataclasses.dataclass(frozen=True)
class Every(lobo_fx.Pass):
    """A setting of every kind."""

    share: Annotated[float, Range(above=0, most=1)] = 1
    steps: Annotated[int, Range(1)] = 1
    few: Annotated[int, Range(below=5)] | None = None
    scope: Literal["layer", "global", 3] = "layer"
    flag: bool = False
    name: str = ""
    names: Sequence[str] = ()
    pair: tuple[int, str] = (1, "a")
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    function: Callable[[int], int] | None = None
    other: lobo_fx.Pass | None = None
    anything: Any = None
    unknown: Unknown = None

    def run(self, program: lobo_fx.Program, context: lobo_fx.Context) -> lobo_fx.Program:
        return program


@pytest.mark.parametrize(
    "settings",
    [
        {"share": 0.5},
        {"share": 1},
        {"few": -3},
        {"scope": 3},
        {"names": ["a"]},
        {"names": ("a", "b")},
        {"pair": [2, "b"]},
        {"shares": {"a": 1}},
        {"function": len},
        {"other": lobo_fx.passes.FoldBatchNorm()},
        {"anything": object()},
        {"unknown": 3},
    ],
)
def test_what_fits_is_taken(settings: dict[str, Any]) -> None:
    made = Every(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.5}, "share is 1.5; it must be in (0, 1]"),
        ({"share": 0}, "share is 0; it must be in (0, 1]"),
        ({"share": float("nan")}, "share is nan; it must be in (0, 1]"),
        ({"share": True}, "share is True; it must be in (0, 1]"),
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"steps": 1.0}, "steps is 1.0; it must be a whole number of at least 1"),
        ({"few": 5}, "few is 5; it must be a whole number below 5, or None"),
        ({"scope": "all"}, "scope is 'all'; it must be one of layer, global, 3"),
        ({"scope": 3.0}, "scope is 3.0; it must be one of layer, global, 3"),
        ({"flag": 1}, "flag is 1; it must be True or False"),
        ({"name": None}, "name is None; it must be text"),
        ({"names": "ab"}, "names is 'ab'; it must be a list of text"),
        ({"names": ["a", 1]}, "names is ['a', 1]; it must be a list of text"),
        ({"pair": [1]}, "pair is [1]; it must be a list of a whole number, text"),
        ({"shares": {"a": "b"}}, "shares is {'a': 'b'}; it must be a mapping from text to a number"),
        ({"function": 3}, "function is 3; it must be a function, or None"),
        ({"other": 3}, "other is 3; it must be a Pass, or None"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Every(**settings)
    assert str(refused.value) == words
    with pytest.raises(InvalidInput):
        build(Every, settings)


def test_the_command_line_and_recipes_say_it_too() -> None:
    PASSES.register("every", Every)
    try:
        with pytest.raises(InvalidInput, match=r"^Every: share is 2; it must be in \(0, 1\]"):
            read_pass("every:share=2")
        assert read_pass("every:scope=global,names=[a]") == Every(scope="global", names=["a"])
        with pytest.raises(InvalidInput, match=r"^mine.yaml:3: Every: share is 2; it must be in \(0, 1\]"):
            read_recipe("passes:\n  - every:\n      share: 2\n", "mine.yaml")
        with pytest.raises(InvalidInput, match=r"^Fails: share is 2"):
            resolve(Fails)
    finally:
        PASSES.unregister("every")


@dataclasses.dataclass(frozen=True)
class Fails(Every):
    """Its default does not fit."""

    share: Annotated[float, Range(above=0, most=1)] = 2


class Undecorated(Every):
    """Settings that no decorator reads."""

    amount: int = 1
    unit: ClassVar[str] = "rows"


def test_a_class_that_is_no_dataclass_is_told_so() -> None:
    with pytest.raises(InvalidInput) as refused:
        build(Undecorated, {"amount": 2})
    assert str(refused.value) == "Undecorated is no dataclass: decorate it with @dataclasses.dataclass(frozen=True)"
    for name in ("unit", "amuont", "promise"):
        with pytest.raises(InvalidInput, match=f"Undecorated has no setting '{name}'"):
            build(Undecorated, {name: 2})


def test_an_exporter_that_is_no_dataclass_is_told_so() -> None:
    class Plain:
        storage: str = "dense"
        suffix: str = ".plain"

        def export(self, program: lobo_fx.Program, path: Path, metadata: Mapping[str, str]) -> lobo_fx.Artifact:
            raise NotImplementedError

    exporter: Any = Plain()
    with pytest.raises(InvalidInput, match="Plain is no dataclass: decorate it"):
        exporter_of(exporter, storage="packed")
    with pytest.raises(InvalidInput, match="the exporter Plain has no setting values="):
        exporter_of(exporter, values="float16")


@pytest.mark.parametrize("exporter", [3, None, OnnxExporter])
def test_what_is_no_exporter_is_refused(exporter: Any) -> None:
    with pytest.raises(InvalidInput, match=r"exporter is .*; expected the name of a format, or an exporter"):
        exporter_of(exporter)
    assert isinstance(exporter_of(OnnxExporter()), OnnxExporter)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("fit_goal", {"latency": 0.5, "kinds": 3}, "kinds is 3; it must be a list of "),
        ("fit_goal", {"latency": 0.5, "seconds": True}, "seconds is True; it must be a number"),
        ("prune_channels", {"steps": True}, "steps is True; it must be a whole number"),
        ("prune_channels", {"ratio": False}, "ratio is False; it must be a number"),
        (
            "prune_channels",
            {"ratio": {0: 0.5}},
            "ratio is {0: 0.5}; it must be a number, or a mapping from text",
        ),
        ("prune_weights", {"amount": False}, "amount is False; it must be a number"),
        ("factorize", {"rank": True}, "rank is True; it must be a number"),
        ("student", {"start": ["kept"]}, "start is ['kept']; it must be one of kept, fresh"),
        ("distill", {"match": 3}, "match is 3; it must be one of"),
        ("iterative_prune", {"path": ["cubic"]}, "path is ['cubic']; it must be one of cubic, linear"),
    ],
)
def test_passes_with_checks_of_their_own_check_types_too(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        PASSES.get(name)(**settings)


def test_a_criterion_that_can_not_be_made_at_its_defaults_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Peak(Criterion):
        power: int = "four"  # type: ignore[assignment]

        def scorer(self, inference: Any, context: Any) -> Any: ...

    monkeypatch.setitem(CRITERIA.added, "peak", Peak)
    with pytest.raises(InvalidInput, match="criterion 'peak' can't be made at its defaults: power is 'four'"):
        lobo_fx.passes.PruneChannels(importance="peak")


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ("{taylor: {squared: true}}", Taylor(squared=True)),
        ("{taylor_squared: {squared: false}}", Taylor()),
        ("{fisher: }", Fisher()),
        ("{consensus: {criteria: [l1, {taylor: {squared: true}}]}}", Consensus(["l1", {"taylor": {"squared": True}}])),
    ],
)
def test_a_criterion_takes_settings_in_a_recipe(importance: str, expected: Criterion) -> None:
    (pass_,) = read_recipe(f"passes:\n- prune_channels: {{importance: {importance}}}", "recipe.yaml")
    assert isinstance(pass_, lobo_fx.passes.PruneChannels)
    assert criteria.resolve(pass_.importance) == expected
    assert pass_.needs == expected.needs


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        ("{taylor: {sqared: true}}", "'taylor' can't be made with these settings: Taylor has no setting 'sqared'; did"),
        ("{taylor: {squared: 3}}", "'taylor' can't be made with these settings: squared is 3; it must be True or"),
        ("{talor: {}}", "importance is 'talor'; did you mean taylor"),
        ("{5: {}}", "importance is 5; known: "),
        ("{consensus: {criteria: [l1, none]}}", "with these settings: importance is 'none'; known: "),
        ("{consensus: {}}", "'consensus' can't be made at its defaults: "),
        ("{taylor: true}", "importance is {'taylor': True}; expected a criterion, its name, {name: {setting: value}}"),
        ("{taylor: {}, fisher: {}}", "importance is {'taylor': {}, 'fisher': {}}; expected a criterion"),
    ],
)
def test_settings_that_a_criterion_refuses_are_named(importance: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"PruneChannels: .*{re.escape(words)}"):
        read_pass(f"prune_channels:importance={importance}")


def test_a_criterion_that_is_registered_made_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Criterion):
        def scorer(self, inference: Any, context: Any) -> Any: ...

    made = Plain()
    monkeypatch.setitem(CRITERIA.added, "plain", made)
    assert criteria.resolve("plain") is criteria.resolve({"plain": None}) is made
    with pytest.raises(InvalidInput, match="'plain' can't be made with these settings: Plain has no setting 'power'"):
        criteria.resolve({"plain": {"power": 2}})


def test_settings_that_a_criterion_makes_itself_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Counting(Criterion):
        power: int = 1
        seen: int = dataclasses.field(default=0, init=False)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.power > 2:
                raise ValueError("it takes squares at most")

        def scorer(self, inference: Any, context: Any) -> Any: ...

    monkeypatch.setitem(CRITERIA.added, "counting", Counting())
    assert criteria.resolve({"counting": {"power": 2}}) == Counting(2)
    with pytest.raises(InvalidInput, match="Counting has no setting 'seen'"):
        criteria.resolve({"counting": {"seen": 3}})
    with pytest.raises(InvalidInput, match="'counting' can't be made with these settings: it takes squares at most"):
        criteria.resolve({"counting": {"power": 3}})


def test_all_criteria_are_legal_values() -> None:
    (importance,) = (s for s in settings_of(lobo_fx.passes.PruneChannels) if s.name == "importance")
    assert set(importance.values) | {"consensus"} == set(CRITERIA.own)


def test_fields_of_a_base_are_checked_where_it_is_written() -> None:
    @dataclasses.dataclass(frozen=True)
    class More(Every):
        more: int = 1

    with pytest.raises(InvalidInput, match="more is 'x'"):
        More(more="x")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="steps is 0"):
        More(steps=0)


def test_any_dataclass_can_be_checked() -> None:
    @dataclasses.dataclass
    class Exporter:
        level: int

    check_settings(Exporter(3))
    with pytest.raises(InvalidInput, match="level is 'high'; it must be a whole number"):
        check_settings(Exporter("high"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("within", "words"),
    [
        (Range(0, 1), "in [0, 1]"),
        (Range(above=0, below=1), "in (0, 1)"),
        (Range(above=0), "above 0"),
        (Range(most=2), "of at most 2"),
    ],
)
def test_ranges_in_words(within: Range, words: str) -> None:
    assert str(within) == words
    assert (0 in within, 1.5 in within) == {"in [0, 1]": (True, False), "in (0, 1)": (False, False)}.get(
        words, (words != "above 0", True)
    )


@pytest.mark.parametrize("name", PASSES)
def test_defaults_of_our_own_passes_fit_their_types(name: str) -> None:
    check_settings(PASSES.get(name)())


@pytest.mark.parametrize("text", ["mixed_precision:decibels=20", "fit_goal:latency=0.5"])
def test_a_quantizer_is_given_by_its_settings_in_recipes(text: str) -> None:
    pass_: Any = read_pass(text + ",quantizer={kernels: all, observer: mse}")
    assert pass_.quantizer == lobo_fx.passes.QuantizeStatic(kernels="all", observer="mse")
    with pytest.raises(InvalidInput, match="QuantizeStatic has no setting 'kernel'; did you mean kernels"):
        read_pass(text + ",quantizer={kernel: all}")
