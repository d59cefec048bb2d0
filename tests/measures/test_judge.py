"""Decibels of the whole and of its worst part, against plain arithmetic on slices of the outputs."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.measures.fidelity import signal_to_noise
from lobo_fx.measures.judge import Judge

ROWS = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Detector(nn.Module):
    """Boxes a thousand times larger than scores, joined, moved, and given out beside a number for each row."""

    def __init__(self, moved: bool, joined: bool) -> None:
        super().__init__()
        self.moved, self.joined = moved, joined
        self.box, self.score = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: torch.Tensor) -> Any:
        box, score = 1000 * self.box(x), self.score(x)
        if not self.joined:
            return box, score
        both = torch.cat([box, score], 1)
        return both.flatten(2).transpose(1, 2) if self.moved else both


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_the_worst_part_is_not_hidden_by_the_whole(moved: bool, joined: bool) -> None:
    torch.manual_seed(0)
    model = Detector(moved, joined).eval()
    program = trace(model, ROWS[:2])
    judge = Judge(program, [program.signature.bind_batch(ROWS[:4]), program.signature.bind_batch(ROWS[4:])])
    changed = program.clone()
    with torch.no_grad():
        changed.module.get_parameter("score.weight").mul_(0.5)
    verdict = judge(changed)
    whole, found = model(ROWS), changed.run(program.signature.bind_batch(ROWS))
    assert verdict.whole == pytest.approx(signal_to_noise(whole, found), abs=1e-3)
    before, after = ((value if joined else value[1]) for value in (whole, found))
    part = (..., slice(4, None)) if moved and joined else (slice(None), slice(4 if joined else 0, None))
    assert verdict.worst == pytest.approx(signal_to_noise(before[part], after[part]), abs=1e-3)
    assert verdict.whole > verdict.worst + 30
    assert verdict.part == ("output, score" if joined else "output_1")
    same = judge(program)
    assert same.whole == same.worst == float("inf")


def test_what_one_module_joins_is_as_many_parts() -> None:
    """Both values are of the same module, and large ones would hide small ones under its name."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.box, self.score = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([1000 * self.box(x), self.score(x).sigmoid()], 1)

    torch.manual_seed(0)
    model = nn.Sequential(Head()).eval()
    program = trace(model, ROWS[:2])
    changed = program.clone()
    with torch.no_grad():
        changed.module.get_parameter("0.score.bias").sub_(2)
    verdict = Judge(program, [program.example_inputs])(changed)
    before, after = (made.run()[:, 4:] for made in (program, changed))
    assert verdict.worst == pytest.approx(signal_to_noise(before, after), abs=1e-3)
    assert verdict.whole > verdict.worst + 30
    assert verdict.part == "output, sigmoid"


@pytest.mark.parametrize("joined", [True, False])
def test_dropout_that_always_draws_is_a_part_of_its_own(joined: bool) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dropped = F.dropout(self.layer(x), 0.5, training=True)
            return torch.cat([dropped, x], 1) if joined else dropped

    program = trace(Drops().eval(), ROWS[:2])
    (parts,) = Judge(program, [program.example_inputs]).parts[0]
    assert [int(places.sum()) for places in parts.values()] == ([512, 384] if joined else [512])


def test_one_output_is_one_part() -> None:
    program = trace(nn.Conv2d(3, 4, 1).eval(), ROWS[:2])
    changed = program.clone()
    with torch.no_grad():
        changed.module.get_parameter("weight").mul_(0.9)
    verdict = Judge(program, [program.example_inputs])(changed)
    assert verdict.whole == verdict.worst < 30
    assert verdict.part == ""


def test_the_report_measures_on_held_out_rows_and_names_the_worst_output() -> None:
    torch.manual_seed(0)
    model = Detector(moved=False, joined=True).eval()
    pruning = lobo_fx.passes.PruneWeights(0.5)
    data = [ROWS, 3 * ROWS]
    result = lobo_fx.compile(model, [pruning], example_inputs=ROWS[:2], calibration_data=data, progress=False)
    row, rows = result.report.rows[-1], torch.cat(data)[[1, 5, 9]]
    assert row.snr == pytest.approx(signal_to_noise(model(rows), result.module(rows)), abs=1e-3)
    assert row.worst_part in ("output, score", "output, mul", "output, ")
    assert "worst output dB" in str(result)
    loaded = lobo_fx.Report.from_json(json.loads(result.report.to_json()))
    assert loaded.rows[-1] == row
    cell = f"{row.worst:.1f} ({row.worst_part})"
    assert cell in str(result)
    assert cell in result.report.to_markdown()
    (line,) = [line for line in csv.DictReader(io.StringIO(result.report.to_csv())) if line["name"] == row.name]
    assert (float(line["worst"]), line["worst_part"]) == (row.worst, row.worst_part)


def test_landmarks_do_not_hide_boxes() -> None:
    """Three heads of one network, in pixels, in cells and below one; the budget holds for each."""

    class Faces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 16, 3, padding=1)
            self.landmarks, self.boxes, self.scores = (nn.Conv2d(16, count, 1) for count in (10, 4, 2))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.body(x).relu()
            return {"landmarks": 3000 * self.landmarks(x), "boxes": self.boxes(x), "scores": self.scores(x).sigmoid()}

    torch.manual_seed(0)
    model = Faces().eval()
    program = trace(model, ROWS[:2])
    changed = program.clone()
    with torch.no_grad():
        changed.module.get_parameter("boxes.weight").mul_(0.5)
    verdict = Judge(program, [program.signature.bind_batch(ROWS)])(changed)
    assert verdict.whole > 50
    assert (verdict.part, verdict.worst < 10) == ("boxes", True)
    budget = lobo_fx.passes.MixedPrecision(30, quantizer=lobo_fx.passes.QuantizeStatic(kernels="all"))
    result = lobo_fx.compile(model, [budget], example_inputs=ROWS[:2], calibration_data=[ROWS], progress=False)
    before, after = model(ROWS[1:2]), result.module(ROWS[1:2])
    assert min(signal_to_noise(before[name], after[name]) for name in before) >= 30
