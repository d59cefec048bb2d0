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
        (["values", "logit"], "it must be one of logits, probabilities, values"),
        ([], "it must be one of"),
    ],
)
def test_a_match_that_does_not_fit_is_refused_before_any_work(match: list[Match], words: str) -> None:
    student, teacher, images = networks()
    with pytest.raises(lobo_fx.InvalidInput, match=words):
        loss_of(match, student, teacher, images)
