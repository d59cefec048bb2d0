"""What a file of a trained network gives."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from trained_report import Trial

from lobo_fx.passes.training.distill import Match

__all__ = ["Network", "package_folder"]


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network, and how compressed ones are judged.

    Attributes:
        trial: the module with its data; labels are what the score needs, and nothing learns from them.
        tell: figures of a module (or a file called as one) on the test split; `score` among them.
        score_name: what the score is.
        match: how `Distill` compares each output.
        training: settings of `Distill`.
        pruning: settings of `PruneChannels`, beside how much stays.
        ends: layers that give outputs, which Torch-Pruning must be told.
    """

    trial: Trial
    tell: Callable[[nn.Module], Mapping[str, Any]]
    score_name: str
    match: Match | Sequence[Match]
    training: Mapping[str, Any]
    ends: Callable[[nn.Module], Sequence[nn.Module]]
    pruning: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def package_folder(name: str) -> Path:
    """Where a package is installed; none of its code runs.

    Raises:
        ModuleNotFoundError: it is not.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed; benchmarks/trained_weights.py says how")
    return Path(spec.origin).parent
