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
from tasks.language import TASK as LANGUAGE
from tasks.language.models import Decoder
from tasks.language.score import bits_per_character
from tasks.language.text import VOCABULARY, decode, encode, modules
from tasks.receiver import channel as receiver
from tasks.receiver.score import bit_error_rates, exact_rates
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
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_another_seed_draws_other_glyphs(tmp_path: Path) -> None:
    one, other = (load(tmp_path, 36, 36, seed)[0] for seed in (0, 1))
    assert torch.equal(one.labels, other.labels)
    assert not torch.equal(one.inputs, other.inputs)


def test_glyphs_are_images_with_labels(tmp_path: Path) -> None:
    train_split, test_split = load(tmp_path, 72, 36)
    assert train_split.inputs.shape == (72, 1, 28, 28)
    assert test_split.inputs.shape == (36, 1, 28, 28)
    assert train_split.inputs.dtype == torch.float32
    assert 0 <= float(train_split.inputs.min()) <= float(train_split.inputs.max()) <= 1
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
    both = torch.cat([train_split.inputs, test_split.inputs]).flatten(1) * 16
    assert {row.tobytes() for row in both.numpy().astype(np.float64)} == {row.tobytes() for row in images}
    assert len(both) == len(labels)
    share = torch.bincount(test_split.labels) / torch.bincount(torch.cat([train_split.labels, test_split.labels]))
    assert share.numpy() == pytest.approx(0.25, abs=0.01)


# --- training --------------------------------------------------------------------------------------------


def task_of(recipe: Recipe, digits: tuple[Split, Split]) -> Task:
    return Task("test", lambda cache: digits, {"tiny": recipe})


def test_an_epoch_beats_chance(digits: tuple[Split, Split], tmp_path: Path) -> None:
    recipe = Recipe(tiny, epochs=1, rate=1e-2)
    before = accuracy(build(recipe), digits[1])
    module = train(task_of(recipe, digits), "tiny", *digits, tmp_path / "weights.safetensors")
    assert before < 0.25
    assert accuracy(module, digits[1]) > 0.5


def test_interrupted_training_goes_on_to_the_same_weights(digits: tuple[Split, Split], tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, labels)

    recipe = Recipe(tiny, epochs=2, rate=1e-2)
    task = dataclasses.replace(task_of(recipe, digits), loss=loss)
    interrupt_at = 0
    whole = train(task, "tiny", *digits, tmp_path / "whole.safetensors")
    steps = len(calls)
    calls.clear()
    interrupt_at = steps - 2
    path = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(task, "tiny", *digits, path)
    assert not path.exists()
    calls.clear()
    parts = train(task, "tiny", *digits, path)
    assert len(calls) == steps / 2  # the last epoch alone
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]


def test_a_trained_model_comes_from_the_cache(
    digits: tuple[Split, Split], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(Recipe(tiny, epochs=1), digits)
    first = task.trained("tiny", tmp_path)
    monkeypatch.setattr(tasks.training, "train", lambda *given: pytest.fail("trained twice"))
    second = task.trained("tiny", tmp_path)
    assert not second.training
    assert torch.equal(first(digits[1].inputs), second(digits[1].inputs))
    facts = tasks.training.facts(task.file("tiny", tmp_path))
    assert float(facts["score"]) == pytest.approx(accuracy(second, digits[1]), abs=1e-4)


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


# --- receiver --------------------------------------------------------------------------------------------


def test_slots_are_the_same_every_time_and_carry_what_the_channel_says() -> None:
    (train_split, test_split), (again, _) = (receiver.load(Path(), 40, 20) for _ in range(2))
    assert torch.equal(train_split.inputs, again.inputs)
    assert test_split.inputs.shape == (100, 5, 8, 8)
    assert test_split.labels.shape == (100, 4, 8, 8)
    inputs, _ = receiver.transmit(20_000, torch.full((20_000,), 10.0), torch.Generator().manual_seed(0))
    signal = torch.complex(inputs[:, 0], inputs[:, 1])
    assert float((signal.abs() ** 2).mean()) == pytest.approx(1.1, abs=0.02)  # power 1, and noise at -10 dB
    pilots = torch.complex(inputs[:, 2], inputs[:, 3])
    assert torch.equal(pilots != 0, receiver.is_pilot().expand(20_000, 8, 8))
    one, other = pilots[:, 1, 0], pilots[:, 1, 2]
    correlation = (one * other.conj()).mean().real
    assert float(correlation) == pytest.approx(receiver.CARRIER_CORRELATION**2, abs=0.02)


def test_neighbouring_symbols_differ_in_one_bit() -> None:
    symbols, bits = receiver.constellation()
    distance = (symbols[:, None] - symbols).abs()
    differ = (bits[:, None] != bits).sum(-1)
    near = distance < distance[distance > 0].min() * 1.01
    assert (differ[near & (distance > 0)] == 1).all()
    assert float((symbols.abs() ** 2).mean()) == pytest.approx(1)


@pytest.mark.parametrize("draws", [50_000, pytest.param(150_000, marks=pytest.mark.slow)])
def test_the_exact_demapper_agrees_with_brute_force(draws: int) -> None:
    """Coefficients drawn from the channel, weighted by how well they explain the pilots: the posterior, by sampling."""
    inputs, _ = receiver.transmit(1, torch.tensor([5.0]), torch.Generator().manual_seed(3))
    ratios = receiver.exact_bits(inputs)[0]
    generator = torch.Generator().manual_seed(0)
    noise, time, carrier = 10**-0.5, 2, 1
    root = torch.linalg.cholesky(receiver.covariance().double()).to(torch.complex128)
    normal = torch.complex(*torch.randn(2, draws, 64, generator=generator, dtype=torch.double)) / 2**0.5
    fading = normal @ root.T
    received = torch.complex(inputs[0, 0], inputs[0, 1]).flatten().to(torch.complex128)
    pilots = receiver.is_pilot().flatten()
    weight = (-(received[pilots] - fading[:, pilots]).abs().square().sum(1) / noise).softmax(0)
    place = 8 * time + carrier
    symbols, bits = receiver.constellation()
    distance = (received[place] - fading[:, place, None] * symbols).abs().square()
    likelihood = (weight[:, None] * (-distance / noise).exp()).sum(0)
    expected = [(likelihood[bits[:, b] == 1].sum() / likelihood[bits[:, b] == 0].sum()).log() for b in range(4)]
    assert ratios[:, time, carrier].tolist() == pytest.approx([float(value) for value in expected], abs=0.15)
    other = receiver.exact_bits(inputs.flip(-1))[0]
    assert (other[:, time, carrier] - torch.tensor(expected)).abs().max() > 0.15


def test_the_exact_demapper_makes_fewer_errors_the_better_the_channel() -> None:
    rates = list(exact_rates(receiver.load(Path(), 2, 50)[1]).values())
    assert len(rates) == len(receiver.TEST_SNRS)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 0.5


def test_bit_error_rates_count_wrong_bits_of_data_alone() -> None:
    _, split = receiver.load(Path(), 2, 10)
    right = iter(torch.split(split.labels, 500))
    assert set(bit_error_rates(lambda inputs: next(right) - 0.5, split).values()) == {0.0}
    flipped = split.labels.clone()
    flipped[..., ~receiver.is_pilot()] = 1 - flipped[..., ~receiver.is_pilot()]
    wrong = iter(torch.split(flipped, 500))
    assert set(bit_error_rates(lambda inputs: next(wrong) - 0.5, split).values()) == {1.0}


# --- language --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> tuple[Split, Split]:
    return LANGUAGE.load(Path())


def test_text_is_encoded_and_decoded() -> None:
    text = "def f(x):\n\treturn x  # ≤"
    codes = encode(text)
    assert decode(codes) == text.replace("≤", "?")
    assert int(codes.max()) < VOCABULARY


def test_labels_are_the_next_characters_and_no_module_is_in_both_splits(text: tuple[Split, Split]) -> None:
    train_split, test_split = text
    assert torch.equal(train_split.inputs[0, 1:], train_split.labels[0, :-1])
    assert int(train_split.labels[0, -1]) == int(train_split.inputs[1, 0])
    assert 0.01 < len(test_split) / len(train_split) < 0.2
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in modules()]
    assert decode(test_split.inputs[0]) == texts[0][:128]
    assert decode(train_split.inputs[0]) == texts[1][:128]


def test_the_decoder_sees_no_later_character() -> None:
    module = Decoder(16, heads=2, depth=2).eval()
    codes = torch.randint(VOCABULARY, (1, 12))
    changed = codes.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % VOCABULARY
    with torch.no_grad():
        one, other = module(codes), module(changed)
    assert torch.equal(one[:, :8], other[:, :8])
    assert not torch.allclose(one[:, 8:], other[:, 8:])


def test_a_model_that_knows_nothing_needs_all_bits(text: tuple[Split, Split]) -> None:
    class Nothing(nn.Module):
        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*codes.shape, VOCABULARY)

    assert bits_per_character(Nothing(), text[1], 16) == pytest.approx(np.log2(VOCABULARY))


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
