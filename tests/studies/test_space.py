"""Spaces: what is a choice, what each gives, and errors that point at the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lobo_fx.errors import InvalidInput
from lobo_fx.passes import FoldBatchNorm, PruneWeights, QuantizeDynamic, QuantizeStatic
from lobo_fx.recipe import read_recipe
from lobo_fx.studies.space import Alternatives, Choice, Decide, Interval, read_space

GOOD = """\
# a comment
passes:
  - fold_batch_norm
  - optional:
      prune_weights:
        amount: {from: 0.1, to: 0.6}
        scope: {choose: [layer, global]}
  - one_of:
      - quantize_static: {observer: {choose: [histogram, {choose: [mse, entropy]}]}}
      - [fold_bn, quantize_dynamic]
"""


def decide(**values: Any) -> Decide:
    """Decides by name, with _ for what a keyword can't hold; others take the first."""

    def decided(choice: Choice) -> Any:
        name = choice.name.replace(".", "_").replace(" ", "_")
        return values.get(name, choice.ends[0])

    return decided


# --- what reads ------------------------------------------------------------------------------------------


def test_choices_have_names_in_the_order_of_the_file() -> None:
    choices = list(read_space(GOOD).choices.values())
    assert {choice.name: getattr(choice, "labels", None) for choice in choices} == {
        "pass 2": ("nothing", "prune_weights"),
        "prune_weights.amount": None,
        "prune_weights.scope": ("layer", "global"),
        "pass 3": ("quantize_static", "fold_bn, quantize_dynamic"),
        "quantize_static.observer": ("histogram", "{choose: [mse, entropy]}"),
        "quantize_static.observer (2)": ("mse", "entropy"),
    }


def test_a_space_builds_the_passes_that_are_decided() -> None:
    space = read_space(GOOD)
    assert space.build(decide()) == [FoldBatchNorm(), QuantizeStatic(observer="histogram")]
    chosen = decide(pass_2=1, prune_weights_amount=0.25, prune_weights_scope=1, pass_3=1)
    expected = [FoldBatchNorm(), PruneWeights(0.25, scope="global"), FoldBatchNorm(), QuantizeDynamic()]
    assert space.build(chosen) == expected
    assert read_recipe(space.recipe(chosen), "written") == expected
    assert space.build(decide(quantize_static_observer=1))[1] == QuantizeStatic(observer="mse")


@pytest.mark.parametrize("value", [1e-05, 0.1, 0.30000000000000004, 3e20])
def test_numbers_are_written_as_they_are(value: float) -> None:
    space = read_space("passes:\n  - fine_tune: {learning_rate: {from: 1.0e-06, to: 1.0, log: true}}\n")
    (pass_,) = space.build(decide(fine_tune_learning_rate=value))
    (again,) = read_recipe(space.recipe(decide(fine_tune_learning_rate=value)), "written")
    assert again == pass_
    assert again.settings == {"learning_rate": value}


@pytest.mark.parametrize(
    ("text", "low", "high", "step", "log"),
    [
        ("{from: 61, to: 68}", 61, 68, 1, False),
        ("{from: 61, to: 68, step: 3}", 61, 67, 3, False),
        ("{from: 61, to: 68, log: true}", 61, 68, None, True),
        ("{from: 61, to: 68.0}", 61.0, 68.0, None, False),
        ("{from: 61, to: 62, step: 0.5}", 61.0, 62.0, 0.5, False),
    ],
)
def test_intervals(text: str, low: float, high: float, step: float | None, log: bool) -> None:
    space = read_space(f"passes:\n  - quantize_static:\n      percentile: {text}\n")
    (found,) = space.choices.values()
    assert isinstance(found, Interval)
    assert (found.low, found.high, found.step, found.log) == (low, high, step, log)
    assert found.is_whole is (type(low) is int)


def test_what_an_anchor_repeats_is_one_choice() -> None:
    text = "passes:\n  - prune_weights: &p {amount: {choose: [0.2, 0.4]}}\n  - prune_weights: *p\n"
    space = read_space(text)
    assert [choice.name for choice in space.choices.values()] == ["prune_weights.amount"]
    assert space.build(decide(prune_weights_amount=1)) == [PruneWeights(0.4)] * 2
    apart = read_space(text.replace("*p", "{amount: {choose: [0.2, 0.4]}}"))
    assert [choice.name for choice in apart.choices.values()] == ["prune_weights.amount", "prune_weights.amount (2)"]


def test_a_mapping_that_a_setting_takes_is_no_choice_and_may_hold_some() -> None:
    space = read_space("passes:\n  - prune_channels: {ratio: {layer1.*: {from: 0.1, to: 0.2}, layer2.*: 0.5}}\n")
    (choice,) = space.choices.values()
    assert choice.name == "prune_channels.ratio.layer1.*"


def test_variants_meet_every_alternative_without_their_product() -> None:
    several = ", ".join(f"0.{digit}" for digit in range(1, 10))
    text = "passes:\n" + f"  - prune_weights: {{amount: {{choose: [{several}]}}}}\n" * 6
    variants = list(read_space(text).variants())
    assert len(variants) == 1 + 6 * 8
    for place in range(6):
        assert {passes[place].settings.get("amount", 0.5) for passes in variants} == {n / 10 for n in range(1, 10)}


def test_equal_spaces_have_equal_texts() -> None:
    text = str(read_space(GOOD))
    assert str(read_space(GOOD.replace("# a comment", "# another"))) == text
    assert str(read_space(text)) == text
    assert str(read_space(GOOD.replace("0.6", "0.7"))) != text


def test_a_space_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(GOOD)
    assert str(read_space(tmp_path / "space.yaml")) == str(read_space(GOOD))
    with pytest.raises(InvalidInput, match="no space file"):
        read_space(tmp_path / "spice.yaml")


# --- errors point at the line ----------------------------------------------------------------------------

START = "passes:\n  - fold_bn\n  - prune_weights:\n      amount: 0.5\n"
BROKEN: dict[str, tuple[str, int, str]] = {
    "no choice": (START, 1, "the space has no choice"),
    "not YAML": ("passes: [\n", 2, "not YAML"),
    "no passes": ("things:\n  - fold_bn\n", 1, "a space has one key, 'passes'"),
    "an unknown pass": (START + "  - one_of: [fold_bn,\n      quantize_statik]\n", 6, "quantize_static"),
    "an unknown setting": (START + "      scop: {choose: [layer, global]}\n", 5, "did you mean scope"),
    "a bad alternative": (START + "      scope:\n        choose: [layer,\n          globe]\n", 5, "globe"),
    "a bad end": ("passes:\n  - prune_weights:\n      amount: {from: 0.5, to: 1.5}\n", 3, "1.5"),
    "a bad value in an alternative": (START + "  - one_of:\n    - fold_bn\n    - prune_weights: {amount: 7}\n", 7, "7"),
    "one alternative": (START + "      scope: {choose: [layer]}\n", 5, "two or more"),
    "no list": (START + "      scope: {choose: layer}\n", 5, "two or more"),
    "alternatives twice": (START + "      scope: {choose: [layer, layer]}\n", 5, "'layer' is given twice"),
    "choose with another key": (START + "      scope: {choose: [layer, global], log: true}\n", 5, "stands alone"),
    "an interval without an end": (START + "      pattern: {from: 1}\n", 5, "'to' of an interval is None"),
    "an interval of texts": (START + "      pattern: {from: a, to: b}\n", 5, "'from' of an interval is 'a'"),
    "an empty interval": (START + "      pattern: {from: 2, to: 1}\n", 5, "holds nothing to choose from"),
    "an endless interval": (START + "      pattern: {from: 2, to: .inf}\n", 5, "holds nothing to choose from"),
    "an unknown key": (START + "      pattern: {from: 1, to: 2, stp: 1}\n", 5, "did you mean step"),
    "log with a step": (START + "      pattern: {from: 1, to: 2, step: 1, log: true}\n", 5, "takes no step"),
    "log from zero": (START + "      pattern: {from: 0, to: 2, log: true}\n", 5, "above 0"),
    "a step too long": (START + "      pattern: {from: 0, to: 2, step: 3}\n", 5, "don't fit"),
    "checkpoints": (
        "passes:\n  - fine_tune: {checkpoint_dir: here, epochs: {choose: [1, 2]}}\n",
        1,
        "fine_tune has a checkpoint_dir",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_space_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    text, line, reason = BROKEN[case]
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInput) as caught:
        read_space(path)
    assert str(caught.value).startswith(f"{path}:{line}: "), caught.value
    assert reason in str(caught.value)


def test_spaces_nested_in_themselves_are_refused() -> None:
    with pytest.raises(InvalidInput, match="nested too deeply"):
        read_space("passes:\n  - prune_weights: &a {amount: *a, scope: {choose: [layer, global]}}\n")


def test_alternatives_are_told_apart_by_their_names_where_these_differ() -> None:
    text = "passes:\n  - one_of: [prune_weights: {amount: 0.2}, prune_weights: {amount: 0.3}]\n"
    (choice,) = read_space(text).choices.values()
    assert isinstance(choice, Alternatives)
    assert choice.labels == ("[{prune_weights: {amount: 0.2}}]", "[{prune_weights: {amount: 0.3}}]")
