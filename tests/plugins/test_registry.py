"""Plug-ins by name: entry points and what is registered at run time, aliases, duplicates, near names."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pytest

from lobo_fx.axes.plugged import AXIS_RULES
from lobo_fx.errors import InvalidInput, LoboError
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.exporters.onnx.translations import TRANSLATIONS
from lobo_fx.own_operators.formats import FORMATS
from lobo_fx.passes import FoldBatchNorm, FoldWeights, PruneChannels, PruneWeights, QuantizeStatic, QuantizeWeights
from lobo_fx.passes.pruning.criteria import CRITERIA
from lobo_fx.passes.quantization.integers.observer_names import OBSERVERS
from lobo_fx.plugins import registry
from lobo_fx.plugins.registry import EXPORTERS, PASSES, RUNTIMES, Registry


def with_entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> Registry[Any]:
    """A registry that sees these entry points and no others."""
    found = [EntryPoint(name, value, "some.group") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])
    return Registry("thing", "some.group")


# --- what is installed -----------------------------------------------------------------------------------


def test_installed_plugins_and_their_aliases() -> None:
    names = PASSES.names()
    assert names["fold_batch_norm"] == ["fold_bn"]
    assert names["prune_weights"] == ["prune_unstructured"]
    assert names["quantize_static"] == []
    assert "onnx" in EXPORTERS.names()
    assert "onnxruntime" in RUNTIMES.names()


def test_a_plugin_by_name_and_by_alias() -> None:
    assert PASSES.get("fold_batch_norm") is FoldBatchNorm
    assert PASSES.get("fold_bn") is FoldBatchNorm
    assert PASSES.get("prune_unstructured") is PASSES.get("prune_weights") is PruneWeights
    assert PASSES.get("quantize_static") is QuantizeStatic
    assert EXPORTERS.get("onnx") is OnnxExporter


def test_hyphens_are_underscores() -> None:
    assert PASSES.get("quantize-static") is QuantizeStatic


def test_every_pass_is_registered_under_its_own_name() -> None:
    for name in PASSES.names():
        assert PASSES.get(name)().name == name


def test_every_plugin_that_is_offered_loads() -> None:
    for known in (PASSES, EXPORTERS, RUNTIMES):
        assert known.names()
        for name, aliases in known.names().items():
            assert all(known.get(alias) is known.get(name) for alias in aliases)


# --- near names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("quantise_static", "quantize_static"),
        ("quantize", "quantize_static"),
        ("QuantizeStatic", "quantize_static"),
        ("prune_weight", "prune_weights"),
        ("fold-batchnorm", "fold_batch_norm"),
        ("prunechannels", "prune_channels"),
        ("foldbn", "fold_bn"),
        ("Prune Weights", "prune_weights"),
    ],
)
def test_the_nearest_name_is_suggested_first(wrong: str, right: str) -> None:
    with pytest.raises(InvalidInput, match=f"no pass is called '{wrong}'; did you mean {right}"):
        PASSES.get(wrong)


def test_where_nothing_is_near_all_are_listed() -> None:
    with pytest.raises(InvalidInput) as caught:
        PASSES.get("xyzzy", ["a_recipe"])
    listed = f"known: {', '.join(sorted(PASSES.names()))};"  # no alias, no recipe
    assert str(caught.value).startswith(f"no pass is called 'xyzzy'; {listed}")
    assert "an entry point in the group 'lobo_fx.passes', and must be installed again" in str(caught.value)


def test_what_is_missing_is_called_what_it_is() -> None:
    with pytest.raises(InvalidInput, match="no exporter is called 'onxx'; did you mean onnx"):
        EXPORTERS.get("onxx")
    with pytest.raises(LoboError, match="no runtime is called"):
        RUNTIMES.get("openvino")


def test_only_names_about_as_near_as_the_nearest_are_suggested() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean quantize_static\?$"):
        PASSES.get("quantise_static")
    with pytest.raises(InvalidInput, match=r"did you mean prune_weights or prune_channels or iterative_prune\?$"):
        PASSES.get("prune")
    with pytest.raises(InvalidInput, match=r"did you mean prune_it_all\?$"):
        PASSES.get("pruneitall", ["prune_it_all"])


def test_defaults_are_names_that_are_known() -> None:
    for known in (EXPORTERS, RUNTIMES):
        assert known.default in known.names()


def test_exporters_say_how_their_files_end() -> None:
    assert EXPORTERS.get(EXPORTERS.default)().suffix == ".onnx"


# --- entry points ----------------------------------------------------------------------------------------


def test_entry_points_with_one_value_are_one_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(
        monkeypatch, ("join", "os.path:join"), ("split", "os.path:split"), ("glue", "os.path:join")
    )
    assert things.names() == {"join": ["glue"], "split": []}
    assert things.get("glue") is importlib.import_module("os.path").join


def test_a_name_that_two_packages_offer_is_refused_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(
        monkeypatch, ("join", "os.path:join"), ("join", "posixpath:split"), ("dirname", "os.path:dirname")
    )
    with pytest.raises(InvalidInput, match=r"called 'join': os\.path:join and posixpath:split; uninstall one"):
        things.get("join")
    assert things.get("dirname") is importlib.import_module("os.path").dirname
    assert things.names() == {"join": [], "dirname": []}
    found, (failure,) = things.loadable()
    assert list(found) == ["dirname"]
    assert "two packages" in failure


def test_a_clash_takes_an_alias_from_no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(
        monkeypatch, ("join", "os.path:join"), ("glue", "os.path:join"), ("join", "posixpath:split")
    )
    assert things.names() == {"join": [], "glue": []}
    assert things.get("glue") is importlib.import_module("os.path").join


@pytest.mark.parametrize("value", ["no_such_module:Thing", "os.path:Thing"])
def test_a_plugin_that_can_not_be_imported_is_an_error_of_ours(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(monkeypatch, ("mine", value))
    with pytest.raises(InvalidInput, match=rf"the thing 'mine' \({value}\) can't be imported"):
        things.get("mine")


def test_one_package_seen_twice_is_no_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(monkeypatch, ("join", "os.path:join"), ("join", "os.path:join"))
    assert things.names() == {"join": []}


# --- at run time -----------------------------------------------------------------------------------------


def test_a_plugin_registered_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(monkeypatch, ("join", "os.path:join"))
    plugin = object()
    things.register("mine", plugin)
    assert things.get("mine") is plugin
    assert things.names() == {"join": [], "mine": []}
    with pytest.raises(InvalidInput, match="did you mean mine"):
        things.get("mimi")


@pytest.mark.parametrize("taken", ["join", "mine"])
def test_a_taken_name_is_refused(taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(monkeypatch, ("join", "os.path:join"))
    things.register("mine", 1)
    with pytest.raises(InvalidInput, match=f"a thing called '{taken}' is registered already"):
        things.register(taken, 2)
    assert things.get("mine") == 1


def test_registries_do_not_share_what_is_added() -> None:
    first, second = Registry[int]("a", "none.a"), Registry[int]("b", "none.b")
    first.register("x", 1)
    assert second.names() == {}


def test_what_was_registered_can_be_taken_away_again() -> None:
    registry = Registry[object]("pass", "lobo_fx.passes")
    registry.register("mine", object)
    registry.unregister("mine")
    assert "mine" not in registry.names()
    with pytest.raises(InvalidInput, match="no pass called 'mine' was registered"):
        registry.unregister("mine")


# --- other packages beside what comes with lobo-fx -----------------------------------------------------------


class _Package:
    name, version = "lobo-fx-other", "1.2"


def of_a_package(point: EntryPoint) -> EntryPoint:
    """An entry point that knows which package it is of."""
    return point._for(_Package())  # type: ignore[attr-defined, no-any-return]


def test_a_collision_names_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        of_a_package(EntryPoint("join", "os.path:join", "some.group")),
        EntryPoint("join", "posixpath:split", "some.group"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    things = Registry[object]("thing", "some.group")
    with pytest.raises(InvalidInput, match=r"os\.path:join of lobo-fx-other 1\.2 and posixpath:split; uninstall one"):
        things.get("join")


def test_a_package_can_not_replace_what_comes_with_lobo_fx(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [of_a_package(EntryPoint("own", "os.path:join", "some.group"))]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    things = Registry[object]("thing", "some.group", own={"own": 1, "other": 2})
    taken = r"'own' is taken by lobo-fx: os\.path:join of lobo-fx-other 1\.2 must rename its thing"
    with pytest.raises(InvalidInput, match=f"^the name {taken}$"):
        things.get("own")
    with pytest.raises(InvalidInput, match=f"^setting is 'own': the name {taken}$"):
        things.check("own", "setting")
    assert things.ours("own") == 1
    assert things.get("other") == 2
    assert list(things) == ["own", "other"]


def with_another(monkeypatch: pytest.MonkeyPatch, known: Registry[Any], name: str, value: str) -> None:
    """A package that offers something in a registry of lobo-fx, beside all that is installed."""
    point = of_a_package(EntryPoint(name, value, known.group))
    points = [*entry_points(group=known.group), point]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    monkeypatch.setitem(vars(known), "_points", dataclasses.replace(known)._points)


def test_a_package_that_offers_a_pass_of_lobo_fx_disables_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with_another(monkeypatch, PASSES, "fold_weights", "os.path:join")
    with pytest.raises(InvalidInput, match=r"'fold_weights' is taken by lobo-fx: os\.path:join of lobo-fx-other 1\.2"):
        PASSES.get("fold-weights")
    assert PASSES.get("fold_bn") is FoldBatchNorm
    assert PASSES.ours("fold_weights") is FoldWeights
    assert "fold_weights" in PASSES.names()


def test_a_package_that_offers_a_criterion_of_lobo_fx_disables_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with_another(monkeypatch, CRITERIA, "l1", "os.path:join")
    assert PruneChannels(importance="l2").importance == "l2"
    with pytest.raises(InvalidInput, match=r"importance is 'l1': the name 'l1' is taken by lobo-fx: .*lobo-fx-other"):
        PruneChannels(importance="l1")
    with pytest.raises(InvalidInput, match=r"importance is 'taylr'; did you mean taylor"):
        PruneChannels(importance="taylr")


def test_observers_and_number_formats_of_lobo_fx_are_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with_another(monkeypatch, OBSERVERS, "mse", "os.path:join")
    with pytest.raises(InvalidInput, match=r"observer is 'mse': the name 'mse' is taken"):
        QuantizeStatic(observer="mse")
    with pytest.raises(InvalidInput, match=r"overrides\['a'\] is 'mse': the name 'mse' is taken"):
        QuantizeStatic(overrides={"a": "mse"})
    with_another(monkeypatch, FORMATS, "int4", "os.path:join")
    assert QuantizeWeights("int8").number.bits == 8
    with pytest.raises(InvalidInput, match=r"format is 'int4': the name 'int4' is taken"):
        QuantizeWeights("int4")


# --- of another kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "must_be"),
    [
        (PASSES, r"a class that derives from lobo_fx\.Pass"),
        (CRITERIA, "a Criterion, or its class"),
        (OBSERVERS, "a class of observers"),
        (FORMATS, r"a .*\.Format"),
        (EXPORTERS, r"a class as .*\.Exporter says"),
        (RUNTIMES, r"a class as .*\.Runtime says"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_an_entry_point_that_names_another_kind(
    known: Registry[Any], must_be: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_another(monkeypatch, known, "of_another_kind", "fractions:Fraction")
    with pytest.raises(InvalidInput) as caught:
        known.get("of_another_kind")
    named = rf"'of_another_kind' in the group '{known.group}' \(fractions:Fraction of lobo-fx-other 1\.2\)"
    assert re.fullmatch(rf"the entry point {named} names no {known.kind}: it must name {must_be}.*", str(caught.value))
    with pytest.raises(InvalidInput, match=f"'mine' is no {known.kind}: it must be {must_be}"):
        known.register("mine", 3)


@pytest.mark.parametrize("known", [AXIS_RULES, TRANSLATIONS], ids=lambda known: known.kind)
def test_a_module_or_a_table_that_is_none_is_reported(known: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with_another(monkeypatch, known, "any", "fractions:Fraction")
    assert [failure for failure in known.loadable()[1] if "lobo-fx-other 1.2) names no" in failure]


def test_one_that_can_not_be_imported_breaks_no_other(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lobo_fx_broken.py").write_text("raise RuntimeError('no such device')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    things = with_entry_points(monkeypatch, ("join", "os.path:join"), ("broken", "lobo_fx_broken:Thing"))
    found, failures = things.loadable()
    assert found == {"join": importlib.import_module("os.path").join}
    assert failures == ["the thing 'broken' (lobo_fx_broken:Thing) can't be imported: no such device"]


def test_nothing_is_imported_before_it_is_asked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lobo_fx_later.py").write_text("Thing = 3\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    things = with_entry_points(monkeypatch, ("later", "lobo_fx_later:Thing"))
    assert list(things) == ["later"]
    assert "lobo_fx_later" not in sys.modules
    assert things["later"] == 3


def test_names_that_go_unread_may_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    things = with_entry_points(monkeypatch, ("rules", "os.path:join"), ("rules", "os.path:split"))
    things.named = False
    assert set(things.loadable()[0]) == {"os.path:join", "os.path:split"}
