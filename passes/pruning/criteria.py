"""Importance criteria for structured pruning: how much a channel, head or group matters.

A criterion gathers what it needs once (gradients, activations) and returns a scorer: from a leaf and the
parameters it runs through to a score of each position. The lowest go first.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lobo_fx.axes import Axis, Inference
from lobo_fx.axes.members import Member
from lobo_fx.contracts.context import Context
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.layers import weight_uses
from lobo_fx.graph.operators import aten
from lobo_fx.passes.fitting.statistics import gradients, input_norms
from lobo_fx.passes.pruning.second_order import eliminations
from lobo_fx.plugins.registry import Registry
from lobo_fx.plugins.settings import check_names, check_settings, named_settings

__all__ = [
    "CRITERIA",
    "Activation",
    "BatchNormScale",
    "Consensus",
    "Criterion",
    "Elementwise",
    "Fisher",
    "GeometricMedian",
    "Importance",
    "Lamp",
    "Magnitude",
    "Random",
    "Scorer",
    "SecondOrder",
    "Taylor",
    "resolve",
]

Scorer = Callable[[Axis, Sequence[Member]], torch.Tensor]
"""Gives a score for each position of a leaf, from the leaf and the parameters that it runs through."""
Elementwise = Callable[[torch.Tensor], torch.Tensor]
"""Gives a score for each element of a parameter; a position's importance is the sum over its elements."""


class Criterion(abc.ABC):
    """How positions are scored. Subclass it as a frozen dataclass; its settings are checked as those of a pass are."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of `calibration_data`, `train_data`, `loss_fn` must be given."""
        return ()

    @abc.abstractmethod
    def scorer(self, inference: Inference, context: Context) -> Scorer:
        """Gathers what is needed and returns the function that scores a leaf, shape [leaf.size]."""


@dataclasses.dataclass(frozen=True)
class Magnitude(Criterion):
    """Sum of a score of each element: |w| (L1), w² (L2), or any other."""

    score: Elementwise

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        return lambda leaf, members: _total(leaf, [m.along(leaf, self.score(m.weight)) for m in members])


@dataclasses.dataclass(frozen=True)
class Random(Criterion):
    """No criterion at all, seeded: the floor that others must beat."""

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        generator = context.generator()
        return lambda leaf, members: torch.rand(leaf.size, generator=generator, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class BatchNormScale(Criterion):
    """|γ| of the batch norms that a leaf runs through; L2 where it meets none.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017.
    """

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        norms = inference.program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
        scales = {str(node.args[1].target) for node in norms if isinstance(node.args[1], fx.Node)}

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            scaled = [member for member in members if member.name in scales]
            function: Elementwise = torch.abs if scaled else torch.square
            return _total(leaf, [m.along(leaf, function(m.weight)) for m in scaled or members])

        return score


@dataclasses.dataclass(frozen=True)
class GeometricMedian(Criterion):
    """Sum of distances to the other filters: a filter in the middle is replaceable; L2 where there is no filter.

    Source: He et al., "Filter Pruning via Geometric Median", 2019.
    """

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        outputs = {
            str(use.read.target): use.output_dim for node in inference.program.graph.nodes for use in weight_uses(node)
        }

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            makers = [m for m in members if m.dim == outputs.get(m.name, 0) and m.tensor.dim() > 1]
            filters = [m.weight.movedim(m.dim, 0) for m in makers if m.axes[m.dim].find() is leaf]
            if not filters:
                return _total(leaf, [m.along(leaf, m.weight.square()) for m in members])
            rows = torch.cat([weight.flatten(1) for weight in filters], 1).double()
            return torch.cdist(rows, rows).sum(1)

        return score


@dataclasses.dataclass(frozen=True)
class Taylor(Criterion):
    """How much the loss would change, to first order: |Σ w·g| of a position, or its square.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019.

    Attributes:
        squared: (Σ w·g)² instead of |Σ w·g|.
    """

    squared: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that it is computed from."""
        return ("train_data", "loss_fn")

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        first, _ = gradients(inference, context)
        last: Elementwise = torch.square if self.squared else torch.abs

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            known = [(m, first[id(m.tensor)]) for m in members if id(m.tensor) in first]
            return _total(leaf, [last(m.along(leaf, m.weight * gradient)) for m, gradient in known])

        return score


@dataclasses.dataclass(frozen=True)
class Fisher(Criterion):
    """Σ w²·E[g²]: the diagonal of the empirical Fisher information as a stand-in for the Hessian's.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that it is computed from."""
        return ("train_data", "loss_fn")

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        _, second = gradients(inference, context)

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            known = [(m, second[id(m.tensor)]) for m in members if id(m.tensor) in second]
            return _total(leaf, [m.along(leaf, m.weight.square() * gradient) for m, gradient in known])

        return score


@dataclasses.dataclass(frozen=True)
class Activation(Criterion):
    """Σ |w|·‖x‖ over the weights that read a position; L2 where nothing reads it with weights.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), 2023.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that it is computed from."""
        return ("calibration_data",)

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        norms = input_norms(inference, context)

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            readers = [m for m in members if (m.name, m.dim) in norms]
            if not readers:
                return _total(leaf, [m.along(leaf, m.weight.square()) for m in members])
            weighted = [(m, m.weight.abs() * norms[m.name, m.dim].to(m.weight.dtype)) for m in readers]
            return _total(leaf, [m.along(leaf, score) for m, score in weighted])

        return score


@dataclasses.dataclass(frozen=True)
class SecondOrder(Criterion):
    """Error of a position's readers if it goes and their other inputs make up for it; L2 if no layer reads it.

    Source: see `lobo_fx.passes.pruning.second_order.eliminations`.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """The data that it is computed from."""
        return ("calibration_data",)

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        scores = {leaf: found.scores for leaf, found in eliminations(inference, context) if found is not None}

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            if leaf in scores:
                return scores[leaf]
            return _total(leaf, [m.along(leaf, m.weight.square()) for m in members])

        return score


@dataclasses.dataclass(frozen=True)
class Lamp(Criterion):
    """L2 divided by the sum of all scores that are at least as large, so that layers become comparable.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021.
    """

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            energy = _total(leaf, [m.along(leaf, m.weight.square()) for m in members])
            order = energy.argsort()
            remaining = energy[order].flip(0).cumsum(0).flip(0)
            return torch.empty_like(energy).index_copy_(0, order, energy[order] / remaining.clamp_min(1e-300))

        return score


@dataclasses.dataclass(frozen=True)
class Consensus(Criterion):
    """Several criteria vote by rank; the mean rank decides.

    Attributes:
        criteria: each as `importance=` takes it.
    """

    criteria: Sequence[Importance]

    def __post_init__(self) -> None:
        if not isinstance(self.criteria, (list, tuple)) or not self.criteria:
            raise InvalidInput(f"criteria is {self.criteria!r}; it must be a list of criteria, at least one")
        for criterion in self.criteria:
            resolve(criterion)

    @property
    def needs(self) -> tuple[str, ...]:
        """What any of the criteria needs."""
        return tuple(dict.fromkeys(need for criterion in self.criteria for need in resolve(criterion).needs))

    def scorer(self, inference: Inference, context: Context) -> Scorer:
        scorers = [resolve(criterion).scorer(inference, context) for criterion in self.criteria]

        def score(leaf: Axis, members: Sequence[Member]) -> torch.Tensor:
            ranks = [scorer(leaf, members).argsort().argsort().double() for scorer in scorers]
            return torch.stack(ranks).mean(0)

        return score


_OWN: dict[str, Criterion | type[Criterion]] = {
    "l1": Magnitude(torch.abs),
    "l2": Magnitude(torch.square),
    "random": Random(),
    "batch_norm": BatchNormScale(),
    "consensus": Consensus,
    "geometric_median": GeometricMedian(),
    "taylor": Taylor(),
    "taylor_squared": Taylor(squared=True),
    "fisher": Fisher(),
    "activation": Activation(),
    "lamp": Lamp(),
    "second_order": SecondOrder(),
}


def _is_criterion(plugin: object) -> bool:
    return isinstance(plugin, Criterion) or (isinstance(plugin, type) and issubclass(plugin, Criterion))


CRITERIA: Registry[Criterion | type[Criterion]] = Registry(
    "criterion", "lobo_fx.criteria", own=_OWN, must_be="a Criterion, or its class", fits=_is_criterion
)
"""Criteria by the names that `importance=` takes: each is a criterion, or the class of one."""

Importance = str | Criterion | Elementwise | Mapping[str, Mapping[str, Any] | None]
"""A criterion's name, itself, a function that scores each element of a parameter, or a name with settings, as recipes
have it: `{consensus: {criteria: [l1, taylor]}}`."""


def resolve(importance: Importance) -> Criterion:
    """The criterion that `importance=` means, in any of its forms.

    Raises:
        InvalidInput: an unknown name, one that names no criterion, or settings that it refuses.
    """
    if isinstance(importance, Criterion):
        return importance
    if isinstance(importance, str):
        return _named(importance, {})
    if named := named_settings(importance):
        return _named(*named)
    if not callable(importance):
        raise InvalidInput(
            f"importance is {importance!r}; expected a criterion, its name, {{name: {{setting: value}}}} or a function"
        )
    return Magnitude(importance)


def _named(name: str, settings: Mapping[str, Any]) -> Criterion:
    """The criterion of a name, with some of its settings given."""
    CRITERIA.check(name, "importance")
    named: Any = CRITERIA[name]
    is_made = isinstance(named, Criterion)
    if is_made and not settings:
        return named  # type: ignore[no-any-return]
    try:
        check_names(type(named) if is_made else named, settings)
        return dataclasses.replace(named, **settings) if is_made else named(**settings)  # type: ignore[no-any-return]
    except (InvalidInput, TypeError, ValueError) as error:
        made = "with these settings" if settings else "at its defaults"
        raise InvalidInput(f"the criterion '{name}' can't be made {made}: {error}") from error


def _total(leaf: Axis, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(parts, start=torch.zeros(leaf.size, dtype=torch.float64))
