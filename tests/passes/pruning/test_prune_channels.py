"""Pruning channels: exact widths, the right channels, and a network that is the same but for them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Result
from lobo_fx.axes import Inference
from lobo_fx.contracts.context import Context
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneChannels, PruneWeights, QuantizeStatic
from lobo_fx.passes.fitting.statistics import input_norms
from lobo_fx.testing import assert_untouched, check_pass

Array = npt.NDArray[Any]
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class TwoLayers(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x).relu())


class ConvNet(nn.Module):
    """A stem, a residual block with a wide inside, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        return self.head((x + self.block(x)).relu().mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embedding(x)
        q, k, v = (part(x).view(x.shape[0], x.shape[1], 4, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


def conv_net() -> ConvNet:
    """With batch norms that are no identity, and channels that differ."""
    model = ConvNet().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data.mul_(3)
    return model


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def words(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 11, (rows, 5))


@functools.cache
def traced(make: Callable[[], nn.Module]) -> Program:
    """Traced once for all tests that look at what pruning makes of it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inputs = ROWS if make is TwoLayers else torch.arange(10).view(2, 5) if make is Attention else IMAGES
        return lobo_fx.trace(make().eval(), inputs)


def prune(model: nn.Module | Program, pass_: PruneChannels, x: torch.Tensor = ROWS, seed: int = 0) -> Result:
    """What a pass makes of a model, or of a program that stays as it was, by the same assertions."""
    if isinstance(model, nn.Module):
        return check_pass(pass_, model, x, seed=seed)
    before = copy.deepcopy(model.module.state_dict())
    result = lobo_fx.compile(model, [pass_], seed=seed, progress=False)
    assert before.keys() == model.module.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert result.program.signature == model.signature
    assert copy.deepcopy(result.module).state_dict().keys() == result.module.state_dict().keys()
    return result


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


WIDTHS = [
    # width, ratio, round_to, minimum, what stays
    (64, 0.5, 8, 1, 32),
    (64, 0.3, 8, 1, 48),
    (64, 0.4, 8, 1, 40),
    (24, 0.5, 8, 1, 16),
    (20, 0.5, 8, 1, 8),
    (16, 0.9, 8, 1, 8),
    (15, 0.6, 8, 1, 6),
    (12, 0.9, 8, 1, 1),
    (12, 0.9, 8, 5, 5),
    (64, 0.9, 8, 24, 24),
    (64, 0.99, 8, 1, 8),
    (10, 0.99, 1, 1, 1),
    (10, 0.3, 1, 1, 7),
    (40, 0.5, 16, 1, 16),
    (16, 0.0, 8, 1, 16),
    (17, 0.0, 8, 1, 17),
    (22, 0.0, 8, 1, 22),
    (6, 0.5, 8, 99, 6),
]


@pytest.mark.parametrize(("width", "ratio", "round_to", "minimum", "stay"), WIDTHS)
def test_widths(width: int, ratio: float, round_to: int, minimum: int, stay: int) -> None:
    result = prune(TwoLayers(width), PruneChannels(ratio, round_to=round_to, minimum=minimum))
    assert result.module.get_parameter("first.weight").shape == (stay, 6)
    assert result.module.get_parameter("first.bias").shape == (stay,)
    assert result.module.get_parameter("second.weight").shape == (5, stay)
    assert result.module.get_parameter("second.bias").shape == (5,)


def test_every_axis_of_a_residual_network() -> None:
    shapes = {name: x.shape for name, x in prune(traced(conv_net), PruneChannels()).module.state_dict().items()}
    assert shapes["stem.0.weight"] == (8, 3, 3, 3)
    assert shapes["block.0.weight"] == (16, 8, 3, 3)
    assert shapes["block.1.running_var"] == (16,)
    assert shapes["block.3.weight"] == (8, 16, 1, 1)
    assert shapes["head.weight"] == (5, 8)


def test_a_model_without_a_free_axis_says_so() -> None:
    result = prune(nn.Linear(6, 5), PruneChannels())
    reasons = "since of every parameter one holds: it is an output; it is an input"
    assert f"prune_channels found nothing to remove, {reasons}" in result.report.notes
    assert result.module.weight.shape == (5, 6)


def test_a_model_without_parameters_gives_no_reasons() -> None:
    result = prune(nn.ReLU(), PruneChannels())
    assert "prune_channels found nothing to remove" in result.report.notes


def test_the_report_counts_what_is_left() -> None:
    result = prune(traced(TwoLayers), PruneChannels())
    assert [row.parameters for row in result.report.rows] == [16 * 7 + 5 * 17, 8 * 7 + 5 * 9]


def test_patterns_choose_modules_and_their_ratios() -> None:
    result = prune(traced(conv_net), PruneChannels({"block.0": 0.75}))
    assert result.module.get_parameter("block.0.weight").shape == (8, 16, 3, 3)
    assert result.module.get_parameter("block.3.weight").shape == (16, 8, 1, 1)
    both = prune(traced(conv_net), PruneChannels({"block.0": 0.75, "stem.*": 0.5}))
    assert both.module.get_parameter("block.0.weight").shape == (8, 8, 3, 3)
    assert both.module.get_parameter("head.weight").shape == (5, 8)


def test_a_later_pattern_wins() -> None:
    result = prune(traced(conv_net), PruneChannels({"*": 0.5, "block.0": 0.25}))
    assert result.module.get_parameter("block.0.weight").shape == (24, 8, 3, 3)


@pytest.mark.parametrize("pattern", ["stem.O", "head"])
def test_a_pattern_without_a_match_lists_what_is_near(pattern: str) -> None:
    """`head` is a module, but its width is the output's."""
    with pytest.raises(InvalidInput, match=rf"'{pattern}' matches no module") as caught:
        lobo_fx.compile(traced(conv_net), [PruneChannels({pattern: 0.5})], progress=False)
    if pattern == "stem.O":
        assert "stem.0" in str(caught.value)


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, 2, "half", float("nan"), {"*": 1.5}, {"*": 0.5, "b": -1}])
def test_bad_ratios_are_refused(ratio: Any) -> None:
    with pytest.raises(InvalidInput, match=r"it must be in \[0, 1\)"):
        PruneChannels(ratio)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"importance": "l3"}, "importance"),
        ({"round_to": 0}, "whole number"),
        ({"round_to": 2.5}, "whole number"),
        ({"minimum": 0}, "whole number"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        PruneChannels(**setting)


SCORES: dict[str, tuple[Any, Callable[[Array], Array]]] = {
    "l1": ("l1", np.abs),
    "l2": ("l2", np.square),
    "callable": (lambda weight: weight.abs() ** 3, lambda weight: np.abs(weight) ** 3),
    "the largest go": (lambda weight: -weight.abs(), lambda weight: -np.abs(weight)),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_least_important_channels_go(name: str) -> None:
    criterion, score = SCORES[name]
    model = TwoLayers()
    before = arrays(model)
    importance = score(before["first.weight"]).sum(1) + score(before["first.bias"])
    importance = importance + score(before["second.weight"]).sum(0)
    stay = np.sort(np.argsort(-importance)[:11])
    after = arrays(prune(model, PruneChannels(0.3, importance=criterion, round_to=1)).module)
    assert np.array_equal(after["first.weight"], before["first.weight"][stay])
    assert np.array_equal(after["first.bias"], before["first.bias"][stay])
    assert np.array_equal(after["second.weight"], before["second.weight"][:, stay])
    assert np.array_equal(after["second.bias"], before["second.bias"])


def test_heads_are_scored_by_all_that_runs_through_them() -> None:
    """The rows of a product are summed for each of its factors."""
    model = Attention()
    with torch.no_grad():
        for part in (model.q, model.k, model.v):
            part.weight[4:8] *= 0.01
            part.bias[4:8] *= 0.01
    before = arrays(model)
    after = arrays(prune(model, PruneChannels({"v": 0.25}, round_to=1), words()).module)
    heads = before["v.weight"].reshape(4, 4, 16)[[0, 2, 3]]
    squares = np.square(before["v.weight"]).reshape(4, 4, 16).sum((0, 2))
    squares = squares + np.square(before["v.bias"]).reshape(4, 4).sum(0)
    squares = squares + np.square(before["out.weight"]).reshape(16, 4, 4).sum((0, 1))
    widths = np.sort(np.argsort(-squares)[:3])
    assert np.array_equal(after["v.weight"], heads[:, widths].reshape(9, 16))
    assert after["out.weight"].shape == (16, 9)
    assert after["q.weight"].shape == after["k.weight"].shape == (12, 16)


def kept_rows(after: Array, before: Array) -> list[int]:
    """Which rows of a matrix are left, in order."""
    return [int(np.flatnonzero((before == row).all(1))[0]) for row in after]


def test_random_importance_depends_on_the_seed_alone() -> None:
    def rows(program: Program, seed: int) -> list[int]:
        result = prune(program, PruneChannels(importance="random"), seed=seed)
        return kept_rows(arrays(result.module)["first.weight"], arrays(program.module)["first.weight"])

    first, second = (lobo_fx.trace(TwoLayers(), ROWS) for _ in range(2))
    assert rows(first, 0) == rows(first, 0) == rows(second, 0)
    assert rows(first, 0) == sorted(rows(first, 0))
    assert len({tuple(rows(first, seed)) for seed in range(5)}) > 1


def test_a_pruned_network_is_the_network_with_channels_zeroed() -> None:
    """By hand: zero what leaves the stem, the block's inside, and all that reads or norms it."""
    model = conv_net()
    result = prune(model, PruneChannels(), IMAGES)
    before, after = arrays(model), arrays(result.module)
    reference = copy.deepcopy(model)
    for conv, norm in (("stem.0", "stem.1"), ("block.0", "block.1")):
        stay = [int(np.flatnonzero(before[f"{norm}.running_mean"] == x)[0]) for x in after[f"{norm}.running_mean"]]
        gone = sorted(set(range(len(before[f"{conv}.bias"]))) - set(stay))
        assert len(gone) == len(stay)
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(after[f"{norm}.{name}"], before[f"{norm}.{name}"][stay])
        assert np.array_equal(after[f"{conv}.bias"], before[f"{conv}.bias"][stay])
        with torch.no_grad():
            for name in ("weight", "bias"):
                reference.get_parameter(f"{norm}.{name}")[gone] = 0
                if conv == "stem.0":  # the residual stream, which the block adds to
                    reference.get_parameter(f"block.4.{name}")[gone] = 0
    torch.testing.assert_close(result.module(IMAGES), reference(IMAGES), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(result.module(IMAGES), model(IMAGES), rtol=1e-2)


def test_the_users_model_is_untouched() -> None:
    model = conv_net().train()
    with assert_untouched(model):
        lobo_fx.compile(model, [PruneChannels()], example_inputs=IMAGES, progress=False)
    assert model.stem[0].weight.shape == (16, 3, 3, 3)


def test_parameters_keep_their_names() -> None:
    model = conv_net()
    result = prune(model, PruneChannels(), IMAGES)
    assert list(result.module.state_dict()) == list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(name for name, _ in result.module.named_parameters()) == sorted(names)


def test_the_batch_stays_free() -> None:
    result = prune(traced(conv_net), PruneChannels())
    rows = torch.randn(7, 3, 8, 8)
    found = result.module(rows)
    assert found.shape == (7, 5)
    torch.testing.assert_close(found[3:4], result.module(rows[3:4]))
    assert result.original is not None
    assert not isinstance(result.program.signature.inputs[0].shape[0], int)  # type: ignore[union-attr]


def test_tied_weights_stay_tied() -> None:
    result = prune(Attention(tied=True).eval(), PruneChannels(), words())
    assert result.module.get_parameter("head.weight") is result.module.get_parameter("embedding.weight")
    assert result.module.get_parameter("head.weight").shape == (11, 8)


def test_the_attention_scale_stays_that_of_the_original_width() -> None:
    result = prune(traced(Attention), PruneChannels(0.5, round_to=1))
    attention = torch.ops.aten.scaled_dot_product_attention.default
    (node,) = result.program.graph.find_nodes(op="call_function", target=attention)
    assert node.kwargs["scale"] == pytest.approx(1 / math.sqrt(4))
    assert node.args[0].meta["val"].shape[-1] == 2


def test_a_pruned_module_trains() -> None:
    module = prune(traced(conv_net), PruneChannels()).module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(module(IMAGES), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def onnx_outputs(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(found))


@pytest.mark.parametrize("kind", ["images", "words"])
def test_the_exported_file_agrees(kind: str, tmp_path: Path) -> None:
    model: nn.Module = conv_net() if kind == "images" else Attention(tied=True).eval()
    x, more = (IMAGES, torch.randn(3, 3, 8, 8)) if kind == "images" else (words(), words(3))
    result = prune(model, PruneChannels(), x)
    path = result.export(tmp_path / "model.onnx").path
    for batch in (x, more):
        torch.testing.assert_close(onnx_outputs(path, batch), result.module(batch), rtol=1e-4, atol=1e-5)


def test_a_saved_result_loads(tmp_path: Path) -> None:
    result = prune(traced(conv_net), PruneChannels())
    loaded = lobo_fx.load(result.save(tmp_path / "saved"))
    more = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded.module(more), result.module(more))
    assert {k: v.shape for k, v in loaded.module.state_dict().items()} == {
        k: v.shape for k, v in result.module.state_dict().items()
    }


def test_pruned_then_quantized(tmp_path: Path) -> None:
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    pruned = lobo_fx.compile(traced(conv_net), [PruneChannels()], calibration_data=data, progress=False)
    passes = [PruneChannels(), QuantizeStatic(kernels="all")]
    result = lobo_fx.compile(traced(conv_net), passes, calibration_data=data, progress=False)
    assert [row.parameters for row in result.report.rows][1] == pruned.report.rows[1].parameters
    found = onnx_outputs(result.export(tmp_path / "model.onnx").path, data[0])
    assert found.shape == (4, 5)
    apart = (found - result.module(data[0]).detach()).abs()
    assert float(apart.median()) < 1e-5
    assert float(apart.max()) < 0.01 * float(found.abs().max())  # where a value is rounded the other way


def test_pruned_twice() -> None:
    model = TwoLayers(64)
    result = lobo_fx.compile(model, [PruneChannels(), PruneChannels()], example_inputs=ROWS, progress=False)
    assert result.module.get_parameter("first.weight").shape == (16, 6)


def test_a_recipe_names_it() -> None:
    result = lobo_fx.compile(traced(TwoLayers), ["prune_channels"], progress=False)
    assert result.passes == [("prune_channels", {})]
    assert result.module.get_parameter("first.weight").shape == (8, 6)


def test_statistics_over_an_axis_are_reported() -> None:
    """A layer norm runs over the width: removal is more than zeroing, and the twin without one is exact."""
    normed = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 5))
    for model, expected in ((normed, True), (traced(TwoLayers), False)):
        notes = prune(model, PruneChannels()).report.notes
        assert any("removal is more than zeroing" in note for note in notes) == expected
        assert any("layer_norm.default takes statistics over it" in note for note in notes) == expected


@pytest.mark.parametrize("kinds", [("heads",), ("head_dim",), ("residual",), ("heads", "residual")])
def test_only_the_kinds_that_were_asked_for_are_pruned(kinds: tuple[str, ...]) -> None:
    after = arrays(prune(traced(Attention), PruneChannels(0.5, kinds=kinds, round_to=1)).module)
    stream = 8 if "residual" in kinds else 16
    inside = 8 if {"heads", "head_dim"} & set(kinds) else 16
    assert after["q.weight"].shape == after["v.weight"].shape == (inside, stream)
    assert after["embedding.weight"].shape == (11, stream)


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        *(("macs", 1), ("parameters", 1), ("file_size", 1), ("macs", 3)),
        *(pytest.param(target, 3, marks=pytest.mark.slow) for target in ("parameters", "file_size")),
    ],
)
def test_targets_are_hit(target: str, steps: int) -> None:
    pass_ = PruneChannels(target=target, keep=0.5, steps=steps, round_to=1)
    result = prune(traced(conv_net), pass_)
    first, last = result.report.rows
    before, after = (row.bytes if target == "file_size" else getattr(row, target) for row in (first, last))
    assert before is not None
    assert after == pytest.approx(0.5 * before, rel=0.02 if target != "file_size" else 0.03)


def test_steps_end_at_the_same_widths() -> None:
    once, thrice = (
        prune(traced(conv_net), PruneChannels(0.5, steps=steps, round_to=4)).module.state_dict() for steps in (1, 3)
    )
    assert {name: tensor.shape for name, tensor in once.items()} == {n: t.shape for n, t in thrice.items()}


def test_steps_score_what_is_left_anew() -> None:
    """A position's importance here is its place, counted anew in each step: the first go, whatever they were."""
    model = TwoLayers(12)
    with torch.no_grad():
        model.first.weight[:] = torch.arange(1.0, 13)[:, None]
    result = prune(model, PruneChannels(0.5, importance="lamp", steps=2, round_to=1))
    assert len(result.kept_indices["first.weight"][0]) == 6
    assert result.kept_indices["second.weight"][1] == result.kept_indices["first.weight"][0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"kinds": ["head"]}, r"kinds is \['head'\]; it must be a list of heads"),
        ({"kinds": "heads"}, "kinds is 'heads'; it must be a list of"),
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        ({"target": "latency"}, "target is 'latency'; it must be one of None, macs, parameters, file_size"),
        ({"keep": 0}, r"keep is 0; it must be in \(0, 1\]"),
    ],
)
def test_more_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        PruneChannels(**setting)


def test_a_target_that_minimum_widths_forbid_names_the_nearest() -> None:
    pass_ = PruneChannels(target="macs", keep=0.1, minimum=12, round_to=1)
    with pytest.raises(InvalidInput, match=r"can't be hit .*minimum=12.*the nearest possible is 0\.\d+"):
        prune(traced(conv_net), pass_)


def test_a_criterion_without_its_data_is_refused_before_any_work() -> None:
    with pytest.raises(InvalidInput, match="prune_channels needs train_data="):
        prune(traced(conv_net), PruneChannels(importance="taylor"))


def test_squeezed_dimensions_are_those_of_the_original() -> None:
    """A width that pruning makes 1 is not dropped with the dimensions that were 1 before."""

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.conv(x).mean((2, 3), keepdim=True).squeeze())

    result = prune(Squeezed(), PruneChannels(0.99, round_to=1), IMAGES)
    assert result.module.state_dict()["head.weight"].shape == (4, 1)


@pytest.mark.parametrize("target", ["macs", "parameters"])
@pytest.mark.parametrize("scope", ["axis", "global"])
def test_targets_are_hit_where_widths_move_by_turns(target: str, scope: str) -> None:
    """Grouped convolutions move widths in coarse steps; some mix of them comes near."""
    pass_ = PruneChannels(target=target, keep=0.4, scope=scope, round_to=1)
    first, last = prune(traced(grouped), pass_).report.rows
    assert getattr(last, target) == pytest.approx(0.4 * getattr(first, target), rel=0.02)


def test_attention_modules_are_refitted_to_calibration_data() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    data = [torch.randn(4, 5, 16)]
    result = lobo_fx.compile(
        model, [PruneChannels(round_to=1)], example_inputs=data[0], calibration_data=data, progress=False
    )
    assert result.report.rows[-1].parameters < result.report.rows[0].parameters


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ratio": 0.7, "target": "macs"}, "target='macs' chooses the ratio itself"),
        ({"keep": 0.3}, "keep says how much of a target stays"),
        ({"ratio": {}}, "it names none"),
        ({"kinds": []}, r"kinds is \[\]; it must be a list of"),
        ({"kinds": 5}, "kinds is 5; it must be a list of"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        PruneChannels(**settings)


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"importance gives NaN, infinity .* for 'first\.weight"):
        prune(traced(TwoLayers), PruneChannels(importance=lambda weight: weight * torch.nan))
    data = [(ROWS, torch.zeros(3, 5))]
    with pytest.raises(InvalidInput, match="loss_fn gives nan on batch 0 of train_data"):
        lobo_fx.compile(
            traced(TwoLayers),
            [PruneChannels(importance="taylor")],
            train_data=data,
            loss_fn=lambda outputs, labels: (outputs * torch.nan).sum(),
            progress=False,
        )


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("target", ["macs", "parameters", "file_size"])
def test_a_target_of_which_a_model_has_none_is_refused(target: str, steps: int) -> None:
    with pytest.raises(InvalidInput, match=f"target='{target}': the model has none"):
        lobo_fx.compile(traced(nn.ReLU), [PruneChannels(target=target, steps=steps)], progress=False)


def test_inputs_of_a_tied_weight_count_along_the_dimension_that_reads_them() -> None:
    """It is read as it is and transposed, from values of other widths."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.weight).relu(), self.weight.t())

    torch.manual_seed(0)
    model, data = Tied().eval(), [torch.randn(64, 8)]
    prune = PruneChannels(0.25, importance="activation", round_to=1, compensation="none")
    result = lobo_fx.compile(model, [prune], example_inputs=data[0][:2], calibration_data=data, progress=False)
    weight = model.weight.detach()
    hidden = (data[0][[row for row in range(64) if row % 4 != 3]] @ weight.T).relu()
    score = weight.abs().sum(1) * hidden.square().mean(0).sqrt()
    kept = result.kept_indices["weight"][0]
    assert len(kept) == 9
    assert set(kept) == set(score.topk(9).indices.tolist())


@pytest.mark.parametrize("sizes", [(35,), (16, 16, 3)])
def test_activations_count_for_their_rows(sizes: tuple[int, ...]) -> None:
    """A short batch for less than a long one; of flattened positions one row has several."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Flatten(0, 1), nn.ReLU(), nn.Linear(16, 3))
    data = [(at + 1) * torch.randn(size, 5, 4) for at, size in enumerate(sizes)]
    program = lobo_fx.trace(model, data[0][:2])
    context = Context(program.signature, calibration_data=data, show_progress=False)
    found = input_norms(Inference(program).run(), context)
    energies = {"0.weight": torch.zeros(4).double(), "3.weight": torch.zeros(16).double()}
    with torch.no_grad():
        for inputs in context.fitting_batches():
            (batch,) = inputs.args
            hidden = model[:3](batch)
            energies["0.weight"] += len(batch) * batch.double().square().mean((0, 1))
            energies["3.weight"] += len(batch) * hidden.double().square().mean(0)
    for name, energy in energies.items():
        torch.testing.assert_close(found[name, 1].flatten(), energy.sqrt(), rtol=1e-6, atol=0)


# What else may share, fix or follow an axis.


def compiled(model: nn.Module, pass_: Any, inputs: torch.Tensor, **given: Any) -> Result:
    return lobo_fx.compile(model.eval(), pass_, example_inputs=inputs, progress=False, **given)


def widths(result: Result, *names: str) -> list[int]:
    return [result.module.get_parameter(f"{name}.weight").shape[0] for name in names]


class Blurred(nn.Module):
    """Each channel of a concatenation is an image of its own for a while: a computed size is a sum times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(48, 8, 1)
        self.register_buffer("kernel", torch.ones(1, 1, 3, 3) / 9)

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = y.shape
        z = F.conv2d(y.reshape(n * c, 1, h, w), self.kernel, padding=1).reshape(n, c, h, w)  # type: ignore[arg-type]
        return self.c(z.relu()).mean((2, 3))


@pytest.mark.parametrize("ratio", [0.5, {"a": 0.5}])
def test_a_computed_size_of_a_concatenation_shrinks_with_its_pieces(ratio: Any) -> None:
    result = check_pass(PruneChannels(ratio), Blurred().eval(), IMAGES, export=True)
    assert widths(result, "a", "b") == [16, 8 if ratio == 0.5 else 16]


class Tokens(nn.Module):
    """The channels of the first layer are what a convolution or a batch norm takes for space."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.stem, self.inside, self.head = nn.Linear(12, 64), inside, nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.inside(self.stem(x)).relu().mean(1))


@pytest.mark.parametrize("inside", [nn.Conv1d(9, 9, 1), nn.BatchNorm1d(9)])
def test_what_reads_pruned_channels_as_space_is_not_refitted(inside: nn.Module) -> None:
    data = [torch.randn(32, 9, 12, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    result = compiled(Tokens(inside), [PruneChannels(0.5)], data[0][:2], calibration_data=data)
    assert widths(result, "stem") == [32]


class Spectrogram(nn.Module):
    """Filters of a front end that are no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(64, 1, 32, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("mel", torch.rand(20, 64, generator=torch.Generator().manual_seed(1)))
        self.head = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> Any:
        power = F.conv1d(x.unsqueeze(1), self.basis, stride=16).square()  # type: ignore[arg-type]
        return self.head((self.mel @ power).mean(2))  # type: ignore[operator]


def test_an_axis_of_buffers_alone_stays_as_the_user_made_it() -> None:
    result = compiled(Spectrogram(), [PruneChannels(0.5)], torch.randn(2, 128))
    assert result.module.get_buffer("basis").shape[0] == 64
    assert widths(result, "head.0") == [8]


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.e.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.f(self.e(x)).relu())


@pytest.mark.parametrize("name", ["e", "head"])
def test_a_tied_weight_is_excluded_by_each_of_its_names(name: str) -> None:
    result = compiled(TiedEmbedding(), [PruneChannels(0.5, exclude=[name])], torch.arange(6).reshape(2, 3))
    assert result.module.get_parameter("e.weight").shape == (20, 16)
    assert not any("excludes nothing" in str(note) for note in result.report.notes)


def test_an_embedding_is_pruned_by_its_name() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.f = nn.Embedding(20, 16), nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.f(self.e(x))

    result = compiled(Embedded(), [PruneChannels({"e": 0.5})], torch.arange(6).reshape(2, 3))
    assert result.module.get_parameter("e.weight").shape == (20, 8)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TwoLayers()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls.add_(1)  # type: ignore[operator]
        return self.net(x)


@pytest.mark.parametrize("importance", ["taylor", "fisher"])
def test_gradients_rank_frozen_weights_too_and_leave_buffers_alone(importance: str) -> None:
    model = Counted().requires_grad_(False)
    with torch.no_grad():
        model.net.second.weight[:, :4] /= 1000  # so that the first positions matter least
    labelled = [
        (torch.randn(32, 6, generator=torch.Generator().manual_seed(at)), torch.zeros(32).long()) for at in (0, 1)
    ]
    given = {"train_data": labelled, "loss_fn": F.cross_entropy}
    result = compiled(model, [PruneChannels(0.5, importance=importance)], ROWS, **given)
    assert float(result.module.get_buffer("calls")) == 0
    second, before = result.module.get_parameter("net.second.weight"), model.net.second.weight
    kept = [at for at in range(16) if any(torch.equal(before[:, at], column) for column in second.T)]
    assert len(kept) == 8
    assert kept != list(range(8))
    assert not any(parameter.requires_grad for parameter in result.module.parameters())


def test_masks_that_pruning_channels_lifts_are_told() -> None:
    given: dict[str, Any] = {"calibration_data": [torch.randn(64, 6)]}
    result = compiled(TwoLayers(), [PruneWeights(0.5), PruneChannels(0.25)], ROWS, **given)
    assert any("no longer kept at zero, and refitting fills them" in str(note) for note in result.report.notes)


@pytest.mark.parametrize("scope", ["global", "isomorphic"])
def test_positions_of_equal_score_go_in_equal_shares(scope: Any) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
        nn.Conv2d(32, 4, 1),
    )
    result = compiled(model, [PruneChannels(0.5, importance="batch_norm", scope=scope)], IMAGES)
    assert widths(result, "0", "3") == [8, 16]


def test_a_target_that_steps_come_no_nearer_to_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU(), nn.Conv2d(40, 4, 1))
    result = compiled(model, [PruneChannels(target="parameters", keep=0.8, steps=3)], IMAGES)
    left = result.report.rows[-1].parameters / result.report.rows[0].parameters
    told = [str(note) for note in result.report.notes if "keep=0.8 of the parameters was asked for" in str(note)]
    assert bool(told) == (abs(left - 0.8) > 0.02 * 0.8)


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 16), nn.Linear(16, 5), nn.Linear(16, 5, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.first(x).relu()
        return self.one(x), F.linear(x.tanh(), self.two.weight, self.one.bias)


def test_a_layer_whose_bias_others_read_is_not_refitted_by_half() -> None:
    result = compiled(SharedBias(), [PruneChannels(0.5)], ROWS, calibration_data=[torch.randn(256, 6)])
    notes = [str(note) for note in result.report.notes]
    assert any("is not refitted: its bias is computed, or has other readers" in note for note in notes)
