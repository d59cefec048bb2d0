"""Progress: every item once, whatever is known of their number, and silence where it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rich.console
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lobo_fx
from lobo_fx.terminal.progress import no_progress, track


@pytest.fixture
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    monkeypatch.setattr("lobo_fx.terminal.progress.sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("TERM", "xterm")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class NoLength(list[int]):
    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize(
    "items",
    [
        [0, 1, 2, 3, 4],
        range(5),
        (i for i in range(5)),
        Stream(),
        DataLoader(Stream(), batch_size=None),
        NoLength(range(5)),
    ],
    ids=["list", "range", "generator", "stream", "loader", "no length"],
)
def test_every_item_comes_once(items: Iterable[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert [int(item) for item in track(items, "count")] == list(range(5))
    assert "count" in capsys.readouterr().err


@pytest.mark.usefixtures("_terminal")
def test_a_result_is_as_silent_as_it_was_asked_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = lobo_fx.compile(nn.Linear(4, 2), example_inputs=torch.ones(2, 4), progress=False)
    for show in (False, True):
        result.progress = show
        capsys.readouterr()
        result.export(tmp_path / "model.onnx")
        result.benchmark(rounds=1, warmup=0, memory=False)
        shown = capsys.readouterr().err
        assert ("export" in shown, "benchmark" in shown) == (show, show)


@pytest.mark.usefixtures("_terminal")
def test_nothing_is_drawn_while_silence_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with no_progress():
        assert list(track([1, 2], "count")) == [1, 2]
    assert capsys.readouterr().err == ""
    assert list(track([1, 2], "count")) == [1, 2]
    assert "count" in capsys.readouterr().err


def test_a_log_is_no_terminal_even_where_colors_are_forced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2], "count")) == [1, 2]
    assert capsys.readouterr().err == ""
