"""Compilations that go on where an earlier one was interrupted."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import ContractError, InvalidInput, checksums
from lobo_fx.contracts.candidates import Candidate
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.program import Program
from lobo_fx.passes import FineTune, PruneChannels, PruneWeights, QuantizeStatic

DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5)).eval()


RECORD = types.ModuleType("record")
"""Of what ran, where it is no state of a pass: modules count by their files."""


@dataclasses.dataclass(frozen=True)
class Counted(Pass):
    """Changes nothing; fails where it is told to."""

    fails: bool = False
    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        RECORD.runs.append(self.fails)
        if self.fails:
            raise RuntimeError("the power went out")
        context.note("was here")
        return program


class Plan:
    """Nothing to decide; what a real plan has."""

    expected: ClassVar[dict[str, float]] = {"latency of the original's": 0.5}

    def save(self, file: Path) -> None:
        file.write_text("")


@dataclasses.dataclass(frozen=True)
class Searching(Counted):
    """Chooses to do nothing, once from a plan."""

    plan: ClassVar[Plan] = Plan()

    def run(self, program: Program, context: Context) -> Program:
        context.candidates.append(Candidate("first", self, self.name, program.clone(), 0.5, None, 1, 1.0, chosen=True))
        return super().run(program, context)

    def planned(self, file: Path) -> Pass:
        return self


@functools.cache
def traced() -> Program:
    return lobo_fx.trace(network(), DATA[:2])


def compiled(folder: Path | None, *passes: Pass, model: nn.Module | None = None, **settings: Any) -> Any:
    given: dict[str, Any] = {"calibration_data": [DATA], "progress": False, **settings}
    program = traced() if model is None else lobo_fx.trace(model, DATA[:2])
    return lobo_fx.compile(program, passes, workdir=folder, **given)


@pytest.fixture(autouse=True)
def _none_ran() -> None:
    RECORD.runs = []  # type: ignore[attr-defined]


def loss_until_ctrl_c(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    RECORD.losses += 1  # type: ignore[attr-defined]
    if RECORD.losses == RECORD.ctrl_c:
        raise KeyboardInterrupt
    return nn.functional.cross_entropy(outputs, labels)


def test_a_training_that_was_interrupted_leaves_no_state_as_if_it_were_done(tmp_path: Path) -> None:
    labelled = [(DATA[:8], torch.arange(8) % 5), (DATA[8:16], torch.arange(8) % 5)]

    def trained(name: str, ctrl_c: int = 0) -> Any:
        RECORD.losses, RECORD.ctrl_c = 0, ctrl_c  # type: ignore[attr-defined]
        training = [FineTune(epochs=2, learning_rate=1e-2, checkpoint_dir=tmp_path / name / part) for part in "ab"]
        chosen = (Counted(), training[0], PruneWeights(0.5), training[1])
        return compiled(tmp_path / f"{name} work", *chosen, train_data=labelled, loss_fn=loss_until_ctrl_c)

    whole = trained("whole")
    told = "\n".join(map(str, trained("broken", 3).report.notes))
    assert "Stopped early: interrupted" in told
    assert "fine_tune was interrupted, so that from there on no state is kept" in told
    assert "writes no checkpoints, since fine_tune was interrupted" in told
    found = trained("broken")
    assert any("went on after counted" in str(note) for note in found.report.notes)
    torch.testing.assert_close(found.module(DATA), whole.module(DATA), rtol=0, atol=0)
    assert RECORD.losses == 2 + 4  # the first training went on from its checkpoint


def test_an_interrupted_compilation_goes_on_after_its_last_whole_pass(tmp_path: Path) -> None:
    first = (PruneChannels(0.5, round_to=1), PruneWeights(0.5), Counted())
    with pytest.raises(ContractError, match="the power went out"):
        compiled(tmp_path / "work", *first, Counted(fails=True), model=network())
    found = compiled(tmp_path / "work", *first, QuantizeStatic(kernels="all"), model=network())
    whole = compiled(None, *first, QuantizeStatic(kernels="all"))
    assert RECORD.runs == [False, True, False]  # the first run, its failure, and the one without a folder
    torch.testing.assert_close(found.module(DATA), whole.module(DATA), rtol=0, atol=0)
    assert [row.name for row in found.report.rows] == [row.name for row in whole.report.rows]
    assert [row.parameters for row in found.report.rows] == [row.parameters for row in whole.report.rows]
    told = [str(note) for note in found.report.notes]
    assert any("went on after counted" in note for note in told)
    assert {str(note) for note in whole.report.notes} <= set(told)
    assert found.kept_indices == whole.kept_indices
    assert found.passes == whole.passes


def test_what_a_state_depends_on_is_part_of_its_name(tmp_path: Path) -> None:
    compiled(tmp_path, Counted())
    compiled(tmp_path, Counted())
    assert len(RECORD.runs) == 1
    others: list[dict[str, Any]] = [{"model": network(1)}, {"seed": 7}, {"calibration_data": [DATA[:16]]}]
    for number, changed in enumerate(others):
        compiled(tmp_path, Counted(), **changed)
        assert len(RECORD.runs) == 2 + number, changed


def test_other_settings_of_an_earlier_pass_run_all_that_follow(tmp_path: Path) -> None:
    compiled(tmp_path, PruneWeights(0.5), Counted())
    compiled(tmp_path, PruneWeights(0.25), Counted())
    assert len(RECORD.runs) == 2


def test_a_pass_whose_code_changed_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a pass of one's own its module counts; of lobo-fx's the whole package, for it may call any module there."""

    def compiled_with(width: int) -> int:
        (tmp_path / "a_pass_of_mine.py").write_text(
            f"from tests.test_workdir import Counted\nclass Mine(Counted): {width}\n"
        )
        sys.modules.pop("a_pass_of_mine", None)
        mine = importlib.import_module("a_pass_of_mine").Mine
        importlib.invalidate_caches()
        compiled(tmp_path / "work", mine())
        return len(RECORD.runs)

    monkeypatch.syspath_prepend(tmp_path)
    assert [compiled_with(1), compiled_with(1), compiled_with(2)] == [1, 1, 2]


def test_the_code_of_lobo_fx_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("lobo_fx.made_up")
    package.__path__ = [str(tmp_path)]
    module = types.ModuleType("lobo_fx.made_up.inner")
    for each in (package, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)

    def function() -> None: ...

    function.__module__ = module.__name__

    def checksum() -> str:
        return checksums.checksum_of_code(function)

    found = [checksum(), checksums.checksum_of_code(functools.partial(function))]
    (tmp_path / "another.py").write_text("x = 1")
    found.append(checksum())
    (tmp_path / "another.py").write_text("x = 2")
    found.append(checksum())
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert checksums.checksum_of_code(len) == checksums.checksum_of_code(sorted)  # built in: no file


def test_programs_are_told_apart_by_tensors_that_are_in_no_state_dict() -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = torch.full((3,), factor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    found = [
        checksums.checksum_of_program(lobo_fx.trace(Scaled(factor), torch.rand(2, 3))) for factor in (1.0, 2.0, 1.0)
    ]
    assert found[0] == found[2] != found[1]


def test_what_is_not_known_leaves_no_state(tmp_path: Path) -> None:
    lock = threading.Lock()

    def score(module: nn.Module) -> float:
        with lock:
            return 1.0

    for _ in range(2):
        result = compiled(tmp_path, Counted(), evaluate=score)
    assert len(RECORD.runs) == 2
    assert any("no state is kept" in str(note) for note in result.report.notes)


def test_branches_are_part_of_a_program() -> None:
    class Branches(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x * self.factor, lambda x: x + 1, (x,))  # type: ignore[no-any-return]

    found = [checksums.checksum_of_program(lobo_fx.trace(Branches(f), torch.rand(2, 3))) for f in (2.0, 3.0, 2.0)]
    assert found[0] == found[2] != found[1]


def test_scores_and_example_inputs_are_part_of_a_state(tmp_path: Path) -> None:
    for higher in (True, False):
        result = compiled(tmp_path, Counted(), evaluate=lambda module: 1.0, higher_is_better=higher)
        assert result.report.rows[-1].score == (1.0 if higher else -1.0)
    assert len(RECORD.runs) == 2
    lobo_fx.compile(network(), [Counted()], example_inputs=DATA[2:4], workdir=tmp_path, progress=False)
    lobo_fx.compile(network(), [Counted()], example_inputs=DATA[4:8], workdir=tmp_path, progress=False)
    assert len(RECORD.runs) == 4


def test_a_damaged_state_is_left_aside(tmp_path: Path) -> None:
    compiled(tmp_path, PruneWeights(0.5), Counted())
    (state,) = tmp_path.glob("counted-*")
    (archive,) = state.glob("*.pt2")
    archive.write_bytes(archive.read_bytes()[:-40])
    result = compiled(tmp_path, PruneWeights(0.5), Counted())
    assert len(RECORD.runs) == 2
    assert any("is of no use" in str(note) for note in result.report.notes)


def test_the_choice_of_a_search_starts_from_what_an_earlier_result_held(tmp_path: Path) -> None:
    earlier = compiled(None, PruneWeights(0.5))
    for _ in range(2):
        found = lobo_fx.compile(earlier, [Searching()], workdir=tmp_path, calibration_data=[DATA], progress=False)
    assert RECORD.runs == [False]
    (choice,) = found.front
    assert choice.candidate.bytes == found.report.rows[-1].bytes
    again = choice.compile()
    assert RECORD.runs == [False, False]
    assert [row.name for row in again.report.rows] == [row.name for row in found.report.rows]
    torch.testing.assert_close(again.module(DATA), earlier.module(DATA), rtol=0, atol=0)


def test_a_search_whose_start_is_gone_is_not_repeated(tmp_path: Path) -> None:
    compiled(tmp_path, PruneWeights(0.5), Searching())
    (state,) = tmp_path.glob("prune_weights-*")
    shutil.rmtree(state)
    found = compiled(tmp_path, PruneWeights(0.5), Searching())
    assert RECORD.runs == [False]
    assert found.front == []
    assert any("can't be compiled again" in str(note) for note in found.report.notes)


def test_a_folder_that_can_not_be_made_is_refused_before_any_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="is a file"):
        compiled(tmp_path / "file" / "work", Counted())
    assert not RECORD.runs


@pytest.mark.slow
def test_processes_that_work_in_one_folder_at_once_give_the_same(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import torch
            from torch import nn

            import lobo_fx
            from lobo_fx.passes import FineTune, PruneChannels, QuantizeWeights

            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
            data = [torch.randn(16, 6) for _ in range(2)]
            passes = [PruneChannels(0.25, importance="second_order"), QuantizeWeights("int8", method="gptq")]
            result = lobo_fx.compile(
                model, passes, example_inputs=data[0][:2], calibration_data=data, workdir={str(tmp_path / "work")!r}
            )
            print(result.module(data[0]).sum().item())
        """),
        encoding="utf-8",
    )
    running = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate()[0].splitlines()[-1:] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert told[0] == told[1] == told[2] != []
