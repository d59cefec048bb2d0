"""Fits every layer of a pruned network to the original layer's outputs, given the inputs that it gets by then.

The original and the pruned network run side by side, node by node, on calibration data. A layer moves towards the
fitted bias, then towards the fitted weight, each time as far as its error on held-out rows falls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.axes.kept import kept_indices
from lobo_fx.graph.layers import LAYERS, Layer, layer_of, layers, weight_uses
from lobo_fx.graph.operators import arguments, aten, is_call, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.graph.rewriting import free_name
from lobo_fx.graph.running import Runner
from lobo_fx.graph.tensors import fetch, register
from lobo_fx.measures.fidelity import decibels
from lobo_fx.passes.fitting.held_out import ROWS, Affine, HeldOut
from lobo_fx.passes.fitting.linear_problem import (
    Means,
    Moments,
    by_channel,
    count_rows,
    draw,
    input_rows,
    matrix_of,
    output_rows,
    put_matrix,
)
from lobo_fx.passes.fitting.side_by_side import Pair, Pairs, side_by_side
from lobo_fx.passes.pruning.attention_bases import Bases, Basis

__all__ = ["METHODS", "RIDGES", "Fit", "Fitted", "best_fit", "kept_outputs"]

METHODS = ("none", "recalibrate", "bias", "reconstruct")
"""What is fitted: nothing, statistics of batch norms, biases too, weights too."""
_ROWS_REMOVED = "rows of its input were removed"
_SMALL = 1e-3
"""A batch norm that scales a channel by less than this hides the layer before it."""
_MOST = 16.0
"""Largest factor by which a norm's variance changes: a channel that hardly varies on these rows may vary on others."""
_GROWS = 0.98
"""A fitted weight larger than the one that it replaces must have less than this times the error of the same fit when
scaled down to the old size."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges that keep a weight near its start, as shares of the mean variance of its inputs: the first suits many rows,
with the last the weight hardly moves."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What was done to a layer.

    Attributes:
        name: name of its module.
        bias: share of the way to the fitted bias (of a norm: to the statistics of its inputs).
        weight: share of the way to the fitted weight.
        gain: by how many decibels its error on held-out rows fell.
    """

    name: str
    bias: float
    weight: float
    gain: float


def kept_outputs(program: Program, original: Program) -> dict[str, torch.Tensor]:
    """For each layer, by its node's name, a boolean (outputs,) of the original's outputs that stay."""
    after, before = kept_indices(program.module), kept_indices(original.module)
    found = {}
    for layer in layers(program.graph):
        if layer.read is not None and not layer.kind.transposed and layer.kind.group_dim is None:
            name, dim = str(layer.read.target), layer.output_dim
            known = before.get(name, {}).get(dim, range(fetch(original.module, name).shape[dim]))
            stay = after.get(name, {}).get(dim, range(program.parameter(layer.read).shape[dim]))
            found[layer.node.name] = torch.isin(torch.tensor(known), torch.tensor(stay))
    return found


@dataclasses.dataclass(frozen=True)
class _Befores:
    """The original's values of every batch, one in memory at a time."""

    pairs: Pairs

    def __iter__(self) -> Iterator[Mapping[fx.Node, Any]]:
        for pair in self.pairs:
            yield pair.before


@dataclasses.dataclass
class Fit:
    """Fits the layers of a pruned network in place.

    A weight that several layers share (ALBERT's) is fitted again at each of them, to the sums of all those met so far:
    later layers then get activations near the original's, and the last fit counts all of the layers.

    Attributes:
        program: the pruned network; its graph has the original's nodes under the same names.
        original: the network before removal.
        pairs: calibration data, read one batch at a time; the least-squares problems hold sums only.
        method: one of `METHODS`.
        note: takes a remark about a layer that can't be fitted.
        fitted: the layers met so far.

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017: least squares from the
        pruned network's own inputs (2), and the last layer of a residual branch corrects the sum (3.2).
    """

    program: Program
    original: Program
    pairs: Pairs
    method: str
    note: Callable[[str, fx.Node], None]
    fitted: list[Fitted] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.kept = kept_outputs(self.program, self.original)
        self.twins = {node.name: node for node in self.original.graph.nodes}
        self.bases = Bases(self.original, self.kept)
        self.generator = torch.Generator().manual_seed(0)
        self.readers: dict[int, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            for use in weight_uses(node):
                self.readers.setdefault(id(self.program.parameter(use.read)), []).append(node)
        self.sums: dict[int, tuple[Means, HeldOut]] = {}

    def run(self, show_progress: bool) -> None:
        """Goes through both graphs; a layer is refitted when its inputs are final."""
        first, second = Runner(self.original.module), Runner(self.program.module)
        stops = self._has_parameters
        for node in side_by_side(first, second, self.pairs, stops, f"fit, {self.method}", show_progress):
            self._fit_node(node)
        self.program.graph.lint()
        self.program.module.recompile()

    def _has_parameters(self, node: fx.Node) -> bool:
        """Whether a node has parameters that the method fits."""
        if is_call(node, aten.batch_norm.default):
            return True
        return self.method != "recalibrate" and node.op == "call_function" and bool(weight_uses(node))

    def _fit_node(self, node: fx.Node) -> None:
        if is_call(node, aten.batch_norm.default):
            self._fit_norm(node)
        else:
            layer = layer_of(node)
            reason = "it is recurrent" if layer is None else self._why_fixed(layer) or self._why_not(layer)
            if layer is not None and reason is None:
                self._fit_layer(layer)
            elif reason is not None and self._is_cut(node):
                self.note(f"is not refitted: {reason}", node)

    def _readers(self, layer: Layer) -> list[fx.Node]:
        """The calls that multiply with a layer's weight."""
        return [] if layer.read is None else self.readers[id(self.program.parameter(layer.read))]

    def _is_cut(self, node: fx.Node) -> bool:
        """Whether positions were removed from a layer's weights."""
        after, before = kept_indices(self.program.module), kept_indices(self.original.module)
        names = [str(use.read.target) for use in weight_uses(node)]
        return any(after.get(name) != before.get(name) for name in names)

    def _why_fixed(self, layer: Layer) -> str | None:
        """The reason why a layer can't be refitted, whatever its inputs are; None if it can."""
        if layer.kind.transposed or layer.kind.group_dim is not None:
            return f"it is a {layer.kind.word}"
        if layer.read is None or layer.node.name not in self.kept:
            return "its weight is computed"
        if not self._is_shared_alike(layer):
            return "its weight has other readers"
        return None if self._may_set_bias(layer) else "its bias is computed, or has other readers"

    def _is_shared_alike(self, layer: Layer) -> bool:
        """Whether only layers of the same kind, with dimensions swapped alike, read a layer's weight."""
        assert layer.read is not None
        weight, readers = self.program.parameter(layer.read), self._readers(layer)
        others = [other for reader in readers if (other := layer_of(reader)) is not None]
        alike = [(other.kind, other.swapped) == (layer.kind, layer.swapped) for other in others]
        reads = [
            read for read in self.program.graph.find_nodes(op="get_attr") if self.program.parameter(read) is weight
        ]
        between = [user for read in reads for user in read.users if user not in readers]
        return len(alike) == len(readers) and all(alike) and all(set(user.users) <= set(readers) for user in between)

    def _why_not(self, layer: Layer) -> str | None:
        """The reason why a layer can't be refitted to the inputs that it has; None if it can."""
        if not layer.is_batched:
            return "its input has no batch"
        pair, twin = next(iter(self.pairs)), self.twins[layer.node.name]
        after, before = pair.after[layer.input], pair.before[twin]
        alike = self._has_same_space(layer.node) if layer.kind.convolves else after.shape[:-1] == before.shape[:-1]
        return None if alike else _ROWS_REMOVED

    def _has_same_space(self, node: fx.Node) -> bool:
        """Whether a convolution or batch norm reads as many places of each row as the original's does."""
        after = next(iter(self.pairs)).after[arguments(node)["input"]].shape[2:]
        before = arguments(self.twins[node.name])["input"].meta["val"].shape[2:]
        return all(b == a for b, a in zip(before, after, strict=True) if isinstance(b, int))

    def _may_set_bias(self, layer: Layer) -> bool:
        """Whether a fitted bias can be written, if one is fitted."""
        if layer.bias is None or _norm_after(layer.node) is not None:
            return True
        return layer.bias_read is not None and all(user in self._readers(layer) for user in layer.bias_read.users)

    def _fit_layer(self, layer: Layer) -> None:
        """Refits weight and bias, or the bias alone."""
        assert layer.read is not None
        parameter = self.program.parameter(layer.read)
        # All readers of a shared weight add to the same sums: each fit counts all readers met so far.
        sums = Moments() if self.method == "reconstruct" else Means()
        sums, held_out = self.sums.setdefault(id(parameter), (sums, HeldOut()))
        self._add_rows(layer, sums, held_out)
        weight = matrix_of(layer, parameter).double()
        start = shifted = Affine(weight, sums.bias(weight))
        share = 1.0
        if _norm_after(layer.node) is None:  # else the norm sets the mean
            bias = torch.zeros(len(weight) * weight.shape[1]) if layer.bias is None else self._bias(layer)
            start = Affine(weight, bias.double().view(len(weight), -1))
            shifted, share, _ = held_out.approach(start, shifted)
        chosen, moved = shifted, 0.0
        if isinstance(sums, Moments):
            chosen, moved = self._fit_weight(layer, weight, sums, held_out, shifted)
            put_matrix(layer, parameter, chosen.weight.to(parameter.dtype))
        if _norm_after(layer.node) is None:
            self._set_bias(layer, chosen.bias.flatten().to(parameter.dtype))
        self._record(layer.node, share, moved, held_out.error(start), held_out.error(chosen))
        if layer.node is self._readers(layer)[-1]:
            del self.sums[id(parameter)]

    def _fit_weight(
        self, layer: Layer, start: torch.Tensor, moments: Moments, held_out: HeldOut, current: Affine
    ) -> tuple[Affine, float]:
        """The layer to take in place of `current`, and its share of the way to the fitted weight."""
        return best_fit(start, moments, held_out, current)

    def _bias(self, layer: Layer) -> torch.Tensor:
        assert layer.bias is not None
        return self.program.parameter(layer.bias)

    def _add_rows(self, layer: Layer, sums: Means, held_out: HeldOut) -> None:
        """Adds rows of the layer's inputs and target outputs to the sums, or to the held-out rows."""
        assert layer.read is not None
        bases = self._bases(layer)
        window = self.program.parameter(layer.read).shape[2:]
        for pair in self.pairs:
            target = self._target(layer.node, pair)
            for basis in bases:
                basis.apply(pair.before[self.twins[layer.node.name]], target, self.kept[layer.node.name])
            shared = len(self._readers(layer)) * self.pairs.count(pair.held_out)
            chosen = draw(count_rows(layer, target), shared, self.generator, ROWS if pair.held_out else None)
            x = input_rows(layer, pair.after[layer.input], window, chosen)  # (groups, rows, columns)
            (held_out if pair.held_out else sums).add(x, output_rows(layer, target, chosen))

    def _record(self, node: fx.Node, bias: float, weight: float, before: float, after: float) -> None:
        gain = decibels(before, after) if before > 0 and after > 0 else 0.0
        self.fitted.append(Fitted(module_name(node) or node.name, bias, weight, gain))

    def _bases(self, layer: Layer) -> list[Basis]:
        """New coordinates for the outputs of a linear layer that attention reads; none for other layers."""
        if self.method != "reconstruct" or layer.kind.convolves or len(self._readers(layer)) > 1:
            return []
        return self.bases.of(self.twins[layer.node.name], _Befores(self.pairs))

    def _target(self, node: fx.Node, pair: Pair) -> torch.Tensor:
        """Target outputs of a layer or batch norm: the original's, plus what a residual sum after it lacks."""
        norm = _norm_after(node)
        whole = pair.before[self.twins[node.name]]
        if is_call(node, aten.batch_norm.default):
            chosen, dim = self._kept_channels(arguments(node)["running_mean"]), 1
        else:
            chosen, dim = self.kept[node.name].nonzero().flatten(), LAYERS[node.target].channel_dim
        target: torch.Tensor = whole.index_select(dim, chosen)
        other = _other_term(norm or node)
        twin = self.twins.get(other.name) if other in pair.after else None
        if twin is None or twin not in pair.before or pair.before[twin].shape != whole.shape:
            return target
        # A residual sum: what the other term lost by pruning is made up for here, where the branch ends.
        lacking: torch.Tensor = pair.before[twin].index_select(dim, chosen) - pair.after[other]
        return target + (lacking if norm is None else lacking / self._gain(norm).view(-1, *[1] * (whole.dim() - 2)))

    def _gain(self, norm: fx.Node) -> torch.Tensor:
        """The factor of each channel in a batch norm; infinity where it is nearly zero, as it is divided by."""
        given = arguments(norm)
        gain = (self.program.parameter(given["running_var"]) + given["eps"]).rsqrt()
        if given["weight"] is not None:
            gain = gain * self.program.parameter(given["weight"])
        return torch.where(gain.abs() < _SMALL, torch.inf, gain)

    def _set_bias(self, layer: Layer, bias: torch.Tensor) -> None:
        if layer.bias is not None:
            self._bias(layer).copy_(bias)
            return
        assert layer.read is not None
        prefix = str(layer.read.target).rpartition(".")[0]
        name = free_name(self.program, f"{prefix}.bias".lstrip("."))
        register(self.program.module, name, nn.Parameter(bias))
        for reader in self._readers(layer):
            with self.program.graph.inserting_before(reader):
                set_argument(reader, "bias", self.program.graph.get_attr(name))
            self.pairs.fix(arguments(reader)["bias"], self.program.module.get_parameter(name))

    def _fit_norm(self, node: fx.Node) -> None:
        """Gives a batch norm's outputs the original's mean and variance, then fits scale and shift."""
        given = arguments(node)
        if given["running_mean"] is None or len(given["running_mean"].users) > 1:
            return
        if not self._has_same_space(node):
            self.note(f"is not refitted: {_ROWS_REMOVED}", node)
            return
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (
            None if given[name] is None else self.program.parameter(given[name]) for name in names
        )
        assert mean is not None
        assert variance is not None
        twin = self.twins[node.name]
        stay = self._kept_channels(given["running_mean"])
        moments, held_out = Moments(), HeldOut()  # of the norm's inputs and targets, (channels, rows, 1)
        original = Moments()  # of the original's inputs
        parts = self.pairs.count(True)
        for pair in self.pairs:
            x, y = by_channel(pair.after[arguments(node)["input"]]), by_channel(self._target(node, pair))
            if pair.held_out:
                chosen = draw(x.shape[1], parts, self.generator, ROWS)
                held_out.add(x[:, chosen], y[:, chosen])
            else:
                moments.add(x, y)
                seen = by_channel(pair.before[arguments(twin)["input"]])[stay]
                original.add(seen, seen)
        if moments.count < 2:
            return
        eps = given["eps"]

        def affine() -> Affine:
            gain = (variance.double() + eps).rsqrt() * (1.0 if scale is None else scale.double())
            bias = (0.0 if shift is None else shift.double()) - gain * mean.double()
            return Affine(gain.view(-1, 1, 1), bias.view(-1, 1))

        start, before = affine(), (mean.clone(), variance.clone())
        # The outputs get the original's mean and variance: statistics that matched the data match it again; others
        # (frozen norms, another domain, fresh networks) differ from the data as much as they did before.
        now, then = (sums.covariance.flatten().clamp_min(0) for sums in (moments, original))
        ratio = ((now + eps) / (then + eps)).clamp(1 / _MOST, _MOST)
        adapted = (variance.double() + eps) * ratio
        offset = (original.mean_x.flatten() - mean.double()) * ratio.sqrt()
        variance.copy_((adapted - eps).clamp_min(0))
        mean.copy_(moments.mean_x.flatten() - offset)
        current, share = affine(), 1.0
        if not held_out.error(current) < held_out.error(start):  # NaN is no gain
            mean.copy_(before[0])
            variance.copy_(before[1])
            current, share = start, 0.0
        moved = 0.0
        if self.method != "recalibrate" and shift is not None:
            current, share, _ = held_out.approach(current, Affine(current.weight, moments.bias(current.weight)))
            if self.method == "reconstruct" and scale is not None:
                gain = current.weight * moments.gain(current.weight).unsqueeze(2)
                current, moved, _ = held_out.approach(current, Affine(gain, moments.bias(gain)))
                scale.copy_(current.weight.flatten() * (variance.double() + eps).sqrt())
            shift.copy_(current.bias.flatten() + current.weight.flatten() * mean.double())
        self._record(node, share, moved, held_out.error(start), held_out.error(current))

    def _kept_channels(self, read: fx.Node) -> torch.Tensor:
        """Which of the original's channels a norm still has."""
        name = str(read.target)
        after, before = (kept_indices(program.module).get(name, {}).get(0) for program in (self.program, self.original))
        known = torch.arange(len(fetch(self.original.module, name))) if before is None else torch.tensor(before)
        return torch.arange(len(known)) if after is None else torch.isin(known, torch.tensor(after)).nonzero().flatten()


def best_fit(start: torch.Tensor, moments: Moments, held_out: HeldOut, current: Affine) -> tuple[Affine, float]:
    """The best layer between `current` and its fits with growing ridges, and its share of the way.

    First each output is scaled, for which few rows suffice: outputs that became noise are damped.
    """
    scaled = start * moments.gain(start).unsqueeze(2)
    current, _, least = held_out.approach(current, Affine(scaled, moments.bias(scaled)))
    best, share = current, 0.0
    size = scaled.norm(dim=2, keepdim=True)
    for ridge in RIDGES:
        weight = moments.weight(scaled, ridge)
        small = weight * (size / weight.norm(dim=2, keepdim=True)).nan_to_num(1.0).clamp_max(1.0)
        free, bounded = (held_out.approach(current, Affine(made, moments.bias(made))) for made in (weight, small))
        # Larger weights amplify rows unlike all of these, so they must gain more than chance would give.
        found, way, error = free if free[2] < _GROWS * bounded[2] else bounded
        if error < least:
            best, share, least = found, way, error
        elif share:
            break
    return best, share


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
    """The other term of the sum that alone reads `node`; None if there is none."""
    users = list(node.users)
    if len(users) != 1 or not is_call(users[0], aten.add.Tensor) or arguments(users[0])["alpha"] != 1:
        return None
    return next((term for term in users[0].args if term is not node), None)
