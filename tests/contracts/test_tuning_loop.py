"""The loop that tunes: what is kept, on top of what, and what is taken back, with times that are made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lobo_fx.contracts.tuning import LEAST_GAIN, Tuned, read_tuning, tune
from lobo_fx.errors import ExportError, InvalidInput
from lobo_fx.exporters.onnx.exporter import OnnxExporter
from lobo_fx.measures.in_turn import Comparison, Stand
from lobo_fx.plugins.protocols import ArraySpec
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.plugins.tuning import Choice, TunesFiles, Tuning


@dataclasses.dataclass(frozen=True)
class Made:
    """A choice that multiplies the time of a file."""

    name: str
    times: float
    kind: str = ""
    remark: str = ""


@dataclasses.dataclass
class MadeUp:
    """A runtime whose files are lists of choices."""

    offered: list[Made]
    inputs: Sequence[ArraySpec] = ()

    def choices(self, threads: Sequence[int]) -> list[Made]:
        counts = [Made(f"{count} threads", 0.5) for count in threads]
        return [dataclasses.replace(one, kind=one.kind or one.name) for one in [*self.offered, *counts]]

    def write_tuned(self, path: Path, choices: Sequence[Choice], target: Path, threads: int | None) -> None:
        if any(choice.name == "unfit" for choice in choices):
            raise ExportError("does not fit\nand more lines")
        target.write_text("\n".join(choice.name for choice in choices if choice.name != "nothing"))

    def load(self, path: Path, threads: int | None) -> Any:
        raise NotImplementedError

    def options_of(self, path: Path) -> str:
        return ""


class Elsewhere:
    def __init__(self, *given: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *given: Any) -> None: ...


def tuned(
    offered: list[Made],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: float = 0.0,
    together: float = 1.0,
    disagree: str = "-",
    threads: tuple[int, ...] = (),
) -> Tuned:
    """Tunes with times that are products; the last measurement finds them `together` times as long."""
    runtime, times = MadeUp(offered), {one.name: one.times for one in offered} | {"2 threads": 0.5}
    measured: list[int] = []

    def compare(self: Stand, before: Path, after: Path, rounds: int, limit: float = 0.0) -> Comparison:
        measured.append(rounds)
        one, other = (
            math.prod(times[name] for name in path.read_text().split("\n") if name) for path in (before, after)
        )
        if before == after:
            return Comparison((1.0, 1 - noise, 1 + noise))
        return Comparison((other / one * (together if before.parent.name == "untuned" and not limit else 1),))

    def check(path: Path, session: object) -> tuple[float, dict[str, Any]]:
        if disagree in path.read_text():
            raise ExportError("it disagrees")
        return 1e-6, {"checked": path.read_text().split("\n")}

    monkeypatch.setattr(Stand, "compare", compare)
    monkeypatch.setattr("lobo_fx.contracts.tuning.session_apart", Elsewhere)
    path = folder / "model.file"
    path.write_text("")
    (folder / "trials").mkdir()
    assert isinstance(runtime, TunesFiles)
    found = tune(path, Tuning(threads), runtime, {}, check, folder / "trials", progress=False)
    assert path.read_text() == ""
    return found


def test_what_is_faster_is_kept_on_top_of_what_was_kept_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [Made("a", 0.9, remark="a only"), Made("b", 1.1), Made("nothing", 1.0), Made("c", 0.99), Made("d", 0.5)]
    found = tuned(offered, tmp_path, monkeypatch)
    assert [choice.name for choice in found.kept] == ["a", "d"]
    assert found.ratio == pytest.approx(0.45)
    assert [(trial.name, trial.kept) for trial in found.trials] == [
        ("a", True),
        ("b", False),
        ("c", False),
        ("d", True),
    ]
    assert [trial.ratio for trial in found.trials] == pytest.approx([0.9, 1.1, 0.99, 0.5])
    assert found.path is not None
    assert found.path.read_text() == "a\nd"
    assert (found.parity, found.details) == (1e-6, {"checked": ["a", "d"]})
    assert str(found) == (
        "it takes 0.45 times as long as untuned; kept: a (0.90), d (0.50); a only; "
        "tried and not kept: b (1.10), c (0.99)"
    )


def test_of_one_kind_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [Made("a", 0.9, "level"), Made("other", 0.9), Made("b", 0.8, "level"), Made("c", 0.95, "level")]
    found = tuned(offered, tmp_path, monkeypatch)
    assert [choice.name for choice in found.kept] == ["b", "other"]
    assert [(t.name, t.reason) for t in found.trials if not t.kept] == [("a", "b is faster"), ("c", "")]
    assert found.path is not None
    assert sorted(found.path.read_text().split("\n")) == ["b", "other"]


def test_what_fails_or_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned([Made("unfit", 0.1), Made("wrong", 0.5), Made("a", 0.9)], tmp_path, monkeypatch, disagree="wrong")
    assert [choice.name for choice in found.kept] == ["a"]
    assert [(t.ratio, t.reason) for t in found.trials[:2]] == [(None, "does not fit"), (0.5, "it disagrees")]


def test_all_is_taken_back_where_it_is_not_faster_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuned([Made("a", 0.9)], tmp_path, monkeypatch, together=1.1)
    assert (found.path, found.kept) == (None, ())
    assert found.ratio == pytest.approx(0.99)
    assert [(trial.kept, trial.reason) for trial in found.trials] == [(False, "not faster when measured once more")]
    assert "saves 2.0% of its time or more (what did alone takes 0.99 times as long together)" in str(found)


@pytest.mark.parametrize(("noise", "kept"), [(0.0, ["a"]), (0.04, ["a"]), (0.06, [])])
def test_a_choice_must_beat_what_copies_of_one_file_differ_by(
    noise: float, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tuned([Made("a", 0.95), Made("b", 1 - LEAST_GAIN / 2)], tmp_path, monkeypatch, noise)
    assert [choice.name for choice in found.kept] == kept
    assert found.noise == pytest.approx(noise)
    assert found.least_gain == max(LEAST_GAIN, found.noise)


def test_further_counts_of_threads_are_choices_only_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [choice.name for choice in tuned([], tmp_path, monkeypatch, threads=(1, 2)).kept] == ["2 threads"]


def test_one_thread_alone_offers_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned([], tmp_path, monkeypatch).trials == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("threads", counts) for counts in (2, (0,), (1, 1), (True,), [1])),
        ("batch", 0),
        ("batch", 1.5),
        ("runtime", 3),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=f"^{name} (is|holds) .*; it must be"):
        Tuning(**{name: value})


def test_what_can_not_be_tuned_is_refused() -> None:
    class Plain:
        suffix = ".plain"

        def export(self, *given: Any) -> Any: ...

    class Runs:
        version = "runs 1"

        def load(self, path: Path, threads: int) -> Any: ...

    assert read_tuning(False, Plain()) is None
    assert read_tuning(True, OnnxExporter()) == Tuning()
    with pytest.raises(InvalidInput, match=r"tune is 3; it must be True, False, or lobo_fx.Tuning"):
        read_tuning(3, OnnxExporter())  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="the exporter Plain can't check a tuned file"):
        read_tuning(True, Plain())
    with pytest.raises(InvalidInput, match="no runtime is called 'onnxruntim'; did you mean onnxruntime"):
        read_tuning(Tuning(runtime="onnxruntim"), OnnxExporter())
    RUNTIMES.register("runs", Runs)
    try:
        with pytest.raises(InvalidInput, match="the runtime 'runs' offers nothing to tune"):
            read_tuning(Tuning(runtime="runs"), OnnxExporter())
    finally:
        RUNTIMES.unregister("runs")
