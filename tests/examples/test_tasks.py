"""The tasks: data that is the same every time, fonts that don't mix, training that learns and can be interrupted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tasks.training
import torch
from matplotlib import get_data_path
from sklearn.datasets import load_digits
from tasks import Recipe, Split, Task, accuracy
from tasks.digits import TASK as DIGITS
from tasks.glyphs import TASK as GLYPHS
from tasks.glyphs.data import CHARACTERS, TEST_FONTS, TRAIN_FONTS, draw, draw_split, load
from tasks.training import build, train
from torch import nn


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small layers gain nothing from threads, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    return DIGITS.load(Path())


# --- data ------------------------------------------------------------------------------------------------


def test_glyphs_are_drawn_the_same_and_then_read_from_the_cache(tmp_path: Path) -> None:
    first = load(tmp_path / "a", 72, 36)
    again = load(tmp_path / "b", 72, 36)
    cached = load(tmp_path / "a", 72, 36)
    for one, *others in zip(first, again, cached, strict=True):
        for other in others:
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_another_seed_draws_other_glyphs(tmp_path: Path) -> None:
    one, other = (load(tmp_path, 36, 36, seed)[0] for seed in (0, 1))
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(one.images, other.images)


def test_glyphs_are_images_with_labels(tmp_path: Path) -> None:
    train_split, test_split = load(tmp_path, 72, 36)
    assert train_split.images.shape == (72, 1, 28, 28)
    assert test_split.images.shape == (36, 1, 28, 28)
    assert train_split.images.dtype == torch.float32
    assert 0 <= float(train_split.images.min()) <= float(train_split.images.max()) <= 1
    assert torch.bincount(train_split.labels).tolist() == [2] * len(CHARACTERS)


def test_classes_and_fonts_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []

    def note(character: str, font: str, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        drawn.append((character, font))
        return np.zeros((28, 28), np.uint8)

    monkeypatch.setattr("tasks.glyphs.data.draw", note)
    labels = draw_split("train", TRAIN_FONTS, 1000, 0)["train.labels"].tolist()
    assert [CHARACTERS[label] for label in labels] == [character for character, _ in drawn]
    for counts in (Counter(labels), Counter(drawn)):
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(Counter(drawn)) == len(CHARACTERS) * len(TRAIN_FONTS)


def test_no_font_is_in_both_splits_and_each_exists() -> None:
    assert not set(TRAIN_FONTS) & set(TEST_FONTS)
    assert len(set(TRAIN_FONTS)) == len(TRAIN_FONTS)
    folder = Path(get_data_path()) / "fonts" / "ttf"
    files = [(folder / f"{font}.ttf").read_bytes() for font in TRAIN_FONTS + TEST_FONTS]
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("font", TRAIN_FONTS + TEST_FONTS)
def test_every_font_draws_every_character_differently(font: str) -> None:
    images = {draw(character, font, np.random.default_rng(0)).tobytes() for character in CHARACTERS}
    assert len(images) == len(CHARACTERS)


def test_a_drawing_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.glyphs.data.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, 36, 36)
    assert list(tmp_path.iterdir()) == []


def test_digits_are_scikit_learns() -> None:
    images, labels = load_digits(return_X_y=True)
    train_split, test_split = DIGITS.load(Path())
    both = torch.cat([train_split.images, test_split.images]).flatten(1) * 16
    assert {row.tobytes() for row in both.numpy().astype(np.float64)} == {row.tobytes() for row in images}
    assert len(both) == len(labels)
    share = torch.bincount(test_split.labels) / torch.bincount(torch.cat([train_split.labels, test_split.labels]))
    assert share.numpy() == pytest.approx(0.25, abs=0.01)


# --- training --------------------------------------------------------------------------------------------


def test_an_epoch_beats_chance(digits: tuple[Split, Split], tmp_path: Path) -> None:
    recipe = Recipe(tiny, epochs=1, rate=1e-2)
    before = accuracy(build(recipe), digits[1])
    module = train(recipe, *digits, tmp_path / "weights.safetensors")
    assert before < 0.25
    assert accuracy(module, digits[1]) > 0.5


def test_interrupted_training_goes_on_to_the_same_weights(
    digits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(tiny, epochs=3, rate=1e-2)
    whole = train(recipe, *digits, tmp_path / "whole.safetensors")
    epoch = tasks.training._epoch

    def interrupted(recipe: Recipe, number: int, *rest: object) -> float:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(recipe, number, *rest)  # type: ignore[arg-type]

    path = tmp_path / "parts.safetensors"
    monkeypatch.setattr(tasks.training, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, *digits, path)
    assert not path.exists()
    left: list[int] = []

    def noted(recipe: Recipe, number: int, *rest: object) -> float:
        left.append(number)
        return epoch(recipe, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks.training, "_epoch", noted)
    parts = train(recipe, *digits, path)
    assert left == [2]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


def test_a_trained_model_comes_from_the_cache(
    digits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task("test", lambda cache: digits, {"tiny": Recipe(tiny, epochs=1)})
    first = task.trained("tiny", tmp_path)
    monkeypatch.setattr(tasks.training, "train", lambda *given: pytest.fail("trained twice"))
    second = task.trained("tiny", tmp_path)
    assert not second.training
    assert torch.equal(first(digits[1].images), second(digits[1].images))
    facts = tasks.training.facts(task.file("tiny", tmp_path))
    assert float(facts["accuracy"]) == pytest.approx(accuracy(second, digits[1]), abs=1e-4)


def test_the_cached_name_changes_with_the_settings() -> None:
    recipe = Recipe(tiny, epochs=1)
    changed = [
        recipe,
        dataclasses.replace(recipe, epochs=2),
        dataclasses.replace(recipe, build=GLYPHS.models["SmallViT"].build),
    ]
    names = {Task("test", DIGITS.load, {"tiny": one}).file("tiny", Path()) for one in changed}
    assert len(names) == 3
    assert Task("test", DIGITS.load, {"tiny": recipe}).file("tiny", Path()) in names


@pytest.mark.parametrize(("task", "model"), [(task, model) for task in (DIGITS, GLYPHS) for model in task.models])
def test_every_model_gives_a_score_for_each_class(task: Task, model: str) -> None:
    side, classes = (8, 10) if task is DIGITS else (28, 36)
    module = build(task.models[model])
    assert module(torch.rand(3, 1, side, side)).shape == (3, classes)
    state = torch.get_rng_state()
    again = build(task.models[model])
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
