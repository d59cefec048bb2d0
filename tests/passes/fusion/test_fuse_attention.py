"""Fused attention: equal to PyTorch's own, exported as one kernel, and left alone where it is something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import lobo_fx
from lobo_fx import Result
from lobo_fx.own_operators.attention import ATTENTION, attention
from lobo_fx.passes import FuseAttention, QuantizeStatic
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.testing import check_pass

ROWS = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Projections, heads split and merged in one of several ways, and something done between."""

    def __init__(self, heads: int = 4, style: str = "view", between: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.heads, self.style, self.between = heads, style, between or F.scaled_dot_product_attention
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.bias = nn.Parameter(torch.randn(1, heads, 7, 7))

    def forward(self, x: torch.Tensor) -> Any:
        batch, length, _ = x.shape
        if self.style == "stacked":
            stacked = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = stacked.unbind(0)
        elif self.style == "selected":
            stacked = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = stacked[0], stacked[1], stacked[2]
        else:
            q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.style == "contiguous":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        mixed = self.between(q, k, v, attn_mask=self.bias) if self.style == "biased" else self.between(q, k, v)
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, length, -1))


def fused(model: nn.Module, example: Any = ROWS) -> Result:
    torch.manual_seed(0)
    return check_pass(FuseAttention(), model.eval(), example)


def count(result: Result) -> int:
    return sum(node.target is ATTENTION for node in result.program.graph.nodes)


@pytest.mark.parametrize(
    "style",
    ["view", "stacked", "biased", *(pytest.param(s, marks=pytest.mark.slow) for s in ("selected", "contiguous"))],
)
def test_every_way_to_split_heads(style: str, tmp_path: Path) -> None:
    model = Attention(style=style).eval()
    result = fused(model)
    assert count(result) == 1
    torch.testing.assert_close(result.module(ROWS), model(ROWS), rtol=1e-5, atol=1e-6)
    assert not any("transpose" in str(node.target) for node in result.program.graph.nodes)
    path = result.export(tmp_path / "model.onnx").path
    assert [node.op_type for node in onnx.load(path).graph.node].count("MultiHeadAttention") == 1
    assert result.report.rows[-1].macs == result.report.rows[0].macs


@hypothesis.given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    lengths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_operator_is_softmax_attention(
    batch: int, heads: int, lengths: tuple[int, int], sizes: tuple[int, int], masked: bool, seed: int
) -> None:
    """Against a loop over heads in double precision; the gradient against numbers."""
    generator = torch.Generator().manual_seed(seed)
    (queries, keys), (width, out) = lengths, sizes

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(batch, queries, heads * width), draw(batch, keys, heads * width), draw(batch, keys, heads * out)
    bias = draw(1, heads, queries, keys) if masked else None
    found = attention(q, k, v, bias, heads, 0.3)
    parts = []
    for head, (a, b, c) in enumerate(zip(*(rows.chunk(heads, 2) for rows in (q, k, v)), strict=True)):
        scores = 0.3 * a @ b.mT + (0 if bias is None else bias[:, head])
        parts.append(scores.softmax(-1) @ c)
    torch.testing.assert_close(found, torch.cat(parts, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_flow_through(masked: bool) -> None:
    shapes = [(2, 3, 4), (2, 2, 4), (2, 2, 6), *([(1, 2, 3, 2)] if masked else [])]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *rest: attention(q, k, v, rest[0] if rest else None, 2, 0.3), inputs, atol=1e-4
    )


def _rotated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.flip(-1), k, v)


def _ahead(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], is_causal=True)


def _one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(torch.ones(1, 4, 7, 6), k, v)


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(4, 7, 7).tril().bool())


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (_rotated, "changed after the split"),
        (_ahead, "more or fewer keys"),
        (_one_query, "or another batch"),
        (_by_head, "its boolean mask differs by head"),
    ],
)
def test_what_is_something_else_is_left_alone(between: Callable[..., Any], reason: str) -> None:
    result = fused(Attention(between=between))
    assert count(result) == 0
    (note,) = [note for note in result.report.notes if "fixed sizes" not in note]
    assert reason in note
    assert "test_fuse_attention.py" in note


KEYS = torch.tensor([1, 1, 1, 0, 1, 1, 0]).bool()
MASKS: dict[str, Any] = {
    "causal": None,
    "boolean": torch.ones(7, 7).tril().bool(),
    "hides a row": torch.ones(7, 7).tril(-1).bool(),
    "keys": KEYS.view(1, 1, 1, 7),
    "hides all": torch.zeros(1, 1, 1, 7).bool(),
    "one head": torch.ones(1, 7, 7).tril().bool(),
    "of a batch": torch.stack([torch.ones(7, 7).tril(at).bool() for at in (-1, 0, 1)]).unsqueeze(1),
    "added keys": torch.where(KEYS, 0.0, -10.0).view(1, 1, 1, 7),
    "added matrix": torch.randn(7, 7, generator=torch.Generator().manual_seed(3)),
}


OFTEN = ("causal", "hides a row", "keys", "of a batch", "added matrix")


@pytest.mark.parametrize(
    "kind", [*OFTEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MASKS if kind not in OFTEN)]
)
def test_masks_of_any_kind(kind: str, tmp_path: Path) -> None:
    mask = MASKS[kind]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(between=self.mixed), Attention(between=self.mixed)
            self.register_buffer("mask", mask)

        def mixed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if mask is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.get_buffer("mask"))

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x))

    model = Twice().eval()
    result = lobo_fx.compile(model, [FuseAttention()], example_inputs=ROWS, dynamic_shapes=None, progress=False)
    assert count(result) == 2
    torch.testing.assert_close(result.module(ROWS), model(ROWS), rtol=1e-5, atol=1e-6)
    targets = [str(node.target) for node in result.program.graph.nodes]
    assert sum("where" in target for target in targets) == (mask is not None and mask.dtype == torch.bool)
    artifact = result.export(tmp_path / "model.onnx")
    assert [node.op_type for node in onnx.load(artifact.path).graph.node].count("MultiHeadAttention") == 2
    assert artifact.parity < 1e-5


@pytest.mark.parametrize("first", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 7))])
def test_a_mask_over_keys_serves_attentions_of_several_lengths(first: int, tmp_path: Path) -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)

        def attend(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q = self.q(x).view(*x.shape[:2], 4, 6).transpose(1, 2)
            k = self.k(y).view(*y.shape[:2], 4, 6).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, k, attn_mask=mask).transpose(1, 2).flatten(2)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> Any:
            mask = keep[:, None, None]
            return self.attend(x[:, :3], self.attend(x[:, :first], x, mask).mean(1, True) + x, mask)

    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1], [1] * 7]).bool()
    result = lobo_fx.compile(Crossed().eval(), [FuseAttention()], example_inputs=(ROWS, keep), progress=False)
    assert count(result) == 2
    result.export(tmp_path / "model.onnx")


def test_a_causal_mask_takes_no_room_in_the_file(tmp_path: Path) -> None:
    def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = Attention(between=causal).eval()
    del model.bias
    sizes = [
        lobo_fx.compile(model, [FuseAttention()], example_inputs=torch.randn(2, length, 24), progress=False)
        .export(tmp_path / f"{length}.onnx")
        .bytes
        for length in (8, 256)
    ]
    assert abs(sizes[1] - sizes[0]) < 100


def test_a_mask_that_comes_in_and_hides_rows_in_a_file_of_any_batch(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> Any:
            self.attention.between = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, keep[:, None, None])
            return self.attention(x)

    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0] * 7, [1] * 7]).bool()
    model = Padded().eval()
    result = lobo_fx.compile(model, [FuseAttention()], example_inputs=(ROWS, keep), progress=False)
    assert count(result) == 1
    path = result.export(tmp_path / "model.onnx").path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (1, 2, 3):
        (found,) = session.run(None, {"x": ROWS[:rows].numpy(), "keep": keep[:rows].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ROWS[:rows], keep[:rows]), rtol=1e-5, atol=1e-5)


def test_heads_that_are_merged_in_another_order_are_moved_back() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(3, 7, 4, 6).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(q, q, q)
            return mixed.reshape(3, 7, 24) + mixed.transpose(1, 2).flatten(2)

    result = lobo_fx.compile(Odd(), [FuseAttention()], example_inputs=ROWS, dynamic_shapes=None, progress=False)
    assert count(result) == 1
    torch.testing.assert_close(result.module(ROWS), Odd()(ROWS))


def test_quantization_fuses_where_the_cost_table_says_so(tmp_path: Path) -> None:
    from lobo_fx.measures.kernel_costs import CostTable
    from lobo_fx.plugins.kernels import Cost

    model = Attention().eval()
    settings: dict[str, Any] = {"example_inputs": ROWS, "calibration_data": [ROWS], "progress": False}
    lobo_fx.compile(model, [QuantizeStatic()], **settings)
    path = tmp_path / "table.json"
    for separate, one, expected in ((10.0, 9.0, 1), (9.0, 10.0, 0)):
        table = CostTable.of_this_machine(RUNTIMES.get("onnxruntime")().version)
        costs = {k: Cost(separate, one) if k.startswith("attention") else c for k, c in table.costs.items()}
        CostTable("test", costs).save(path)
        result = lobo_fx.compile(model, [QuantizeStatic(costs=str(path))], **settings)
        assert count(result) == expected
        assert any("a fused one 10 µs" in note for note in result.report.notes) == (not expected)
