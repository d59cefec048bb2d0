"""Checkpoints: what they hold comes back, what they belong to is checked, and a full disk ends no training."""

from __future__ import annotations

import errno
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lobo_fx
from lobo_fx.capture.tracing import trace
from lobo_fx.contracts.passbase import Pass
from lobo_fx.errors import InvalidInput
from lobo_fx.graph.program import Program
from lobo_fx.passes import Distill, FineTune
from lobo_fx.passes.training.checkpoint import CHECKPOINT_FILE, Checkpoint, Identity
from lobo_fx.result import Result

DATA = [(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)]


def network(seed: int = 0, width: int = 16, names: tuple[str, str] = ("first", "second")) -> nn.Module:
    torch.manual_seed(seed)
    layers = {names[0]: nn.Linear(6, width), "act": nn.Tanh(), names[1]: nn.Linear(width, 3)}
    made = nn.Sequential()
    for name, layer in layers.items():
        made.add_module(name, layer)
    return made.eval()


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(network(), torch.randn(2, 6))


def tuned(program: Program, folder: Path, pass_: type[Pass] = FineTune, **settings: Any) -> Result:
    made = pass_(**{"epochs": 2, "learning_rate": 1e-2, "checkpoint_dir": folder} | settings)
    return lobo_fx.compile(program, [made], train_data=DATA, loss_fn=cross_entropy, progress=False)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    module = network()
    identity = Identity.of("P()", module, {"loss_fn": "abc"}, scored=True)
    shared = torch.randn(3, 4)
    state: dict[str, Any] = {
        "weights": {"a": shared, "b": shared, "view": shared[1:], "turned": shared.T},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "best": None,
        "half": torch.tensor([1, 2], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
    }
    Checkpoint(identity, {"batches": 7, "losses": [0.1, float("inf")]}, state).write(tmp_path)
    found = Checkpoint.read(tmp_path, identity)
    assert found is not None
    assert found.progress == {"batches": 7, "losses": [0.1, float("inf")]}
    assert found.state["optimizer"]["groups"] == [{"lr": 0.1, "betas": [0.9, 0.99]}]
    assert list(found.state["optimizer"]["state"]) == [0, 1]
    assert found.state["best"] is None
    for name, value in state["weights"].items():
        assert torch.equal(found.state["weights"][name], value)
    assert found.state["half"].dtype == torch.bfloat16
    assert torch.equal(found.state["mask"], state["mask"])
    assert Checkpoint.read(tmp_path / "none", identity) is None
    first = sorted(file.name for file in tmp_path.iterdir())
    Checkpoint(identity, {}, {"weights": torch.zeros(2)}).write(tmp_path)
    second = sorted(file.name for file in tmp_path.iterdir())
    assert len(first) == len(second) == 2  # the older file of tensors is gone
    assert first != second


@pytest.mark.parametrize(
    ("pass_", "settings", "model", "words"),
    [
        (FineTune, {"epochs": 3}, {}, "is one of FineTune.*not of FineTune"),
        (Distill, {}, {}, "is one of FineTune.*not of Distill"),
        (FineTune, {}, {"width": 17}, "another model: 'module.first.bias' is|another model: 'module.first.weight' is"),
        (FineTune, {}, {"names": ("first", "third")}, "another model: only one of both has 'module.second.bias'"),
        (FineTune, {}, {"seed": 1}, "started from other weights: 'module.first.weight' had the norm"),
    ],
    ids=["settings", "pass", "width", "names", "weights"],
)
def test_what_belongs_to_something_else_is_refused(
    program: Program, tmp_path: Path, pass_: type[Pass], settings: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    tuned(program, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = trace(network(**model), torch.randn(2, 6)) if model else program
    with pytest.raises(InvalidInput, match=words):
        tuned(other, tmp_path, pass_, **settings)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _without(record: dict[str, Any], *path: str) -> None:
    for name in path[:-1]:
        record = record[name]
    del record[path[-1]]


def _state_without(record: dict[str, Any], name: str) -> None:
    record["state"]["dict"] = [entry for entry in record["state"]["dict"] if entry[0] != name]


DAMAGE: dict[str, Any] = {
    "format": lambda record: record.update(format=9),
    "identity": lambda record: _without(record, "identity"),
    "norms": lambda record: _without(record, "identity", "norms"),
    "progress": lambda record: _without(record, "progress"),
    "a number": lambda record: record["progress"].update(unknown=1),
    "tensors": lambda record: _without(record, "tensors"),
    "another file": lambda record: record.update(tensors="../../weights.0123456789abcdef.safetensors"),
    "state": lambda record: _without(record, "state"),
    "a list for the state": lambda record: record.update(state=[]),
    "a tensor that is not there": lambda record: record["state"]["dict"].__setitem__(3, ["best", {"tensor": "999"}]),
    **{
        name: functools.partial(_state_without, name=name)
        for name in ("weights", "optimizer", "schedule", "best", "gradients")
    },
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_refused(program: Program, tmp_path: Path, name: str) -> None:
    tuned(program, tmp_path)
    file = tmp_path / CHECKPOINT_FILE
    record = json.loads(file.read_text())
    DAMAGE[name](record)
    file.write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match=r"damaged|has format 9|no file"):
        tuned(program, tmp_path)


def test_files_cut_short_are_refused(program: Program, tmp_path: Path) -> None:
    tuned(program, tmp_path)
    (tensors,) = tmp_path.glob("*.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-4])
    with pytest.raises(InvalidInput, match="damaged or was replaced"):
        tuned(program, tmp_path)
    tensors.unlink()
    with pytest.raises(InvalidInput, match="no file"):
        tuned(program, tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_text('{"format": 1')
    with pytest.raises(InvalidInput, match="no JSON file"):
        tuned(program, tmp_path)


@pytest.mark.parametrize("which", ["tensors", "record", "move"])
def test_training_goes_on_where_the_disk_is_full(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    whole = tuned(program, tmp_path / "whole").module.state_dict()

    def full(*arguments: Any, **named: Any) -> None:
        if which == "tensors":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    if which == "record":
        monkeypatch.setattr(Path, "write_text", full)
    else:
        monkeypatch.setattr(*{"tensors": ("safetensors.torch.save_file",), "move": ("os.replace",)}[which], full)
    result = tuned(program, tmp_path / "full")
    notes = [note.reason for note in result.report.notes if "No space left on device" in note.reason]
    assert len(notes) == 1
    assert notes[0].startswith("a checkpoint could not be written, training went on")
    assert list((tmp_path / "full").iterdir()) == []
    assert all(torch.equal(whole[name], value) for name, value in result.module.state_dict().items())


def test_a_folder_that_can_not_be_is_refused_before_work(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="file"):
        tuned(program, tmp_path / "file", epochs=10**9)


def test_no_pickle_is_written_or_read(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a pickle")

    for name in ("torch.save", "torch.load", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps"):
        monkeypatch.setattr(name, refused)
    first = tuned(program, tmp_path).module.state_dict()
    (tensors,) = (file for file in tmp_path.iterdir() if file.name != CHECKPOINT_FILE)
    assert json.loads((tmp_path / CHECKPOINT_FILE).read_text())["tensors"] == tensors.name
    assert safetensors.torch.load(tensors.read_bytes())
    again = tuned(program, tmp_path)
    assert any("6 batches are of an earlier run" in note.reason for note in again.report.notes)
    assert all(torch.equal(first[name], value) for name, value in again.module.state_dict().items())


# --- what the user gave ----------------------------------------------------------------------------------


def negative(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -cross_entropy(outputs, labels)


def compiled(program: Program, pass_: Pass, **given: Any) -> Result:
    settings: dict[str, Any] = {"train_data": DATA, "loss_fn": cross_entropy, "progress": False} | given
    return lobo_fx.compile(program, [pass_], **settings)


def test_a_finished_training_is_not_that_of_other_data_loss_or_teacher(program: Program, tmp_path: Path) -> None:
    def tune(folder: str) -> FineTune:
        return FineTune(epochs=1, learning_rate=1e-2, checkpoint_dir=tmp_path / folder)

    first = compiled(program, tune("same"))
    again = compiled(program, tune("same"))
    for name, weight in first.module.state_dict().items():
        assert torch.equal(weight, again.module.state_dict()[name])
    others = [(x, (y + 1) % 3) for x, y in DATA]
    with pytest.raises(InvalidInput, match="of a training that ended, with another train_data; give another"):
        compiled(program, tune("same"), train_data=others)
    with pytest.raises(InvalidInput, match="of a training that ended, with another loss_fn"):
        compiled(program, tune("same"), loss_fn=negative)
    distill = functools.partial(Distill, epochs=1, learning_rate=1e-2, checkpoint_dir=tmp_path / "taught")
    compiled(program, distill(teacher=network(5)), loss_fn=None)
    with pytest.raises(InvalidInput, match="of a training that ended, with another teacher"):
        compiled(program, distill(teacher=network(6)), loss_fn=None)


def test_training_that_goes_on_with_another_loss_says_so(program: Program, tmp_path: Path) -> None:
    calls: list[int] = []

    def fails_later(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        if len(calls) > len(DATA) + 1:
            raise RuntimeError("cut off")
        return cross_entropy(outputs, labels)

    tune = FineTune(epochs=2, learning_rate=1e-2, checkpoint_dir=tmp_path)
    with pytest.raises(InvalidInput, match="cut off"):
        compiled(program, tune, loss_fn=fails_later)
    notes = compiled(program, tune).report.notes
    assert any("was made with another loss_fn; training went on from it" in note for note in notes)


@pytest.mark.parametrize("scored_first", [True, False])
def test_scored_and_unscored_trainings_are_not_mixed(scored_first: bool, program: Program, tmp_path: Path) -> None:
    tune = FineTune(epochs=1, learning_rate=1e-2, checkpoint_dir=tmp_path)
    score = {"evaluate": lambda module: 1.0}
    compiled(program, tune, **(score if scored_first else {}))
    with pytest.raises(InvalidInput, match=f"is of a training {'with' if scored_first else 'without'} evaluate"):
        compiled(program, tune, **({} if scored_first else score))


@pytest.mark.parametrize(
    ("name", "value"), [("batches", "x"), ("losses", 5), ("seconds", "a"), ("batches", -5), ("best", 9)]
)
def test_a_record_that_no_training_can_have_is_damaged(name: str, value: Any, program: Program, tmp_path: Path) -> None:
    tune = FineTune(epochs=1, learning_rate=1e-2, checkpoint_dir=tmp_path)
    compiled(program, tune)
    file = tmp_path / CHECKPOINT_FILE
    record = json.loads(file.read_text())
    record["progress"] |= {"done": False, name: value}
    file.write_text(json.dumps(record))
    with pytest.raises(InvalidInput, match=f"is damaged .*{name} (is )?{value}|{name} is {value!r}"):
        compiled(program, tune)


def test_an_optimizer_that_json_can_not_hold_trains_without_a_checkpoint(program: Program, tmp_path: Path) -> None:
    class Typed(torch.optim.SGD):
        def __init__(self, groups: Any, lr: float) -> None:
            super().__init__(groups, lr=lr)
            self.param_groups[0]["dtype"] = torch.float32

    tune = FineTune(epochs=1, learning_rate=1e-2, optimizer=Typed, checkpoint_dir=tmp_path)
    notes = compiled(program, tune).report.notes
    assert any("a checkpoint could not be written, training went on" in note for note in notes)
