"""The examples of README and of docstrings run, given what a reader is told to have: a model, images, a loader."""

from __future__ import annotations

import doctest
import importlib
import math
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import passes, testing
from lobo_fx.axes import any_of, axis_rule, call
from lobo_fx.contracts.candidates import Candidate
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.pipeline import Pipeline
from lobo_fx.graph import rewriting
from lobo_fx.graph.program import Program
from lobo_fx.passes.pruning.torch_pruning import TorchPruning
from lobo_fx.passes.training.learning_rate import Found, Trial

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    ROOT / "README.md",
    *sorted(path for folder in ("lobo_fx", "passes", "exporters") for path in (ROOT / folder).rglob("*.py")),
]
FENCED = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    f"{path.relative_to(ROOT)}:{index}": textwrap.dedent(block)
    for path in SOURCES
    for index, (_, block) in enumerate(FENCED.findall(path.read_text(encoding="utf-8")))
}
DOCTESTS = [path for path in SOURCES[1:] if ">>> " in path.read_text(encoding="utf-8")]


def a_model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(*layers).eval()


class MyPass(passes.FoldBatchNorm):
    """A pass that changes nothing here."""


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What examples take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(call, "RULES", dict(call.RULES))
    monkeypatch.setattr("lobo_fx.passes.goal.fit_goal.GoalSearch", _Found)
    monkeypatch.setattr("lobo_fx.passes.training.loop.best_rate", _one_trial)
    library = torch.library.Library("mylib", "DEF")  # type: ignore[no-untyped-call]
    library.define("scale(Tensor x, Tensor weight) -> Tensor")  # type: ignore[no-untyped-call]
    images = torch.randn(4, 3, 8, 8)
    program = lobo_fx.trace(a_model(), images)
    yield {
        "torch": torch,
        "lobo_fx": lobo_fx,
        "aten": torch.ops.aten,
        "model": a_model(),
        "other_checkpoint": a_model(),
        "images": images,
        "loader": [images],
        "accuracy": lambda module: 0.5,
        "program": program,
        "context": Context(program.signature, show_progress=False),
        "check_pass": testing.check_pass,
        "MyPass": MyPass,
        "Op": rewriting.Op,
        "rewrite": rewriting.rewrite,
        "axis_rule": axis_rule,
        "any_of": any_of,
        "Context": Context,
        "Pipeline": Pipeline,
        "unlabelled": [images],
        "labelled": [(images, torch.zeros(len(images), dtype=torch.long))],
        "cross_entropy": nn.functional.cross_entropy,
        **{name: getattr(passes, name) for name in passes.__all__},
        "TorchPruning": TorchPruning,
    }
    library._destroy()  # type: ignore[no-untyped-call]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES)
def test_the_example_runs(example: str, names: dict[str, Any]) -> None:
    if "other_checkpoint" in EXAMPLES[example]:
        names["lobo_fx"] = _WithInputs(names["images"])
    exec(compile(EXAMPLES[example], example, "exec"), names)


class _WithInputs:
    """`lobo_fx` for an example that leaves out the example inputs."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    Goal = lobo_fx.Goal

    def compile(self, model: nn.Module, chosen: Any = (), **given: Any) -> Any:
        return lobo_fx.compile(model, chosen, example_inputs=self.images, progress=False, **given)


def _one_trial(trial: Trial, steps: int) -> Found:
    """Instead of the search for a rate, which has tests of its own: one of its trials."""
    assert math.isfinite(trial(1e-3, 1))
    return Found(1e-3, "the only one tried")


class _Found:
    """A search that knows what it will find: what files of a network this small take is no matter of a goal."""

    def __init__(self, start: Program, context: Context, settings: Any) -> None:
        self.start, self.context, self.settings = start, context, settings

    def run(self) -> Program:
        pruning = passes.PruneChannels(0.5).plan_for(self.start.clone(), self.context)
        plan = passes.GoalPlan(pruning, None, "", {"decibels": 20.0})
        made = self.settings.applying(plan), self.context.made_by, self.start.clone()
        self.context.candidates.append(Candidate("float", *made, 0.5, 0.5, 1000, 20.0, None, True))
        return plan.apply(self.start, self.context)


@pytest.mark.parametrize("path", DOCTESTS, ids=lambda path: path.stem)
def test_the_doctest_passes(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts if parts[0] == "lobo_fx" else ("lobo_fx", *parts))
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted
    assert not found.failed
