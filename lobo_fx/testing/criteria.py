"""Test kit for criteria of structured pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lobo_fx.axes.inference import Inference
from lobo_fx.axes.members import members
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.context import Context
from lobo_fx.plugins.registry import PASSES
from lobo_fx.testing.networks import networks
from lobo_fx.testing.passes import assert_untouched, check_composed, check_pass

__all__ = ["check_criterion"]

_TOLERANCE = 1e-5
"""Largest difference of scores, as a share of the largest score."""


def check_criterion(criterion: Any, *, at_random: bool = False) -> None:
    """Scores and prunes linear layers, convolutions and a residual network.

    Asserts: every position has a finite score, which is reproducible and follows its channel when channels are
    permuted; a channel whose weights are all zero scores lower than any other; scoring does not change the model;
    pruning by it removes half, and the result exports, quantizes, saves and loads; a model without free axes stays as
    is.

    Args:
        criterion: as `PruneChannels(importance=...)` takes it.
        at_random: True for a criterion that ignores the weights: permuted and zero channels are not checked.
    """
    if not at_random:
        _check_places(criterion)
    for name, model, inputs in networks():
        _check_scores(criterion, model, inputs, name)
        data = _data(inputs)
        prune = PASSES.ours("prune_channels")(0.5, importance=criterion, round_to=1, compensation="none")
        result = check_pass(prune, model, inputs, **data)
        rows = result.report.rows
        assert rows[-1].parameters < rows[0].parameters, f"{name}: nothing was removed"
    check_composed(prune, model, inputs, **data)
    lone, rows_ = nn.Linear(6, 4).eval(), torch.randn(4, 6)
    prune = PASSES.ours("prune_channels")(0.5, importance=criterion, compensation="none")
    untouched = check_pass(prune, lone, rows_, **_data(rows_))
    assert untouched.module(rows_).shape == (4, 4), "inputs and outputs were cut"


def _data(inputs: torch.Tensor) -> dict[str, Any]:
    """Data for any criterion."""
    batches = [inputs, inputs.flip(0) * 0.5]
    return {
        "calibration_data": batches,
        "train_data": [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches],
        "loss_fn": lambda outputs, labels: outputs.square().mean(),
    }


def _scores(criterion: Any, model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """The scores of every free leaf."""
    from lobo_fx.passes.pruning.criteria import resolve

    program = trace(model, inputs)
    context = Context(program.signature, **_data(inputs), show_progress=False)
    inference = Inference(program).run()
    scorer = resolve(criterion).scorer(inference, context)
    found = {leaf: scorer(leaf, runs_through) for leaf, runs_through in members(inference).items()}
    for leaf, scores in found.items():
        assert isinstance(scores, torch.Tensor), f"scores are a {type(scores).__name__}; expected a tensor"
        assert scores.shape == (leaf.size,), f"scores of shape {list(scores.shape)} for {leaf.size} positions"
        assert bool(scores.isfinite().all()), "a score is not finite"
    return list(found.values())


def _check_scores(criterion: Any, model: nn.Module, inputs: torch.Tensor, name: str) -> None:
    with assert_untouched(model):
        first, again = (_scores(criterion, model, inputs) for _ in range(2))
    assert first, f"{name}: nothing is free"
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other), f"{name}: scores differ when asked for again"


def _check_places(criterion: Any) -> None:
    """Checks scores with one channel zeroed, then with channels permuted."""
    model, inputs = next((model, inputs) for _, model, inputs in networks())
    first, last = model[0], model[2]  # type: ignore[index]
    for weight in (first.weight.data[3], first.bias.data[3], last.weight.data[:, 3]):
        weight.zero_()
    (before,) = _scores(criterion, model, inputs)
    others = torch.cat([before[:3], before[4:]])
    assert before[3] < others.min(), "a channel of zeros is not scored lower than all others"
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for parameter, dim in ((first.weight, 0), (first.bias, 0), (last.weight, 1)):
        parameter.data = parameter.data.index_select(dim, order)
    (after,) = _scores(criterion, model, inputs)
    off = float((after - before[order]).abs().max() / before.abs().max().clamp_min(1e-30))
    assert off <= _TOLERANCE, f"scores don't follow channels that change places: off by {off:.1e}"
