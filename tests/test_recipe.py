"""Recipes: what reads, what `passes=` takes, and errors that point at the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.passes import FoldBatchNorm, PruneChannels, PruneWeights, QuantizeStatic
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import build, builtin_recipes, read_pass, read_recipe, resolve

GOOD = """\
# a comment
passes:
  - fold_batch_norm
  - prune_weights: {amount: 0.25, scope: global}
  - quantize_static:
      observer: histogram
"""
CHOSEN = [FoldBatchNorm(), PruneWeights(0.25, scope="global"), QuantizeStatic(observer="histogram")]


# --- what reads ------------------------------------------------------------------------------------------


def test_a_recipe_gives_passes_with_their_settings() -> None:
    assert read_recipe(GOOD, "good.yaml") == CHOSEN


def test_json_is_yaml() -> None:
    text = '{"passes": ["fold_bn", {"prune-weights": {"pattern": "2:4"}}]}'
    assert read_recipe(text, "good.json") == [FoldBatchNorm(), PruneWeights(pattern="2:4")]


def test_powers_of_ten_are_numbers() -> None:
    (found,) = read_recipe("passes: [{prune_weights: {amount: 3e-1}}]", "good.yaml")
    assert found == PruneWeights(0.3)


def test_settings_may_be_shared_by_anchors() -> None:
    text = "passes:\n  - prune_weights: &half {amount: 0.4}\n  - prune_weights: *half\n"
    assert read_recipe(text, "anchors.yaml") == [PruneWeights(0.4)] * 2


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_read(name: str) -> None:
    chosen = resolve(name)
    assert chosen
    assert all(isinstance(entry, Pass) for entry in chosen)


def test_what_built_in_recipes_hold() -> None:
    assert builtin_recipes() == sorted(builtin_recipes())
    assert resolve("balanced") == [FoldBatchNorm(), QuantizeStatic(observer="histogram")]
    assert resolve("sparse") == [FoldBatchNorm(), PruneWeights(0.5), QuantizeStatic()]
    assert not set(builtin_recipes()) & set(PASSES.names()), "a recipe hides a pass"


# --- errors point at the line ----------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, int, str]] = {
    "an open bracket": ("passes: [a, b", 1, "not YAML: "),
    "a tab": ("passes:\n\t- fold_bn\n", 2, "not YAML: "),
    "a wrong indent": ("passes:\n  - fold_bn\n - fold_bn\n", 3, "not YAML: "),
    "two documents": ("passes: [fold_bn]\n---\nmore: 1\n", 2, "not YAML: "),
    "nothing": ("", 1, "a mapping with the key 'passes'"),
    "a list": ("- fold_bn\n", 1, "a mapping with the key 'passes'"),
    "an unknown key": ("# c\n\nother: 1\n", 3, "unknown key 'other'"),
    "a second key": ("passes: [fold_bn]\nextra: 1\n", 2, "unknown key 'extra'"),
    "no list": ("passes:\n  fold_bn: {}\n", 2, "'passes' must be a list"),
    "no value": ("passes:\n", 1, "'passes' must be a list"),
    "an empty list": ("passes: []\n", 1, "names no pass"),
    "an unknown pass": ("passes:\n  - fold_bn\n  - quantise_static\n", 3, "did you mean quantize_static"),
    "an unknown pass with settings": ("passes:\n  - quantise_static: {a: 1}\n", 2, "did you mean quantize_static"),
    "an unknown setting": (
        "passes:\n  - fold_bn\n  - prune_weights:\n      criterion: l1\n      amunt: 0.5\n",
        5,
        "PruneWeights has no setting 'amunt'; did you mean amount?",
    ),
    "a setting where there are none": ("passes:\n  - fold_bn: {x: 1}\n", 2, "FoldBatchNorm has no setting 'x'"),
    "a value out of range": (
        "passes:\n  - prune_weights:\n      criterion: l1\n      amount: 1.5\n",
        4,
        "amount is 1.5; it must be in [0, 1)",
    ),
    "a value of another type": (
        "passes:\n  - prune_weights:\n      criterion: l1\n      amount: half\n",
        4,
        "amount is 'half'",
    ),
    "a value that is no choice": (
        "passes:\n  - prune_weights:\n      amount: 0.2\n      criterion: l3\n",
        4,
        "must be one of l1, l2, random",
    ),
    "a base-60 number": (
        "passes:\n  - prune_weights:\n      amount: 0.2\n      pattern: 2:4\n",
        4,
        "quoted in YAML",
    ),
    "settings that are a value": ("passes:\n  - fold_bn\n  - prune_weights: 0.5\n", 3, "'name: value' pairs"),
    "settings left out": ("passes:\n  - fold_bn\n  - prune_weights:\n", 3, "'name: value' pairs"),
    "two passes in one entry": ("passes:\n  - fold_bn\n  - {a: 1, b: 2}\n", 3, "a pass is a name"),
    "a list for a pass": ("passes:\n  - [fold_bn]\n", 2, "a pass is a name"),
    "a recipe inside itself": ("passes: &again\n  - *again\n", 1, "a pass is a name"),
    "a Python object": (
        "passes:\n  - fold_bn\n  - prune_weights:\n      amount: !!python/name:os.system\n",
        4,
        "",
    ),
    "a setting whose name is no text": ("passes:\n  - prune_weights: {1: 2}\n", 2, "setting"),
    "a setting whose name is a list": ("passes:\n  - prune_weights: {[1]: 2}\n", 2, ""),
    "a setting given twice": (
        "passes:\n  - prune_weights:\n      amount: 0.5\n      amount: 0.7\n",
        4,
        "amount",
    ),
    "passes given twice": ("passes: [fold_bn]\npasses: [prune_weights]\n", 2, "'passes' is given twice"),
    "passes given three times": (3 * "passes: [fold_bn]\n", 2, "'passes' is given twice"),
    "another key before": ("models: [a]\npasses: [fold_bn]\n", 1, "unknown key 'models'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_points_at_its_line(name: str) -> None:
    text, line, complaint = BROKEN[name]
    with pytest.raises(InvalidInput) as error:
        read_recipe(text, "folder/broken.yaml")
    message = str(error.value)
    assert message.startswith(f"folder/broken.yaml:{line}: "), message
    assert complaint in message


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(BROKEN["an unknown pass"][0], encoding="utf-8")
    with pytest.raises(InvalidInput) as error:
        resolve(path)
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InvalidInput, match=r"binary\.yaml"):
        resolve(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    for name in ("nothing.yaml", "folder.yaml"):
        with pytest.raises(InvalidInput, match=f"no recipe file .*{name}"):
            resolve(tmp_path / name)


# --- what `passes=` takes --------------------------------------------------------------------------------


def test_passes_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD, encoding="utf-8")
    forms: list[Any] = [path, str(path), [path], list(CHOSEN), tuple(CHOSEN), iter(CHOSEN)]
    for form in forms:
        assert resolve(form) == CHOSEN
    assert resolve(QuantizeStatic()) == [QuantizeStatic()]
    assert resolve(QuantizeStatic) == [QuantizeStatic()]
    assert resolve("prune_weights") == [PruneWeights()]
    assert resolve(["fold_bn", "balanced", PruneWeights]) == [FoldBatchNorm(), *resolve("balanced"), PruneWeights()]
    assert resolve([]) == []


@pytest.mark.parametrize("passes", [3, 2.5, [3], [None], [[FoldBatchNorm()]], [int]])
def test_passes_of_another_type_are_refused(passes: Any) -> None:
    with pytest.raises(InvalidInput, match=r"passes (is|holds) a [A-Za-z]+; expected"):
        resolve(passes)


def test_a_misspelt_recipe_is_suggested() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean .*balanced"):
        resolve("balancd")


def test_building_a_pass_checks_its_settings() -> None:
    assert build(PruneWeights, {"amount": 0.1}) == PruneWeights(0.1)
    with pytest.raises(InvalidInput, match="did you mean criterion"):
        build(PruneWeights, {"criteria": "l1"})
    with pytest.raises(InvalidInput, match="amount is 2"):
        build(PruneWeights, {"amount": 2})


# --- a pass on the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("fold_bn", FoldBatchNorm()),
        ("fold_bn:", FoldBatchNorm()),
        ("prune_weights:amount=0.3,scope=global", PruneWeights(0.3, scope="global")),
        ("prune-weights: amount = 0.3 , criterion = 'l2' ", PruneWeights(0.3, criterion="l2")),
        ("prune_weights:amount=3e-1", PruneWeights(0.3)),
        ("prune_channels:ratio={a: 3E-1, b: 2.5e-1}", PruneChannels({"a": 0.3, "b": 0.25})),
        ("prune_channels:ratio=0.3,exclude=['1e-1']", PruneChannels(0.3, exclude=["1e-1"])),
        ("prune_weights:pattern=2:4", PruneWeights(pattern="2:4")),
        ("prune_weights:pattern='2:4'", PruneWeights(pattern="2:4")),
        ("prune_channels:ratio={layer1.*: 0.3, layer2.*: 0.5}", PruneChannels({"layer1.*": 0.3, "layer2.*": 0.5})),
        ("prune_channels:ratio={'a,b': 0.3},scope=axis", PruneChannels({"a,b": 0.3}, scope="axis")),
    ],
)
def test_a_pass_is_read_with_its_settings(text: str, chosen: Pass) -> None:
    read = read_pass(text)
    assert type(read) is type(chosen)
    assert read.settings == chosen.settings


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no pass is called ''"),
        ("prunechannels", "did you mean prune_channels?"),
        ("foldbn:x=1", "did you mean fold_bn?"),
        ("prune_weights:amount", "write settings as setting=value"),
        ("prune_weights:=0.5", "write settings as setting=value"),
        ("prune_weights:amount=[", "the value of 'amount' is not YAML"),
        ("prune_weights:amount={a: 1", "the value of 'amount' is not YAML"),
        ("prune_weights:criterion='l1", "the value of 'criterion' is not YAML"),
        ("prune_weights:amount=!!python/name:os.system", "the value of 'amount' is not YAML"),
        ("prune_weights:amount=2020-99-01", "the value of 'amount' is not YAML"),
        ("prune_weights:amount=0.5,amount=0.7", "'amount' is set twice"),
        ("prune_weights:amuont=0.5", "did you mean amount?"),
        ("prune_weights:amount=", "amount is None"),
        ("prune_weights:amount=[0.1, 0.2]", "amount is [0.1, 0.2]"),
    ],
)
def test_a_pass_that_can_not_be_read(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput) as error:
        read_pass(text)
    assert complaint in str(error.value)


@pytest.mark.parametrize("depth", [1000, pytest.param(3000, marks=pytest.mark.slow)])
def test_deep_nesting_is_refused(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    with pytest.raises(InvalidInput, match=r"deep\.yaml:1: nested too deeply"):
        read_recipe(f"passes: {deep}", "deep.yaml")
    with pytest.raises(InvalidInput, match="'observer' is not YAML"):
        read_pass(f"quantize_static:observer={deep}")
