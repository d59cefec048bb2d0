"""What passes measure is kept in a `workdir` for tries with other settings, and is never that of anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import lobo_fx
from lobo_fx.contracts.measurements import Measurements, Tensors
from lobo_fx.passes import MixedPrecision, PruneChannels, QuantizeWeights
from lobo_fx.report.report import Report

DATA = [torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
LABELLED = [(x, x[:, :3].argmax(1)) for x in DATA]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was measured, not taken from a file."""
    found: list[str] = []
    take = Measurements.take

    def counted(
        self: Measurements, what: str, program: lobo_fx.Program, over: str, settings: object, measure: Any
    ) -> Any:
        def measure_and_tell() -> Tensors:
            found.append(what)
            made: Tensors = measure()
            return made

        measure_and_tell.__module__ = measure.__module__
        return take(self, what, program, over, settings, measure_and_tell)

    monkeypatch.setattr(Measurements, "take", counted)
    return found


def compiled(folder: Path | None, *passes: Any, seed: int = 0, **settings: Any) -> Any:
    given = {"calibration_data": DATA, "train_data": LABELLED, "loss_fn": functional.cross_entropy, **settings}
    return lobo_fx.compile(network(seed), passes, example_inputs=DATA[0][:2], workdir=folder, progress=False, **given)


TRIES = {
    "moments": (QuantizeWeights("int8", method="gptq"), QuantizeWeights("int4", method="gptq")),
    "gradients": (PruneChannels(0.25, importance="taylor"), PruneChannels(0.5, importance="taylor")),
    "energies": (PruneChannels(0.25, importance="activation"), PruneChannels(0.5, importance="activation")),
    "sensitivities": (MixedPrecision(20.0), MixedPrecision(40.0)),
}


@pytest.mark.parametrize("what", TRIES)
def test_another_try_measures_nothing_again_and_gives_the_same(what: str, tmp_path: Path, measured: list[str]) -> None:
    first, other = TRIES[what]
    compiled(tmp_path, first)
    assert measured.count(what) == 1
    found = compiled(tmp_path, other)
    assert measured.count(what) == 1
    alone = compiled(None, other)
    torch.testing.assert_close(found.module(DATA[0]), alone.module(DATA[0]), rtol=0, atol=0)
    assert facts(found.report) == facts(alone.report)


def facts(report: Report) -> list[Any]:
    return [[(row.name, row.parameters, row.snr) for row in report.rows], report.notes, report.sheets]


def test_what_it_depends_on_measures_it_anew(tmp_path: Path, measured: list[str]) -> None:
    compiled(tmp_path, PruneChannels(0.25, importance="taylor"), loss_fn=nn.CrossEntropyLoss())
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"calibration_data": [DATA[0]], "train_data": [LABELLED[0]]},
        {"loss_fn": functional.nll_loss},
        {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.5)},
    ]
    for number, changed in enumerate(others):
        compiled(tmp_path, PruneChannels(0.5, importance="taylor"), **{"loss_fn": nn.CrossEntropyLoss(), **changed})
        assert measured.count("gradients") == 2 + number, changed


def test_data_that_may_differ_at_every_read_is_measured_at_every_try(tmp_path: Path, measured: list[str]) -> None:
    rows: Any = torch.cat(DATA)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    for try_ in TRIES["moments"]:
        compiled(tmp_path, try_, calibration_data=loader)
    assert measured.count("moments") == 2
    assert not list(tmp_path.glob("measured/*"))


def test_a_damaged_file_is_measured_anew(tmp_path: Path, measured: list[str]) -> None:
    first, other = TRIES["moments"]
    compiled(tmp_path, first)
    (file,) = tmp_path.glob("measured/moments-*")
    file.write_bytes(file.read_bytes()[:-8])
    compiled(tmp_path, other)
    assert measured.count("moments") == 2


def test_what_can_not_be_kept_is_said_and_used(tmp_path: Path) -> None:
    (tmp_path / "measured").write_text("a file stands where the folder is to be")
    result = compiled(tmp_path, TRIES["moments"][0])
    assert any("moments could not be kept for other tries" in str(note) for note in result.report.notes)


def test_tensors_that_can_not_be_written_and_unlike_settings(tmp_path: Path) -> None:
    program, own = lobo_fx.trace(network(), DATA[0]), Measurements(tmp_path, {"data": "x"})
    shared = torch.rand(3)
    found, fault = own.take("shared", program, "data", None, lambda: {"a": shared, "b": shared})
    assert found["b"] is shared
    assert "share memory" in fault
    for settings in ({1, 2}, torch.float32, {"a": shared}):
        for expected in (1.0, 1.0):
            found, fault = own.take("a/b", program, "data", settings, lambda: {"a": torch.ones(1)})
            assert (float(found["a"]), fault) == (expected, "")
    first, second = lambda: {"a": torch.zeros(1)}, lambda: {"a": torch.ones(1)}
    second.__qualname__ = "another"
    assert [float(own.take("s", program, "data", 0, each)[0]["a"]) for each in (first, second, first)] == [0, 1, 0]


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    program = lobo_fx.trace(network(), DATA[0])
    own = Measurements(tmp_path, {"data": "x"}, largest=10_000)
    taken: list[int] = []

    def take(number: int) -> None:
        def measure() -> Tensors:
            taken.append(number)
            return {"values": torch.full((1000,), float(number))}

        found, fault = own.take("numbers", program, "data", number, measure)
        assert not fault
        assert float(found["values"][0]) == number

    for number in (1, 2, 1, 3, 1, 2):
        take(number)
    assert taken == [1, 2, 3, 2]  # 1 was used after 2, so that 3 takes the place of 2
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000
