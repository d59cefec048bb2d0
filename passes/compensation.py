"""What keeps accuracy after removal without training: statistics, biases and weights fitted to calibration data.

`fit` runs the original and the pruned network side by side, node by node, on all calibration batches. At every
convolution and linear layer the pruned one is refitted to give what the original gave, from the inputs that the
pruned network really has by then; batch norms get the statistics of what they now see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from lobo_fx.inputs import Inputs
from lobo_fx.masks import weight_node
from lobo_fx.operators import CONVOLUTIONS, arguments, aten, is_call, set_argument
from lobo_fx.program import Program, register
from lobo_fx.progress import track
from lobo_fx.rewriting import free_name

METHODS = ("none", "recalibrate", "bias", "reconstruct")
_RIDGE = 1e-3
_ROWS = 16_384
"""Most rows of a least-squares problem; more are thinned out evenly."""
_FITTED = CONVOLUTIONS | {aten.linear.default}


@dataclasses.dataclass
class _Layer:
    """A convolution or linear layer of the pruned network, and what the original gave there."""

    program: Program
    node: fx.Node
    kept: torch.Tensor
    method: str

    def fit(self, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Refits weight and bias, or the bias alone, so that the outputs come near `targets`."""
        given = arguments(self.node)
        weight = self.program.parameter(given["weight"])
        x = torch.cat([_columns(self.node, value) for value in inputs])
        y = torch.cat([_rows(self.node, value) for value in targets])[:, self.kept]
        step = -(-len(x) // _ROWS)
        x, y = x[::step].double(), y[::step].double()
        flat = weight.detach().reshape(len(weight), -1).double()
        if self.method == "reconstruct":
            flat = _least_squares(x, y, flat)
            weight.data = flat.to(weight.dtype).view_as(weight)
        self._set_bias((y - x @ flat.T).mean(0))

    def _set_bias(self, bias: torch.Tensor) -> None:
        """Stores the bias: in the layer, or in the mean of the batch norm that follows a layer without one."""
        given = arguments(self.node)
        weight = self.program.parameter(given["weight"])
        if given["bias"] is not None:
            self.program.parameter(given["bias"]).data = bias.to(weight.dtype)
            return
        users = list(self.node.users)
        if len(users) == 1 and is_call(users[0], aten.batch_norm.default):
            mean = arguments(users[0])["running_mean"]
            if mean is not None:
                self.program.parameter(mean).sub_(bias.to(weight.dtype))
                return
        prefix = str(given["weight"].target).rpartition(".")[0]
        name = free_name(self.program, f"{prefix}.bias".lstrip("."))
        register(self.program.module, name, nn.Parameter(bias.to(weight.dtype)))
        with self.program.graph.inserting_before(self.node):
            set_argument(self.node, "bias", self.program.graph.get_attr(name))


def _least_squares(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """argmin_W ‖(y − ȳ) − (x − x̄)·Wᵀ‖² + λ·‖W − start‖², by the normal equations."""
    x, y = x - x.mean(0), y - y.mean(0)
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    fitted: torch.Tensor = torch.linalg.solve(gram + ridge, x.T @ y + ridge @ start.T)
    return fitted.T


def _columns(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The input as rows that are multiplied with the flattened weight."""
    if node.target is aten.linear.default:
        return value.reshape(-1, value.shape[-1])
    given = arguments(node)
    kernel = node.meta["kernel"]
    rank = len(kernel)
    padding = [size for pad in reversed(_each(given["padding"], rank)) for size in (pad, pad)]
    patches = nn.functional.pad(value, padding)
    strides, dilations = _each(given["stride"], rank), _each(given["dilation"], rank)
    for dim in range(rank):
        span = dilations[dim] * (kernel[dim] - 1) + 1
        patches = patches.unfold(2 + dim, span, strides[dim])[..., :: dilations[dim]]
    order = [0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)]
    return patches.permute(order).flatten(1 + rank).flatten(0, rank)


def _rows(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The output with its channels last, as rows."""
    if node.target is not aten.linear.default:
        value = value.movedim(1, -1)
    return value.reshape(-1, value.shape[-1])


def _each(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def fit(
    program: Program,
    original: Program,
    kept: dict[str, torch.Tensor],
    batches: Sequence[Inputs],
    method: str,
    show_progress: bool = True,
) -> None:
    """Refits the pruned network to the original's activations, in place.

    Args:
        program: the pruned network; its graph has the original's nodes under the same names.
        original: the network before removal.
        kept: by name of a layer's node, which of its outputs stay (boolean).
        batches: calibration data; their activations are in memory together, layer by layer.
        method: `recalibrate` (batch norms only), `bias` (and biases), or `reconstruct` (and weights).
        show_progress: whether to draw a progress bar.

    Source: reconstruction: He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", 2017.
    """
    first, second = fx.Interpreter(original.module), fx.Interpreter(program.module)
    twins = {node.name: node for node in original.graph.nodes}
    nodes = list(program.graph.nodes)
    last_use = {source: node for node in nodes for source in node.all_input_nodes}
    values: list[tuple[dict[fx.Node, Any], dict[fx.Node, Any]]] = [({}, {}) for _ in batches]
    leaves = [batch.leaves for batch in batches]
    feeds = {node: index for index, node in enumerate(program.graph.find_nodes(op="placeholder"))}
    with torch.no_grad():
        for node in track(nodes, "fit", show_progress):
            if node.op == "output":
                break
            twin = twins.get(node.name)  # a size computed anew has none
            for (before, _), feed in zip(values, leaves, strict=True):
                if twin is not None:
                    before[twin] = feed[feeds[node]] if node in feeds else _run(first, twin, before)
            if node.target in _FITTED and node.name in kept and method != "recalibrate" and twin is not None:
                _refit(program, node, kept[node.name], values, twin, method)
            if is_call(node, aten.batch_norm.default):
                _recalibrate(program, node, [after[node.args[0]] for _, after in values])
            for (before, after), feed in zip(values, leaves, strict=True):
                after[node] = feed[feeds[node]] if node in feeds else _run(second, node, after)
                for source in node.all_input_nodes:
                    if last_use[source] is node:
                        del after[source]
                        if source.name in twins:
                            before.pop(twins[source.name], None)
    program.graph.lint()
    program.module.recompile()


def _run(interpreter: fx.Interpreter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: values[n])
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _refit(program: Program, node: fx.Node, kept: torch.Tensor, values: Any, twin: fx.Node, method: str) -> None:
    given = arguments(node)
    weight = weight_node(given["weight"])
    source = given["input"]
    if weight is None or len(weight.users) > 1 or given.get("groups", 1) != 1:
        return
    if isinstance(given.get("padding"), str) or values[0][1][source].dim() < 2:
        return
    node.meta["kernel"] = program.parameter(weight).shape[2:]
    layer = _Layer(program, node, kept, method)
    layer.fit([after[source] for _, after in values], [before[twin] for before, _ in values])
    for _, after in values:
        after[weight] = program.parameter(weight)
        bias = arguments(node)["bias"]
        if bias is not None:
            after[bias] = program.parameter(bias)


def _recalibrate(program: Program, node: fx.Node, inputs: Sequence[torch.Tensor]) -> None:
    """Sets a batch norm's running statistics to those of what it sees now."""
    given = arguments(node)
    if given["running_mean"] is None:
        return
    rows = torch.cat([value.movedim(1, -1).reshape(-1, value.shape[1]) for value in inputs])
    program.parameter(given["running_mean"]).copy_(rows.mean(0))
    program.parameter(given["running_var"]).copy_(rows.var(0))
