"""Each output is compared with the teacher's in a way of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import passes
from lobo_fx.passes.training.distill import Match


class Finder(nn.Module):
    """A box beside probabilities with their classes second, as P-Net gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.box, self.face = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.stem(images).relu()
        return self.box(hidden), (5 * self.face(hidden)).softmax(1)


def loss_of(match: object, student: nn.Module, teacher: nn.Module, images: torch.Tensor) -> float:
    """What the training lowers, from the note of two epochs that move next to nothing."""
    distil = passes.Distill(teacher, match, 1.0, epochs=2, learning_rate=1e-12, optimizer="sgd")  # type: ignore[arg-type]
    result = lobo_fx.compile(student, [distil], example_inputs=images, train_data=[images], progress=False)
    notes = [note.reason for note in result.report.notes if "loss " in note.reason]
    return float(notes[0].split("loss ")[1].split()[0].rstrip(";,"))


def networks() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Finder().eval(), Finder().eval(), torch.randn(4, 3, 5, 5)


def test_probabilities_and_values_are_compared_by_their_own_formulas() -> None:
    student, teacher, images = networks()
    with torch.no_grad():
        (box, face), (true_box, true_face) = student(images), teacher(images)
        divergence = float((true_face * (true_face / face).log()).sum(1).mean())
        error = float((box - true_box).square().mean() / true_box.square().mean())
    assert loss_of(["values", "probabilities"], student, teacher, images) == pytest.approx(divergence + error, rel=1e-3)
    # As logits over the last dimension, which is one of space here, they'd give something else.
    assert loss_of(["values", "logits"], student, teacher, images) != pytest.approx(divergence + error, rel=0.05)


@pytest.mark.parametrize(
    ("match", "words"),
    [
        (["values"], "match names 1 outputs; the model gives 2"),
        (["probabilities", "values"], "holds no probabilities"),
        (["values", "logit"], "it must be one of auto, logits, probabilities, binary_logits, binary_probabilities"),
        (["binary_probabilities", "probabilities"], "outside of 0 to 1, which are no probabilities"),
        ([], "it must be one of"),
    ],
)
def test_a_match_that_does_not_fit_is_refused_before_any_work(match: list[Match], words: str) -> None:
    student, teacher, images = networks()
    with pytest.raises(lobo_fx.InvalidInput, match=words):
        loss_of(match, student, teacher, images)


class Labels(nn.Module):
    """What an image shows, of labels that don't exclude each other; `end` is what their logits go through."""

    def __init__(self, end: nn.Module, labels: int = 5) -> None:
        super().__init__()
        self.head, self.end = nn.Linear(6, labels), end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(3 * self.head(x))  # type: ignore[no-any-return]


def two(end: nn.Module, labels: int = 5) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Labels(end, labels).eval(), Labels(end, labels).eval(), torch.randn(4, 6)


@pytest.mark.parametrize(("end", "match"), [(nn.Identity(), "logits"), (nn.Sigmoid(), "probabilities")])
def test_bits_are_compared_one_by_one(end: nn.Module, match: str) -> None:
    student, teacher, inputs = two(end)
    with torch.no_grad():
        mine, theirs = (
            (found(inputs) if match == "probabilities" else found(inputs).sigmoid()) for found in (student, teacher)
        )
        entropy = nn.functional.binary_cross_entropy(theirs, theirs)  # of the teacher, which no student can undercut
        expected = float(nn.functional.binary_cross_entropy(mine, theirs) - entropy)
    assert loss_of(f"binary_{match}", student, teacher, inputs) == pytest.approx(expected, rel=1e-3)
    assert loss_of("logits", student, teacher, inputs) != pytest.approx(expected, rel=0.05)


def test_a_temperature_softens_bits() -> None:
    student, teacher, inputs = two(nn.Identity())
    distil = passes.Distill(teacher, "binary_logits", 4.0, epochs=2, learning_rate=1e-12, optimizer="sgd")
    result = lobo_fx.compile(student, [distil], example_inputs=inputs, train_data=[inputs], progress=False)
    with torch.no_grad():
        mine, theirs = ((found(inputs) / 4).sigmoid() for found in (student, teacher))
        apart = theirs * (theirs / mine).log() + (1 - theirs) * ((1 - theirs) / (1 - mine)).log()
    (loss,) = {row[1] for sheet in result.report.sheets for row in sheet.rows[:1]}
    assert loss == pytest.approx(16 * float(apart.mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("end", "chosen", "why"),
    [
        (nn.Identity(), "logits", "one distribution over the last dimension, since nothing tells it from"),
        (nn.Sigmoid(), "binary_probabilities", "since it comes from a sigmoid"),
        (nn.Softmax(-1), "probabilities", "since the teacher's sum to 1 along dimension 1"),
    ],
)
def test_the_report_says_how_outputs_were_compared_and_why(end: nn.Module, chosen: str, why: str) -> None:
    student, teacher, inputs = two(end)

    def said(match: object) -> list[str]:
        distil = passes.Distill(teacher, match, steps=1, learning_rate=1e-3)  # type: ignore[arg-type]
        result = lobo_fx.compile(student, [distil], example_inputs=inputs, train_data=[inputs], progress=False)
        return [note.reason for note in result.report.notes if "is compared as" in note.reason]

    (note,) = said("auto")
    assert note.startswith(f"distill: output 0 is compared as {chosen}, {why}")
    assert not said(chosen)
    by_default, given, other = (loss_of(match, student, teacher, inputs) for match in ("auto", chosen, "values"))
    assert by_default == given != other


def test_a_distribution_over_one_class_is_refused() -> None:
    student, teacher, inputs = two(nn.Identity(), labels=1)
    for match in ("auto", "logits"):
        with pytest.raises(lobo_fx.InvalidInput, match="over one class says nothing: say match='binary_logits'"):
            loss_of(match, student, teacher, inputs)
    assert loss_of("binary_logits", student, teacher, inputs) > 0.01


@pytest.mark.parametrize("end", [nn.Flatten(0), nn.Sequential(nn.Sigmoid(), nn.Flatten(0))], ids=["any", "bits"])
def test_outputs_of_one_dimension_are_compared_number_by_number(end: nn.Module) -> None:
    student, teacher, inputs = two(end, labels=1)
    assert loss_of("auto", student, teacher, inputs) == loss_of("values", student, teacher, inputs)
    for match in ("logits", "probabilities"):
        with pytest.raises(lobo_fx.InvalidInput, match=r"one number a row.*'binary_probabilities' or 'values'"):
            loss_of(match, student, teacher, inputs)
