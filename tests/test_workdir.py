"""Compilations that go on where an earlier one was interrupted."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lobo_fx
from lobo_fx import ContractError, InvalidInput, checksums
from lobo_fx.contracts.context import Context
from lobo_fx.contracts.passbase import Pass, Promise
from lobo_fx.graph.program import Program
from lobo_fx.passes import PruneChannels, PruneWeights, QuantizeStatic

DATA = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5)).eval()


@dataclasses.dataclass(frozen=True)
class Counted(Pass):
    """Changes nothing; fails where it is told to."""

    fails: bool = False
    runs: ClassVar[list[bool]] = []
    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, program: Program, context: Context) -> Program:
        self.runs.append(self.fails)
        if self.fails:
            raise RuntimeError("the power went out")
        context.note("was here")
        return program


@functools.cache
def traced() -> Program:
    return lobo_fx.trace(network(), DATA[:2])


def compiled(folder: Path | None, *passes: Pass, model: nn.Module | None = None, **settings: Any) -> Any:
    given: dict[str, Any] = {"calibration_data": [DATA], "progress": False, **settings}
    program = traced() if model is None else lobo_fx.trace(model, DATA[:2])
    return lobo_fx.compile(program, passes, workdir=folder, **given)


@pytest.fixture(autouse=True)
def _none_ran() -> None:
    Counted.runs.clear()


def test_an_interrupted_compilation_goes_on_after_its_last_whole_pass(tmp_path: Path) -> None:
    first = (PruneChannels(0.5, round_to=1), PruneWeights(0.5), Counted())
    with pytest.raises(ContractError, match="the power went out"):
        compiled(tmp_path / "work", *first, Counted(fails=True), model=network())
    found = compiled(tmp_path / "work", *first, QuantizeStatic(kernels="all"), model=network())
    whole = compiled(None, *first, QuantizeStatic(kernels="all"))
    assert Counted.runs == [False, True, False]  # the first run, its failure, and the one without a folder
    torch.testing.assert_close(found.module(DATA), whole.module(DATA), rtol=0, atol=0)
    assert [row.name for row in found.report.rows] == [row.name for row in whole.report.rows]
    assert [row.parameters for row in found.report.rows] == [row.parameters for row in whole.report.rows]
    told = [str(note) for note in found.report.notes]
    assert any("went on after counted" in note for note in told)
    assert {str(note) for note in whole.report.notes} <= set(told)
    assert found.kept_indices == whole.kept_indices
    assert found.passes == whole.passes


@pytest.mark.parametrize(
    "changed",
    [
        {"model": network(1)},
        {"seed": 7},
        {"calibration_data": [DATA[:16]]},
    ],
)
def test_what_a_state_depends_on_is_part_of_its_name(tmp_path: Path, changed: dict[str, Any]) -> None:
    compiled(tmp_path, Counted())
    compiled(tmp_path, Counted())
    assert len(Counted.runs) == 1
    compiled(tmp_path, Counted(), **changed)
    assert len(Counted.runs) == 2


def test_other_settings_of_an_earlier_pass_run_all_that_follow(tmp_path: Path) -> None:
    compiled(tmp_path, PruneWeights(0.5), Counted())
    compiled(tmp_path, PruneWeights(0.25), Counted())
    assert len(Counted.runs) == 2


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
        return len(Counted.runs)

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


def test_data_are_told_apart_by_all_that_they_hold() -> None:
    given: list[Any] = [
        [(DATA, 1)],
        [(DATA, 2)],
        [(DATA, 2.0)],
        [(DATA, "2")],
        [{"x": DATA, "y": 1}],
        [{"x": DATA, "z": 1}],
    ]
    found = [checksums.checksum_of_data(data) for data in given]
    assert len(set(found)) == len(given)
    assert checksums.checksum_of_data([(DATA.clone(), 1)]) == found[0]
    assert checksums.checksum_of_data([(DATA, object())]) == ""  # of which nothing is known


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


def losses() -> list[Any]:
    """Pairs that have one name each."""

    def closed_over(factor: float) -> Any:
        return lambda outputs, labels: factor * functional.cross_entropy(outputs, labels)

    def weighted(seed: int) -> Any:
        weights = torch.rand(5_000, generator=torch.Generator().manual_seed(seed))
        return functools.partial(functional.cross_entropy, weight=weights)

    class Loss:
        def __init__(self, smoothing: float) -> None:
            self.smoothing = smoothing

        def __call__(self, outputs: Any, labels: Any) -> Any: ...

        def method(self, outputs: Any, labels: Any) -> Any: ...

    def of_a_class(factor: float) -> Any:
        class Scaled:
            def __call__(self, outputs: Any, labels: Any) -> Any:
                return factor * functional.cross_entropy(outputs, labels)

        class Inherited(Scaled): ...

        return Inherited()

    return [
        (of_a_class(1.0), of_a_class(2.0)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)),
        (closed_over(1.0), closed_over(2.0)),
        (lambda outputs, labels: outputs.mean(), lambda outputs, labels: outputs.sum()),
        (lambda outputs, labels: outputs[..., 0], lambda outputs, labels: outputs[..., 1]),
        (weighted(0), weighted(1)),
        (Loss(0.1), Loss(0.2)),
        (Loss(0.1).method, Loss(0.2).method),
        (network(0), network(1)),
        ({"temperature": 2.0}, {"temperature": 2}),
        (np.arange(3), np.arange(3) + 1),
        ([(DATA, [])], [(DATA,)]),
        ([DATA], (DATA,)),
    ]


@pytest.mark.parametrize("pair", losses(), ids=lambda pair: type(pair[0]).__name__)
def test_values_of_one_name_are_told_apart_by_what_they_hold(pair: tuple[Any, Any]) -> None:
    first, second = map(checksums.checksum_of, pair)
    assert first
    assert second
    assert first != second
    assert checksums.checksum_of(copy.deepcopy(pair[0])) == first


def test_a_name_that_is_not_bound_is_no_error() -> None:
    def outer(bind: bool) -> Any:
        if bind:
            factor = 2.0
        return lambda outputs, labels: factor * outputs

    assert "" != checksums.checksum_of(outer(True)) != checksums.checksum_of(outer(False)) != ""


def test_objects_in_a_circle_are_told_apart() -> None:
    class Trainer:
        def __init__(self, rate: float) -> None:
            self.rate, self.itself, self.callbacks = rate, self, [Callback(self)]

    class Callback:
        def __init__(self, trainer: Trainer) -> None:
            self.trainer, self.stop = trainer, trainer.__init__  # type: ignore[misc]

    found = [checksums.checksum_of(Trainer(rate)) for rate in (0.1, 0.2, 0.1)]
    assert "" not in found
    assert found[0] == found[2] != found[1]


def test_what_is_not_known_has_no_checksum_and_leaves_no_state(tmp_path: Path) -> None:
    for unknown in (object(), torch.eye(2).to_sparse(), threading.Lock()):
        assert checksums.checksum_of(unknown) == ""
    lock = threading.Lock()

    def score(module: nn.Module) -> float:
        with lock:
            return 1.0

    for _ in range(2):
        result = compiled(tmp_path, Counted(), evaluate=score)
    assert len(Counted.runs) == 2
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
    assert len(Counted.runs) == 2
    lobo_fx.compile(network(), [Counted()], example_inputs=DATA[2:4], workdir=tmp_path, progress=False)
    lobo_fx.compile(network(), [Counted()], example_inputs=DATA[4:8], workdir=tmp_path, progress=False)
    assert len(Counted.runs) == 4


def test_a_damaged_state_is_left_aside(tmp_path: Path) -> None:
    compiled(tmp_path, PruneWeights(0.5), Counted())
    (state,) = tmp_path.glob("counted-*")
    (archive,) = state.glob("*.pt2")
    archive.write_bytes(archive.read_bytes()[:-40])
    result = compiled(tmp_path, PruneWeights(0.5), Counted())
    assert len(Counted.runs) == 2
    assert any("is of no use" in str(note) for note in result.report.notes)


def test_a_folder_that_can_not_be_made_is_refused_before_any_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="is a file"):
        compiled(tmp_path / "file" / "work", Counted())
    assert not Counted.runs
