"""Where integers run: cheapest by the table, against every assignment tried by hand; tables kept and read."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.errors import InvalidInput
from lobo_fx.exporters.onnxruntime import kernel_costs
from lobo_fx.exporters.onnxruntime.kernel_costs import measure_kernels
from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes import QuantizeStatic
from lobo_fx.passes.quantization.integers.kernels import ONNX_RUNTIME
from lobo_fx.passes.quantization.integers.minimum_cut import LEAST_GAIN, cheapest_regions
from lobo_fx.passes.quantization.integers.placement import Choices, Observing, Request
from lobo_fx.passes.quantization.integers.targets import TARGETS
from lobo_fx.plugins.kernels import Cost, Kernel, MeasuresKernels, NoCost
from lobo_fx.plugins.registry import RUNTIMES

REQUEST = Request(ONNX_RUNTIME, TARGETS["x86-vnni"], Observing("min_max"))

POOL: Any = (("kernel_size", (3, 3)), ("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (1, 1)))

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two branches, a sum, a float-only operator between, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.third, self.fourth = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x)
        x = self.second(x) + self.third(x)
        x = torch.sigmoid(self.fourth(x))
        return self.head(x.mean((2, 3)))


@functools.cache
def traced() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lobo_fx.trace(Net().eval(), IMAGES)


def program() -> Any:
    return traced().clone()


def choices(graph: torch.fx.Graph) -> dict[torch.fx.Node, Kernel]:
    """The operators that could run as integers, with the kernels that they ask for."""
    found = Choices.find(graph, REQUEST).kernels
    nodes = {node.name: node for node in graph.nodes}
    return {nodes[name]: kernel for name, kernel in found.items() if isinstance(kernel, Kernel)}


def total(graph: torch.fx.Graph, kernels: dict[Any, Kernel], integer: set[Any], table: Any) -> float:
    """What an assignment costs, counted tensor by tensor."""
    spent = 0.0
    for node, kernel in kernels.items():
        spent += table(kernel).integer * (1 + LEAST_GAIN) if node in integer else table(kernel).floating
    for node in graph.nodes:
        if node.op == "get_attr" or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        gives_integers = node in integer and node.target != torch.ops.aten.linear.default
        conversion = table(Kernel("convert", ((1, *node.meta["val"].shape[1:]),)))
        weights = [user for user in node.users if user.op != "output"]
        if gives_integers and any(user not in integer for user in node.users):
            spent += conversion.integer
        if not gives_integers and any(user in integer for user in weights):
            spent += conversion.floating
    return spent


@pytest.mark.parametrize("seed", range(12))
def test_the_regions_are_the_cheapest_of_all_assignments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    graph = program().graph
    kernels = choices(graph)
    assert len(kernels) == 7
    costs: dict[str, Cost] = {}

    def table(kernel: Kernel) -> Cost:
        if kernel.operator == "convert":
            size = 1
            for length in kernel.shapes[0]:
                size *= length
            return costs.setdefault(
                f"convert {size}", Cost(*(0.02 * size * torch.rand(2, generator=generator)).tolist())
            )
        return costs.setdefault(kernel.key, Cost(*(10 * torch.rand(2, generator=generator)).tolist()))

    priced = {node: table(kernel) for node, kernel in kernels.items()}
    found = cheapest_regions(graph, priced, ONNX_RUNTIME, table, {})
    every = [
        total(graph, kernels, set(chosen), table)
        for count in range(len(kernels) + 1)
        for chosen in itertools.combinations(kernels, count)
    ]
    assert found.microseconds == pytest.approx(min(every), rel=1e-9)
    chosen = {node for node in kernels if node.name in found.integer}
    assert total(graph, kernels, chosen, table) == pytest.approx(min(every), rel=1e-9)
    assert found.floating == pytest.approx(total(graph, kernels, set(), table), rel=1e-9)


class Stem(nn.Module):
    """A pool between a first layer and two that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = F.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        return self.second(x).tanh(), self.third(x).tanh()


@pytest.mark.parametrize("seed", range(12))
def test_a_pool_after_a_float_layer_is_paid_for_as_the_runtime_computes_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    graph = lobo_fx.trace(Stem().eval(), IMAGES).graph
    named = {node.name: node for node in graph.nodes}
    stem, relu, pool, second, third = (named[n] for n in ("conv2d", "relu", "max_pool2d", "conv2d_1", "conv2d_2"))
    costs: dict[str, Cost] = {}

    def table(kernel: Kernel) -> Cost:
        return costs.setdefault(kernel.key, Cost(*(10 * torch.rand(2, generator=generator)).tolist()))

    kernels = choices(graph)
    priced = {node: table(kernel) for node, kernel in kernels.items()}
    found = cheapest_regions(graph, priced, ONNX_RUNTIME, table, {})
    slower = table(Kernel("max_pool", ((1, 4, 8, 8),), POOL))

    def cost(integer: set[Any]) -> float:
        """Tensor by tensor, with the pool and the activation on one side or the other."""
        spent = sum(
            priced[n].integer * (1 + LEAST_GAIN) if n in integer else priced[n].floating for n in (stem, second, third)
        )
        if pool in integer and stem not in integer:
            spent += max(0.0, slower.integer - slower.floating)
        for node in (named["x"], stem, relu, pool, second, third):
            conversion = table(Kernel("convert", ((1, *node.meta["val"].shape[1:]),)))
            if node in integer and any(user not in integer for user in node.users):
                spent += conversion.integer
            if node not in integer and any(user in integer for user in node.users):
                spent += conversion.floating
        return spent

    subsets = [
        set(chosen) for count in range(6) for chosen in itertools.combinations((stem, relu, pool, second, third), count)
    ]
    allowed = [chosen for chosen in subsets if pool in chosen or not chosen & {second, third}]
    assert found.microseconds == pytest.approx(min(map(cost, allowed)), rel=1e-9)


class Pools(nn.Module):
    """A float layer, then one way to a layer of integers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem = way, nn.Conv2d(3, 4, 3, padding=1)
        self.next = nn.Linear(64, 5) if way == "flattened" else nn.Conv2d(8 if way == "joined" else 4, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x).relu()
        pooled = F.max_pool2d(x, 3, 1 if self.way in ("joined", "shared") else 2, 1)
        match self.way:
            case "flattened":
                return self.next(pooled.flatten(1)).tanh()
            case "chain":
                return self.next(F.max_pool2d(pooled, 2)).tanh()
            case "read as float":
                return self.next(pooled).tanh(), pooled.tanh()
            case "joined":
                return self.next(torch.cat([x, pooled], 1)).tanh()
            case "shared":
                return self.next(pooled).tanh(), x.exp()
        return self.next(pooled).tanh()


@pytest.mark.parametrize(
    ("way", "crossed"),
    [
        *(("plain", 1), ("flattened", 1), ("joined", 0)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("chain", 2), ("read as float", 0), ("shared", 0))),
    ],
)
def test_onnx_runtime_moves_a_conversion_across_pools(way: str, crossed: int, tmp_path: Path) -> None:
    """What the table calls crossed: pools of a float layer read integers, though values are quantized after them."""
    pass_ = QuantizeStatic(kernels="all", overrides={"stem": "float"})
    model = Pools(way).eval()
    result = lobo_fx.compile(model, [pass_], example_inputs=IMAGES, calibration_data=[IMAGES], progress=False)
    result.export(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    integers = {name for node in nodes if node.op_type == "QuantizeLinear" for name in node.output}
    for node in nodes:
        if node.op_type == "MaxPool" and node.input[0] in integers:
            integers |= set(node.output)
    assert sum(node.op_type == "MaxPool" and node.input[0] in integers for node in nodes) == crossed
    graph = lobo_fx.trace(model, IMAGES).graph
    pools = [node for node in graph.nodes if node.op == "call_function" and "max_pool" in node.name]
    read_as_float = [any(user.name.startswith(("tanh", "output")) for user in pool.users) for pool in pools]
    by_table = [ONNX_RUNTIME.crosses(pool) for pool in pools]
    assert sum(one and not other for one, other in zip(by_table, read_as_float, strict=True)) == crossed


def test_a_tensor_whose_conversion_has_no_cost_is_not_converted() -> None:
    graph = program().graph
    priced = dict.fromkeys(choices(graph), Cost(100.0, 1.0))

    def refused(kernel: Kernel) -> Cost | NoCost:
        image = kernel.shapes[0] == (1, 4, 8, 8)  # what leaves each of the convolutions
        return NoCost("the runtime refuses") if image else Cost(0.1, 0.1)

    with_images = cheapest_regions(graph, priced, ONNX_RUNTIME, lambda kernel: Cost(0.1, 0.1), {})
    without = cheapest_regions(graph, priced, ONNX_RUNTIME, refused, {})
    assert len(with_images.integer) == 7
    assert without.integer <= {"linear"}, "the mean reads an image of this size as float"


def test_kernels_name_what_they_cost() -> None:
    kernels = [kernel.key for kernel in Choices.find(program().graph, REQUEST).priced]
    assert "conv 1x3x8x8 4x3x3x3 stride=1x1 padding=1x1 dilation=1x1 groups=1" in kernels
    assert "linear 1x4 4x5" in kernels
    assert "add 1x4x8x8 1x4x8x8" in kernels
    assert "convert 1x4x8x8" in kernels


def test_onnx_runtime_measures_every_kind_of_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = (("stride", (1, 1)), ("padding", (1, 1)), ("dilation", (1, 1)), ("groups", 1))
    kernels = [
        Kernel("conv", ((1, 8, 16, 16), (8, 8, 3, 3)), conv),
        Kernel("linear", ((1, 20, 16), (16, 32))),
        Kernel("matmul", ((1, 2, 20, 16), (1, 2, 16, 20))),
        Kernel("add", ((1, 8, 16, 16), (1, 8, 16, 16))),
        Kernel("mul", ((1, 8, 16, 16), (1, 8, 1, 1))),
        Kernel("concat", ((1, 8, 16, 16), (1, 4, 16, 16)), (("axis", 1),)),
        Kernel("global_average_pool", ((1, 8, 16, 16),)),
        Kernel("average_pool", ((1, 8, 16, 16),), (("kernel_size", (3, 3)), ("stride", (2, 2)), ("padding", (1, 1)))),
        Kernel("max_pool", ((1, 8, 16, 16),), POOL),
        Kernel("max_pool", ((1, 8, 17, 17),), (*POOL, ("ceil_mode", 1))),
        Kernel("sigmoid", ((1, 8, 16, 16),)),
        Kernel("leaky_relu", ((1, 8, 16, 16),)),
        Kernel("attention", ((1, 2, 16, 8), (1, 2, 12, 8), (1, 2, 12, 8))),
        Kernel("convert", ((1, 8, 16, 16),)),
        Kernel("product", ((3, 80), (24, 80)), (("bits", 4), ("block", 32), ("level", 4))),
        Kernel("product", ((1, 512), (256, 512)), (("bits", 8), ("block", 16), ("level", 4), ("streamed", 1))),
    ]
    monkeypatch.setattr(kernel_costs, "_STREAMED", 3 * 256 * 512)
    assert isinstance(OnnxRuntime(), MeasuresKernels)
    measured = measure_kernels(kernels)
    assert measured.keys() == set(kernels)
    assert all(isinstance(cost, Cost) and cost.floating > 0 and cost.integer > 0 for cost in measured.values())


def test_a_kernel_that_can_not_be_measured_has_no_cost_and_harms_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    good = [Kernel("sigmoid", ((1, size),)) for size in (8, 16, 24)]
    good.append(Kernel("attention", ((2, 2, 5, 8),) * 3))  # a fixed batch of two
    bad = [
        Kernel("matmul", ((1, 4, 5), (1, 6, 7))),  # the runtime refuses the model
        Kernel("conv", ((8, 12), (4, 8, 3)), (("stride", (1,)),)),  # it can't be built
        Kernel("attention", ((1, 8, 7, 8), (1, 2, 7, 8), (1, 2, 7, 8))),
        Kernel("softmax", ((1, 8),)),  # nothing is known of it
    ]
    measured = measure_kernels([kernel for pair in zip(good, bad, strict=True) for kernel in pair])
    assert all(isinstance(measured[kernel], Cost) for kernel in good)
    assert all(isinstance(cost := measured[kernel], NoCost) and cost.reason for kernel in bad)
    assert not capfd.readouterr().err, "what is refused here is nothing the user can act on"


def test_a_table_is_kept_and_read_again(tmp_path: Path) -> None:
    kernel = Kernel("linear", ((1, 4), (4, 5)))
    table = CostTable("a machine", {}, tmp_path / "deep" / "table.json")
    assert table.missing([kernel, kernel]) == [kernel]
    refused = Kernel("matmul", ((4,), (5,)))
    table.add({kernel: Cost(2.0004, 1 / 3), refused: NoCost("they don't fit")})
    assert table.missing([kernel, refused]) == []
    assert table.find(refused) == NoCost("they don't fit")
    again = CostTable.load(tmp_path / "deep" / "table.json")
    assert again[kernel] == again.find(kernel) == table[kernel] == Cost(2.0, 0.333)
    assert again.missing([kernel, refused]) == [refused], "another version may measure it"
    assert "linear 1x4 4x5" in str(again)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *((text, r"table\.json is no cost table") for text in ("", "{}", "[]")),
        ('{"format": 2, "machine": "m", "costs": {"a": 1}}', r"table\.json is no cost table"),
        (
            '{"format": 1, "machine": "m", "costs": {}}',
            r"^the cost table \S+table\.json is of format 1; this version reads format 2\. M",
        ),
    ],
)
def test_what_is_no_table_is_refused(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(content, encoding="utf-8")
    with pytest.raises(lobo_fx.InvalidInput, match=told):
        QuantizeStatic(costs=str(tmp_path / "table.json"))
    with pytest.raises(lobo_fx.InvalidInput, match="can't read the cost table"):
        QuantizeStatic(costs=str(tmp_path / "none.json"))


@pytest.mark.parametrize(("floating", "integer", "kinds"), [(100.0, 1.0, {"conv2d"}), (1.0, 100.0, set())])
def test_a_shipped_table_decides(floating: float, integer: float, kinds: set[str], tmp_path: Path) -> None:
    """With the costs of another machine nothing is measured on this one."""
    kernels = Choices.find(program().graph, REQUEST).priced
    costs = {k.key: [0.01, 0.01] if k.operator == "convert" else [floating, integer] for k in kernels}
    costs |= {k.key: [1.0, 50.0] for k in kernels if k.operator == "linear"}
    content = {"format": 2, "machine": "another", "costs": costs}
    (tmp_path / "table.json").write_text(json.dumps(content), encoding="utf-8")
    pass_ = QuantizeStatic(costs=str(tmp_path / "table.json"))
    result = lobo_fx.compile(traced(), [pass_], calibration_data=[IMAGES], progress=False)
    quantized = {
        str(node.target).split(".")[1]
        for node in result.program.graph.nodes
        if any(source.name.startswith("dequantize_per_channel") for source in node.all_input_nodes)
    }
    assert quantized == kinds
    notes = [note for note in result.report.notes if "stays float" in note]
    assert any("linear" in note and "1 µs, as integers 50 µs" in note for note in notes)
    assert not any("measured on this machine" in note for note in notes)


def overridden(**settings: Any) -> list[str]:
    pass_ = QuantizeStatic(kernels="all", **settings)
    result = lobo_fx.compile(traced(), [pass_], calibration_data=[IMAGES], progress=False)
    return sorted(name for name, tensor in result.module.state_dict().items() if tensor.dtype == torch.int8)


def test_overrides_leave_modules_float() -> None:
    assert overridden() == ["first.weight", "fourth.weight", "head.weight", "second.weight", "third.weight"]
    assert overridden(overrides={"f*": "float", "head": "min_max"}) == ["head.weight", "second.weight", "third.weight"]
    with pytest.raises(lobo_fx.InvalidInput, match=r"'firts' matches no module; did you mean first"):
        overridden(overrides={"firts": "float"})
    with pytest.raises(lobo_fx.InvalidInput, match=r"overrides\['first'\] is 'int4'; known: entropy, histogram"):
        QuantizeStatic(overrides={"first": "int4"})


@pytest.mark.parametrize(
    ("target", "dtype", "limit"),
    [("x86-vnni", torch.uint8, 127), ("x86-avx2", torch.uint8, 63), ("arm", torch.int8, 127)],
)
def test_targets_choose_the_integers(target: str, dtype: torch.dtype, limit: int, tmp_path: Path) -> None:
    pass_ = QuantizeStatic(kernels="all", target=target)
    result = lobo_fx.compile(traced(), [pass_], calibration_data=[IMAGES], progress=False)
    weights = [
        tensor for tensor in result.module.state_dict().values() if tensor.dtype == torch.int8 and tensor.dim() > 1
    ]
    assert max(int(weight.abs().max()) for weight in weights) == limit
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    activations = result.program.graph.find_nodes(op="call_function", target=quantize)
    assert activations
    assert {node.args[-1] for node in activations} == {dtype}
    result.export(tmp_path / "model.onnx")


UNREADABLE = (
    *("half a tab", "{}", '{"format": 1, "machine": "m", "costs": {}}'),
    '{"format": 2, "machine": "m", "costs": {"k": [NaN, 1]}}',
)


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_damaged_table_is_measured_again_and_replaced(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = CostTable.of_this_machine(RUNTIMES.get(RUNTIMES.default)().version)
    assert table.path is not None
    table.path.parent.mkdir(parents=True)
    table.path.write_text(content)
    with pytest.raises(InvalidInput, match="cost table"):
        CostTable.load(table.path)

    def notes() -> list[str]:
        rows = torch.ones(2, 4)
        model = nn.Sequential(nn.Linear(4, 4))
        result = lobo_fx.compile(
            model, [QuantizeStatic()], example_inputs=rows, calibration_data=[rows], progress=False
        )
        return [note for note in result.report.notes if "damaged" in note]

    assert notes() == [f"the cost table kept in {table.path} is damaged, or of another format: measured again"]
    assert CostTable.load(table.path).costs
    assert notes() == []
