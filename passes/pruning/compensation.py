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

from lobo_fx.axes.kept import kept_indices
from lobo_fx.contracts.context import Context
from lobo_fx.graph.layers import LAYERS, Layer, layer_of, layers, weight_uses
from lobo_fx.graph.operators import arguments, aten, is_call, set_argument
from lobo_fx.graph.program import Program
from lobo_fx.graph.rewriting import free_name
from lobo_fx.graph.running import Runner
from lobo_fx.graph.tensors import fetch, register
from lobo_fx.passes.fitting.linear_problem import (
    Moments,
    by_channel,
    count_rows,
    draw,
    input_rows,
    matrix_of,
    output_rows,
    put_matrix,
)
from lobo_fx.passes.fitting.side_by_side import Pair, side_by_side
from lobo_fx.passes.pruning.attention_bases import Bases, Basis

__all__ = ["METHODS", "fit", "kept_outputs"]

METHODS = ("none", "recalibrate", "bias", "reconstruct")
_SMALL = 1e-3
"""A batch norm that scales by less than this hides what is before it."""


def fit(program: Program, original: Program, context: Context, method: str) -> None:
    """Refits the pruned network to the original's activations, in place.

    A weight that several layers share (ALBERT's) is fitted anew at each of them, to the equations of all that were met
    so far: later layers then see activations near the original's, and the last fit weighs all of them.

    Args:
        program: the pruned network; its graph has the original's nodes under the same names.
        original: the network before removal.
        context: its calibration data; and for notes of layers that can't be refitted. What is still to be read of
            the data's activations is in memory at once, as in a forward pass on all of them; the least-squares
            problems hold sums only.
        method: `recalibrate` (batch norms only), `bias` (and biases), or `reconstruct` (and weights).

    Source: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017: least squares from the
        pruned network's own inputs (2), and the last layer of a residual branch corrects the sum (3.2).
    """
    pairs = [Pair(batch.leaves) for batch in context.calibration_batches()]
    with torch.no_grad():
        _Fit(program, original, kept_outputs(program, original), pairs, method, context.note).run(context.show_progress)
    program.graph.lint()
    program.module.recompile()


def kept_outputs(program: Program, original: Program) -> dict[str, torch.Tensor]:
    """By name of a layer's node, which of the original's outputs stay: boolean, (outputs,)."""
    after, before = kept_indices(program.module), kept_indices(original.module)
    found = {}
    for layer in layers(program.graph):
        if layer.read is not None and not layer.kind.mirrored and layer.kind.group_dim is None:
            name, dim = str(layer.read.target), layer.output_dim
            known = before.get(name, {}).get(dim, range(fetch(original.module, name).shape[dim]))
            stay = after.get(name, {}).get(dim, range(program.parameter(layer.read).shape[dim]))
            found[layer.node.name] = torch.isin(torch.tensor(known), torch.tensor(stay))
    return found


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
        self.readers: dict[int, list[fx.Node]] = {}
        for node in self.program.graph.nodes:
            for use in weight_uses(node):
                self.readers.setdefault(id(self.program.parameter(use.read)), []).append(node)
        self.moments: dict[int, Moments] = {}

    def run(self, show_progress: bool) -> None:
        """Goes through both graphs; a layer is refitted when its inputs are final."""
        first, second = Runner(self.original.module), Runner(self.program.module)
        for node in side_by_side(first, second, self.pairs, show_progress):
            self._fit_node(node)

    def _fit_node(self, node: fx.Node) -> None:
        if is_call(node, aten.batch_norm.default):
            self._fit_norm(node)
        elif self.method != "recalibrate" and node.op == "call_function" and weight_uses(node):
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
        """Whether something was removed from what a layer multiplies."""
        after, before = kept_indices(self.program.module), kept_indices(self.original.module)
        names = [str(use.read.target) for use in weight_uses(node)]
        return any(after.get(name) != before.get(name) for name in names)

    def _why_fixed(self, layer: Layer) -> str | None:
        """What keeps a layer from being refitted, whatever its inputs are."""
        if layer.kind.mirrored or layer.kind.group_dim is not None:
            return f"it is a {layer.kind.word}"
        if layer.read is None or layer.node.name not in self.kept:
            return "its weight is computed"
        return None if self._is_shared_alike(layer) else "its weight has other readers"

    def _is_shared_alike(self, layer: Layer) -> bool:
        """Whether all that reads a layer's weight are layers of its kind, directly or through swapped dimensions."""
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
        """What keeps a layer from being refitted to the inputs that it has."""
        after: torch.Tensor = self.pairs[0].after[layer.input]
        before: torch.Tensor = self.pairs[0].before[self.twins[layer.node.name]]
        if not layer.is_batched:
            return "its input has no batch"
        if layer.kind.convolves:
            return None
        return None if after.shape[:-1] == before.shape[:-1] else "rows of its input were removed"

    def _fit_layer(self, layer: Layer) -> None:
        """Refits weight and bias, or the bias alone."""
        assert layer.read is not None
        parameter, readers = self.program.parameter(layer.read), self._readers(layer)
        moments = self.moments.setdefault(id(parameter), Moments())
        # All readers of a shared weight add to the same sums: each fit answers to all of them that were met so far.
        bases = self._bases(layer)
        window = parameter.shape[2:]
        for pair in self.pairs:
            target = self._target(layer.node, pair)
            for basis in bases:
                basis.apply(pair.before[self.twins[layer.node.name]], target, self.kept[layer.node.name])
            chosen = draw(count_rows(layer, target), len(self.pairs) * len(readers), self.generator)
            x = input_rows(layer, pair.after[layer.input], window, chosen)  # (groups, rows, columns)
            moments.add(x, output_rows(layer, target, chosen))
        fitted = matrix_of(layer, parameter).double()
        if self.method == "reconstruct":
            fitted = moments.weight(fitted)
            put_matrix(layer, parameter, fitted.to(parameter.dtype))
        if _norm_after(layer.node) is None:
            self._set_bias(layer, moments.bias(fitted).flatten().to(parameter.dtype))

    def _bases(self, layer: Layer) -> list[Basis]:
        """Coordinates for the heads that read a linear layer."""
        if self.method != "reconstruct" or layer.kind.convolves or len(self._readers(layer)) > 1:
            return []
        return self.bases.of(self.twins[layer.node.name], [pair.before for pair in self.pairs])

    def _target(self, node: fx.Node, pair: Pair) -> torch.Tensor:
        """What a layer, or the batch norm after it, should give: what it gave, and what a sum after it lacks."""
        made_by = node.args[0] if is_call(node, aten.batch_norm.default) else node
        assert isinstance(made_by, fx.Node)
        norm = _norm_after(node)
        whole = pair.before[self.twins[node.name]]
        chosen, dim = self.kept[made_by.name].nonzero().flatten(), LAYERS[made_by.target].channel_dim
        target: torch.Tensor = whole.index_select(dim, chosen)
        other = _other_term(norm or node)
        twin = self.twins.get(other.name) if other in pair.after else None
        if twin not in pair.before or pair.before[twin].shape != whole.shape:
            return target
        # A residual sum: what the other term lost by pruning is made up for here, where the branch ends.
        lacking: torch.Tensor = pair.before[twin].index_select(dim, chosen) - pair.after[other]
        return target + (lacking if norm is None else lacking / self._gain(norm).view(-1, *[1] * (whole.dim() - 2)))

    def _gain(self, norm: fx.Node) -> torch.Tensor:
        """By what a batch norm multiplies each channel; infinity where that is next to nothing."""
        given = arguments(norm)
        gain = (self.program.parameter(given["running_var"]) + given["eps"]).rsqrt()
        if given["weight"] is not None:
            gain = gain * self.program.parameter(given["weight"])
        return torch.where(gain.abs() < _SMALL, torch.inf, gain)

    def _set_bias(self, layer: Layer, bias: torch.Tensor) -> None:
        if layer.bias is not None:
            read = layer.bias_read
            if read is not None and all(user in self._readers(layer) for user in read.users):
                self.program.parameter(read).copy_(bias)
            return
        assert layer.read is not None
        prefix = str(layer.read.target).rpartition(".")[0]
        name = free_name(self.program, f"{prefix}.bias".lstrip("."))
        register(self.program.module, name, nn.Parameter(bias))
        for reader in self._readers(layer):
            with self.program.graph.inserting_before(reader):
                set_argument(reader, "bias", self.program.graph.get_attr(name))
            for pair in self.pairs:
                pair.after[arguments(reader)["bias"]] = self.program.module.get_parameter(name)

    def _fit_norm(self, node: fx.Node) -> None:
        """Sets a batch norm's statistics to those of what it sees now; refits scale and shift to the original."""
        given = arguments(node)
        source = given["input"]
        if given["running_mean"] is None or len(given["running_mean"].users) > 1:
            return
        moments = Moments()
        aimed = _norm_after(source) is node and source.name in self.kept and self.method != "recalibrate"
        kind = LAYERS.get(source.target)
        plain = kind is not None and (kind.convolves or self.pairs[0].after[source].dim() == 2)
        aimed = aimed and plain and given["weight"] is not None
        for pair in self.pairs:
            x = by_channel(pair.after[source])
            moments.add(x, by_channel(self._target(node, pair)) if aimed else x)
        if moments.count < 2:
            return
        variance = moments.covariance.flatten()
        # running_var is the unbiased variance in training; so it is here.
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
