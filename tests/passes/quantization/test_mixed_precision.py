"""Mixed precision: the least sensitive layers first, as far as the budget goes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import Result
from lobo_fx.contracts.split import is_held_out
from lobo_fx.graph.program import Program
from lobo_fx.graph.provenance import module_name
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.passes import MixedPrecision, QuantizeStatic
from lobo_fx.plugins.kernels import Cost
from lobo_fx.plugins.registry import RUNTIMES

ROWS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
ALL = QuantizeStatic(kernels="all", observer="min_max", correct_bias=False)


class Net(nn.Module):
    """Four layers; one value in the second's input dwarfs the others, so 8 bits can't hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(8, 8) for _ in range(4))
        with torch.no_grad():
            self.second.weight[:, 0] = 0.001 * torch.randn(8)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.first(x))
        outlier = torch.cat([x[:, :1] + 1000, x[:, 1:]], 1)
        return self.head(torch.tanh(self.third(torch.tanh(self.second(outlier)))))


@functools.cache
def traced() -> Program:
    torch.manual_seed(0)
    return lobo_fx.trace(Net(), ROWS)


def compiled(pass_: Any, **settings: Any) -> Result:
    return lobo_fx.compile(traced(), [pass_], calibration_data=[ROWS[:16], ROWS[16:]], progress=False, **settings)


@functools.cache
def within_25_decibels() -> Result:
    return compiled(MixedPrecision(decibels=25, quantizer=ALL))


def integer_layers(result: Result) -> set[str]:
    """Modules whose weight is dequantized for an integer kernel; the others' is stored as int8 at most."""
    dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
    found = result.program.graph.find_nodes(op="call_function", target=dequantize)
    return {module_name(user) for node in found for user in node.users}


def test_the_sensitive_layer_stays_float() -> None:
    result = within_25_decibels()
    assert integer_layers(result) == {"first", "third", "head"}
    assert result.report.rows[-1].snr >= 24
    assert compiled(ALL).report.rows[-1].snr < 20


def test_the_sensitivities_are_those_of_the_layers_alone() -> None:
    result = within_25_decibels()
    (sheet,) = result.report.sheets
    found = {row[0]: row[1] for row in sheet.rows}
    assert [row[1] for row in sheet.rows] == sorted(found.values(), reverse=True)
    assert min(found, key=lambda name: found[name]) == "second"
    torch.manual_seed(0)
    rows = ROWS[[row for row in range(len(ROWS)) if is_held_out(row)]][:32]
    expected = Net()(rows)
    for layer in found:
        others = dict.fromkeys({"first", "second", "third", "head"} - {layer}, "float")
        alone = compiled(dataclasses.replace(ALL, overrides=others))
        assert signal_to_noise(expected, alone.module(rows)) == pytest.approx(found[layer], abs=0.2), layer


@pytest.mark.parametrize(("decibels", "count"), [(0, 4), (300, 0)])
def test_budgets_at_the_ends(decibels: float, count: int) -> None:
    assert len(integer_layers(compiled(MixedPrecision(decibels=decibels, quantizer=ALL)))) == count


def test_noise_is_paid_for_in_microseconds(tmp_path: Path) -> None:
    """Integers are much cheaper everywhere, so only noise keeps a layer float."""
    compiled(QuantizeStatic())  # measures what the table must have
    known = CostTable.of_this_machine(RUNTIMES.get(RUNTIMES.default)().version).costs
    costs = {key: Cost(0.1, 0.1) if key.startswith("convert") else Cost(100, 1) for key in known}
    CostTable("test", costs).save(tmp_path / "table.json")
    quantizer = QuantizeStatic(observer="min_max", costs=str(tmp_path / "table.json"), rounding="compensated")
    torch.manual_seed(0)
    expected = Net()(ROWS)
    kept, codes = [], []
    for decibels in (0, 25, 60):
        result = compiled(MixedPrecision(decibels=decibels, quantizer=quantizer))
        (sheet,) = result.report.sheets
        kept.append({row[0] for row in sheet.rows if row[2] == "int8"})
        state = result.module.state_dict()
        codes.append({name: value for name, value in state.items() if value.dtype == torch.int8 and value.dim() > 1})
        assert signal_to_noise(expected, result.module(ROWS)) >= decibels
        as_float = any("left the weights of the others float" in note for note in result.report.notes)
        assert as_float == (decibels > 0)
    assert kept[0] >= {"first", "second", "third", "head"}
    assert kept[1] >= {"first", "third", "head"}
    assert "second" not in kept[1]
    assert not kept[2]
    assert len(codes[1]) == len(kept[1])
    for name, value in codes[1].items():  # compensated, though the others' rounding was taken back
        assert torch.equal(value, codes[0][name]), name


def test_the_score_is_the_budget() -> None:
    torch.manual_seed(0)
    expected = Net()(ROWS).detach()

    def score(module: nn.Module) -> float:
        return -float((module(ROWS).detach() - expected).abs().max())

    allowed = 0.02 * float(expected.abs().max())
    result = compiled(MixedPrecision(drop=allowed, quantizer=ALL), evaluate=score)
    assert 1 <= len(integer_layers(result)) < 4
    assert score(result.module) >= -allowed


def test_the_table_is_saved_and_drawn(tmp_path: Path) -> None:
    result = within_25_decibels()
    result.report.save(tmp_path / "report")
    assert (tmp_path / "report" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert "| second |" in (tmp_path / "report" / "report.md").read_text()
    result.save(tmp_path / "saved")
    assert lobo_fx.load(tmp_path / "saved").report.sheets == result.report.sheets
    result.export(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"decibels": 30, "drop": 0.1}, "one budget"),
        ({"decibels": -1}, "decibels is -1; it must be a number of at least 0"),
        ({"drop": float("nan")}, "drop is nan"),
        ({"drop": 0.1, "quantizer": "int8"}, "quantizer is a str; expected a QuantizeStatic"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(lobo_fx.InvalidInput, match=words):
        MixedPrecision(**settings)


def test_a_score_is_asked_for() -> None:
    with pytest.raises(lobo_fx.InvalidInput, match="mixed_precision needs evaluate="):
        compiled(MixedPrecision(drop=0.1))
