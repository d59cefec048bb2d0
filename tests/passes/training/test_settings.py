"""Settings of the training passes: recipes, names without addresses, and every wrong one refused before work."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lobo_fx import passes
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import build, read_pass, read_recipe

TRAINING = ["fine_tune", "distill", "iterative_prune", "sparse_training", "quantization_aware_training"]

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epochs": -1}, "epochs is -1"),
    ({"epochs": 1.5}, "epochs is 1.5"),
    ({"epochs": True}, "epochs is True"),
    ({"epochs": None}, "epochs is None"),
    ({"steps": 0}, "steps is 0"),
    ({"accumulate": 0}, "accumulate is 0"),
    ({"patience": 0}, "patience is 0"),
    ({"learning_rate": 0}, "learning_rate is 0"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
    ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"learning_rate": None}, "learning_rate is None"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"weight_decay": "much"}, "weight_decay is 'much'"),
    ({"warmup": 1.0}, "warmup is 1.0"),
    ({"warmup": "long"}, "warmup is 'long'"),
    ({"clip_norm": 0}, "clip_norm is 0"),
    ({"clip_norm": "short"}, "clip_norm is 'short'"),
    ({"mixed_precision": "fp32"}, "mixed_precision is 'fp32'"),
    ({"optimizer": "adamww"}, "did you mean adamw"),
    ({"optimizer": "Optimizer"}, "optimizer is 'Optimizer'"),
    ({"optimizer": "lbfgs"}, "calls the loss itself"),
    ({"optimizer": "SparseAdam"}, "needs sparse gradients"),
    ({"optimizer": 3}, "optimizer is a int"),
    ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)}, "optimizer is a SGD; give a name, or a"),
    ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, "optimizer gives lr of its own: say it as learning_"),
    ({"schedule": "cosin"}, "schedule is 'cosin'"),
    ({"schedule": 3}, "schedule is a int"),
    ({"frozen": "layer1"}, "frozen is 'layer1'"),
    ({"frozen": [1]}, r"frozen is \[1\]"),
    ({"frozen": 1}, "frozen is 1"),
    ({"checkpoint_dir": 3}, "checkpoint_dir is 3"),
    ({"lr": 1.0}, "has no setting 'lr'"),
]
OWN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "distill": [
        ({"teacher": "resnet"}, "teacher is a str"),
        ({"match": "logit"}, "match is 'logit'"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"label_share": 1.5}, "label_share is 1.5"),
        ({"feature_share": -1}, "feature_share is -1"),
        ({"attention_share": float("nan")}, "attention_share is nan"),
        ({"attention_share": float("inf")}, "attention_share is inf"),
        ({"features": "layer1"}, "features is 'layer1'"),
        ({"features": [3]}, "features is"),
        ({"features": {"layer1": 3}}, "features is"),
        ({"attention": 3}, "attention is 3"),
    ],
    "iterative_prune": [
        ({"cuts": 0}, "cuts is 0"),
        ({"cuts": 2.0}, "cuts is 2.0"),
        ({"path": "square"}, "path is 'square'"),
        ({"prune": {"prune_channels": {"steps": 4}}}, "has steps of its own: leave them out, cuts= says how many"),
        ({"prune": "fold_batch_norm"}, "can't go a part of its way"),
        ({"prune": "prune_chanels"}, "did you mean prune_channels"),
        ({"prune": {"prune_channels": {"rato": 1}}}, "did you mean ratio"),
        ({"prune": {"prune_channels": 3}}, "prune is"),
        ({"prune": {"prune_channels": {"ratio": 2}}}, "ratio"),
        ({"prune": 3}, "prune is 3"),
        ({"prune": {}}, "prune is {}"),
    ],
    "sparse_training": [
        ({"penalty": "l1"}, "penalty is 'l1'"),
        ({"strength": -1}, "strength is -1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"prune": "prune_weights"}, "only PruneChannels removes channels"),
    ],
    "quantization_aware_training": [
        ({"ranges": "fixed"}, "ranges is 'fixed'"),
        ({"settle_at": 1.1}, "settle_at is 1.1"),
        ({"settle_at": "late"}, "settle_at is 'late'"),
        ({"quantize": 3}, "quantize is a int"),
        ({"quantize": {"observr": "minmax"}}, "did you mean observer"),
    ],
}
STUDENT: list[tuple[dict[str, Any], str]] = [
    ({"width": 0}, "width is 0"),
    ({"width": 1.5}, "width is 1.5"),
    ({"width": True}, "width is True"),
    ({"width": float("nan")}, "width is nan"),
    ({"parameters": 0}, "parameters is 0"),
    ({"width": 0.5, "parameters": 0.5}, "give one"),
    ({"start": "random"}, "start is 'random'"),
    ({"importance": "l3"}, "l3"),
]
CASES = [
    *[(name, *case) for name in TRAINING for case in WRONG],
    *[(name, *case) for name, cases in OWN.items() for case in cases],
    *[("student", *case) for case in STUDENT],
]


@pytest.mark.parametrize(("name", "settings", "words"), CASES, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        build(PASSES.get(name), settings)


def test_recipes_nest_passes() -> None:
    found = read_recipe(
        """
passes:
  - student: {width: 0.25}
  - iterative_prune: {prune: {prune_channels: {ratio: 0.5}}, cuts: 2, path: linear}
  - iterative_prune: {prune: prune_weights}
  - sparse_training: {prune: {prune_channels: {ratio: 0.5}}, penalty: group_lasso, epochs: 1}
  - distill: {features: [layer1], attention: {a: b}, learning_rate: 0.001}
  - quantization_aware_training: {quantize: {kernels: all}, ranges: learned}
  - fine_tune: {frozen: [conv*], checkpoint_dir: here}
""",
        "mine.yaml",
    )
    cut = passes.PruneChannels(0.5)
    assert found == [
        passes.Student(width=0.25),
        passes.IterativePrune({"prune_channels": {"ratio": 0.5}}, cuts=2, path="linear"),
        passes.IterativePrune("prune_weights"),
        passes.SparseTraining({"prune_channels": {"ratio": 0.5}}, penalty="group_lasso", epochs=1),
        passes.Distill(features=["layer1"], attention={"a": "b"}, learning_rate=0.001),
        passes.QuantizationAwareTraining({"kernels": "all"}, ranges="learned"),
        passes.FineTune(frozen=["conv*"], checkpoint_dir="here"),
    ]
    assert found[1]._pruning == cut  # type: ignore[attr-defined]
    assert found[3]._pruning == cut  # type: ignore[attr-defined]
    assert found[5]._static == passes.QuantizeStatic(kernels="all")  # type: ignore[attr-defined]
    command = read_pass("iterative_prune:prune={prune_channels: {ratio: 0.5, round_to: 4}},cuts=3")
    assert command._pruning == passes.PruneChannels(0.5, round_to=4)  # type: ignore[attr-defined]


def test_a_recipe_names_the_line_of_a_nested_fault() -> None:
    text = "passes:\n  - fine_tune\n  - iterative_prune: {prune: {prune_channels: {ratio: 2}}}\n"
    with pytest.raises(InvalidInput, match=r"mine\.yaml:3: IterativePrune: PruneChannels: ratio"):
        read_recipe(text, "mine.yaml")


SHOWN: list[tuple[Pass, str]] = [
    (passes.FineTune(), "FineTune()"),
    (
        passes.FineTune(optimizer=functools.partial(torch.optim.SGD, momentum=0.9), checkpoint_dir=Path("a/b")),
        "FineTune(optimizer=SGD(momentum=0.9), checkpoint_dir='a/b')",
    ),
    (passes.Distill(teacher=nn.Linear(1, 1), epochs=5), "Distill(epochs=5, teacher=Linear)"),
    (
        passes.IterativePrune(passes.PruneChannels(0.5), cuts=2),
        "IterativePrune(prune=PruneChannels(ratio=0.5), cuts=2)",
    ),
    (
        passes.QuantizationAwareTraining(passes.QuantizeStatic(kernels="all")),
        "QuantizationAwareTraining(quantize=QuantizeStatic(kernels='all'))",
    ),
    (passes.Student(width=0.1), "Student(width=0.1)"),
]


@pytest.mark.parametrize(("made", "shown"), SHOWN, ids=lambda value: type(value).__name__)
def test_a_pass_is_shown_by_what_differs(made: Pass, shown: str) -> None:
    text = str(made)
    inside, outside = (sorted(re.findall(r"\w+=[^=]*?(?=, \w+=|\)$)", value)) for value in (text, shown))
    assert text.partition("(")[0] == shown.partition("(")[0]
    assert inside == outside


def test_no_name_holds_an_address() -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    class Criterion:
        def __call__(self, *arguments: Any) -> None:
            """An object with no words of its own."""

    made = [
        passes.FineTune(schedule=schedule),
        passes.FineTune(schedule=lambda optimizer: schedule(optimizer), optimizer=Criterion()),  # type: ignore[arg-type]
        passes.Distill(teacher=nn.Sequential(nn.Linear(2, 2))),
        passes.Student(importance=Criterion()),  # type: ignore[arg-type]
        passes.IterativePrune(passes.PruneChannels(0.5, importance=Criterion())),  # type: ignore[arg-type]
        passes.SparseTraining({"prune_channels": {"ratio": 0.5, "importance": Criterion()}}),
    ]
    for pass_ in made:
        assert " at 0x" not in str(pass_), str(pass_)
        assert str(pass_) == str(pass_)
