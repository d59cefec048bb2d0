"""Axis rules of other packages: imported before the first inference, and a broken one breaks nothing."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from lobo_fx.axes import Inference, call
from lobo_fx.axes.members import members
from lobo_fx.axes.plugged import AXIS_RULES, load_plugged_rules
from lobo_fx.capture.tracing import trace

RULE = """
import torch
from lobo_fx.axes import any_of, axis_rule

@axis_rule(torch.ops.lobo_fx_plugged.half.default, zeros=any_of("x"))
def half(call):
    return call.axes("x")
"""


@torch.library.custom_op("lobo_fx_plugged::half", mutates_args=())
def half(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@half.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(half(self.first(x)))
        return found


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that a package may offer; the process's own rules are put back."""
    monkeypatch.setattr(call, "RULES", dict(call.RULES))
    monkeypatch.syspath_prepend(tmp_path)
    load_plugged_rules.cache_clear()
    yield tmp_path
    load_plugged_rules.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    points = {module: [EntryPoint("rules", module, AXIS_RULES.group)] for module in modules}
    monkeypatch.setitem(AXIS_RULES.__dict__, "_points", points)


def test_rules_are_there_before_the_first_inference(plugged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(Model().eval(), torch.randn(3, 4))
    offer(monkeypatch)
    assert not members(Inference(program).run())
    (plugged / "lobo_fx_rules_a.py").write_text(RULE, encoding="utf-8")
    offer(monkeypatch, "lobo_fx_rules_a")
    load_plugged_rules.cache_clear()
    assert [leaf.size for leaf in members(Inference(program).run())] == [8]


def test_a_module_that_fails_is_warned_about_and_breaks_no_other(
    plugged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trace(Model().eval(), torch.randn(3, 4))
    (plugged / "lobo_fx_rules_b.py").write_text("raise OSError('no library')", encoding="utf-8")
    (plugged / "lobo_fx_rules_c.py").write_text(RULE, encoding="utf-8")
    offer(monkeypatch, "lobo_fx_rules_b", "lobo_fx_rules_c")
    with pytest.warns(UserWarning, match=r"module of axis rules .*lobo_fx_rules_b.* can't be imported: no library"):
        inference = Inference(program).run()
    assert [leaf.size for leaf in members(inference)] == [8]
