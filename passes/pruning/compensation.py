"""What keeps accuracy after removal without training: statistics, biases and weights fitted to calibration data.

`fit` runs the original and the pruned network side by side, node by node, on all calibration batches. At every
convolution and linear layer the pruned one is refitted to give what the original gave, from the inputs that the
pruned network really has by then; batch norms get the statistics of what they now see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.contracts.context import Context
from lobo_fx.graph.masks import weight_node
from lobo_fx.graph.operators import CONVOLUTIONS, arguments, aten, is_call, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.rewriting import free_name
from lobo_fx.graph.tensors import register
from lobo_fx.passes.fitting.linear_problem import Moments, by_channel, channels, draw, grouped, input_rows, output_rows
from lobo_fx.passes.fitting.side_by_side import Pair, side_by_side
from lobo_fx.passes.pruning.attention_bases import Bases, Basis

METHODS = ("none", "recalibrate", "bias", "reconstruct")
_FITTED = CONVOLUTIONS | {aten.linear.default}
_SMALL = 1e-3
"""A batch norm that scales by less than this hides what is before it."""


def fit(
    program: Program,
    original: Program,
    kept: Mapping[str, torch.Tensor],
    context: Context,
    method: str,
) -> None:
    """Refits the pruned network to the original's activations, in place.

    Args:
        program: the pruned network; its graph has the original's nodes under the same names.
        original: the network before removal.
        kept: by name of a layer's node, which of its outputs stay (boolean).
        context: its calibration data; and for notes of layers that can't be refitted. What is still to be read of
            the data's activations is in memory at once, as in a forward pass on all of them; the least-squares
            problems hold sums only.
        method: `recalibrate` (batch norms only), `bias` (and biases), or `reconstruct` (and weights).

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017: least squares from the
        pruned network's own inputs (2), and the last layer of a residual branch corrects the sum (3.2).
    """
    pairs = [Pair(batch.leaves) for batch in context.calibration_batches()]
    with torch.no_grad():
        _Fit(program, original, kept, pairs, method, context.note).run(context.show_progress)
    program.graph.lint()
    program.module.recompile()


@dataclasses.dataclass
class _Fit:
    program: Program
    original: Program
    kept: Mapping[str, torch.Tensor]
    pairs: list[Pair]
    method: str
    note: Callable[[str, fx.Node], None]

    def __post_init__(self) -> None:
        self.twins = {node.name: node for node in self.original.graph.nodes}
        self.bases = Bases(self.original, self.kept)
        self.generator = torch.Generator().manual_seed(0)

    def run(self, show_progress: bool) -> None:
        """Goes through both graphs; a layer is refitted when its inputs are final."""
        first, second = fx.Interpreter(self.original.module), fx.Interpreter(self.program.module)
        for node in side_by_side(first, second, self.pairs, show_progress):
            self._fit_node(node)

    def _fit_node(self, node: fx.Node) -> None:
        if is_call(node, aten.batch_norm.default):
            self._fit_norm(node)
        elif is_call(node, *_FITTED) and self.method != "recalibrate":
            if (reason := self._why_not(node)) is None:
                self._fit_layer(node)
            elif self._is_cut(node):
                self.note(f"is not refitted: {reason}", node)

    def _is_cut(self, node: fx.Node) -> bool:
        """Whether something was removed from a layer's input, or from what it gives."""
        source = arguments(node)["input"]
        sizes = zip(self.pairs[0].after[source].shape, self.twins[source.name].meta["val"].shape, strict=True)
        narrower = any(isinstance(before, int) and after != before for after, before in list(sizes)[1:])
        return narrower or not bool(self.kept.get(node.name, torch.ones(1)).all())

    def _why_not(self, node: fx.Node) -> str | None:
        """What keeps a layer from being refitted."""
        given = arguments(node)
        weight = weight_node(given["weight"])
        if weight is None or node.name not in self.kept:
            return "its weight is computed"
        if len(weight.users) > 1:
            return "its weight has other readers"
        after: torch.Tensor = self.pairs[0].after[given["input"]]
        before: torch.Tensor = self.pairs[0].before[self.twins[node.name]]
        if node.target is not aten.linear.default:
            return None if after.dim() == self.program.parameter(weight).dim() else "its input has no batch"
        if after.dim() == 1:
            return "its input has no batch"
        return None if after.shape[:-1] == before.shape[:-1] else "rows of its input were removed"

    def _fit_layer(self, node: fx.Node) -> None:
        """Refits weight and bias, or the bias alone."""
        given = arguments(node)
        source, weight = given["input"], weight_node(given["weight"])
        assert weight is not None
        parameter = self.program.parameter(weight)
        groups = given.get("groups", 1)
        moments = Moments()
        bases = self._bases(node)
        for pair in self.pairs:
            target = self._target(node, pair)
            for basis in bases:
                basis.apply(pair.before[self.twins[node.name]], target, self.kept[node.name])
            chosen = draw(target.numel() // target.shape[channels(node)], len(self.pairs), self.generator)
            x = input_rows(node, pair.after[source], parameter.shape[2:], chosen)
            moments.add(grouped(x, groups), grouped(output_rows(node, target)[chosen], groups))
        fitted = parameter.double().view(groups, len(parameter) // groups, -1)
        if self.method == "reconstruct":
            fitted = moments.weight(fitted)
            parameter.copy_(fitted.reshape(parameter.shape))
        if _norm_after(node) is None:
            self._set_bias(node, moments.bias(fitted).flatten().to(parameter.dtype))

    def _bases(self, node: fx.Node) -> list[Basis]:
        """Coordinates for the heads that read a linear layer."""
        if self.method != "reconstruct" or node.target is not aten.linear.default:
            return []
        return self.bases.of(self.twins[node.name], [pair.before for pair in self.pairs])

    def _target(self, node: fx.Node, pair: Pair) -> torch.Tensor:
        """What a layer, or the batch norm after it, should give: what it gave, and what a sum after it lacks."""
        layer = node.args[0] if is_call(node, aten.batch_norm.default) else node
        assert isinstance(layer, fx.Node)
        norm = _norm_after(node)
        whole = pair.before[self.twins[node.name]]
        chosen, dim = self.kept[layer.name].nonzero().flatten(), channels(layer)
        target: torch.Tensor = whole.index_select(dim, chosen)
        other = _other_term(norm or node)
        twin = self.twins.get(other.name) if other in pair.after else None
        if twin not in pair.before or pair.before[twin].shape != whole.shape:
            return target
        lacking: torch.Tensor = pair.before[twin].index_select(dim, chosen) - pair.after[other]
        return target + (lacking if norm is None else lacking / self._gain(norm).view(-1, *[1] * (whole.dim() - 2)))

    def _gain(self, norm: fx.Node) -> torch.Tensor:
        """By what a batch norm multiplies each channel; infinity where that is next to nothing."""
        given = arguments(norm)
        gain = (self.program.parameter(given["running_var"]) + given["eps"]).rsqrt()
        if given["weight"] is not None:
            gain = gain * self.program.parameter(given["weight"])
        return torch.where(gain.abs() < _SMALL, torch.inf, gain)

    def _set_bias(self, node: fx.Node, bias: torch.Tensor) -> None:
        given = arguments(node)
        if given["bias"] is not None:
            if weight_node(given["bias"]) is not None and len(given["bias"].users) == 1:
                self.program.parameter(given["bias"]).copy_(bias)
            return
        prefix = str(given["weight"].target).rpartition(".")[0]
        name = free_name(self.program, f"{prefix}.bias".lstrip("."))
        register(self.program.module, name, nn.Parameter(bias))
        with self.program.graph.inserting_before(node):
            set_argument(node, "bias", self.program.graph.get_attr(name))
        for pair in self.pairs:
            pair.after[arguments(node)["bias"]] = bias

    def _fit_norm(self, node: fx.Node) -> None:
        """Sets a batch norm's statistics to those of what it sees now; refits scale and shift to the original."""
        given = arguments(node)
        source = given["input"]
        if given["running_mean"] is None or len(given["running_mean"].users) > 1:
            return
        moments = Moments()
        aimed = _norm_after(source) is node and source.name in self.kept and self.method != "recalibrate"
        plain = source.target in CONVOLUTIONS or self.pairs[0].after[source].dim() == 2
        aimed = aimed and plain and given["weight"] is not None
        for pair in self.pairs:
            x = by_channel(pair.after[source])
            moments.add(x, by_channel(self._target(node, pair)) if aimed else x)
        if moments.count < 2:
            return
        variance = moments.covariance.flatten()
        self.program.parameter(given["running_mean"]).copy_(moments.mean_x.flatten())
        self.program.parameter(given["running_var"]).copy_(variance * moments.count / (moments.count - 1))
        if not aimed:
            return
        self.program.parameter(given["bias"]).copy_(moments.mean_y.flatten())
        if self.method == "reconstruct":
            slope = moments.cross.flatten() / variance.clamp_min(1e-12)
            self.program.parameter(given["weight"]).copy_(slope * (variance + given["eps"]).sqrt())


def _norm_after(node: fx.Node) -> fx.Node | None:
    """The batch norm with running statistics that alone reads `node`."""
    users = list(node.users)
    if (
        len(users) == 1
        and is_call(users[0], aten.batch_norm.default)
        and arguments(users[0])["running_mean"] is not None
    ):
        return users[0]
    return None


def _other_term(node: fx.Node) -> Any:
    """What `node` is added to, where it goes nowhere else."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or arguments(users[0])["alpha"] != 1:
        return None
    return next((term for term in users[0].args if term is not node), None)
