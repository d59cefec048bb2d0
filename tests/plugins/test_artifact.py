"""Files are written whole or not at all, and nothing of an older one is left beside them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_folder, make_folder, write_files, written_beside


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write(path: Path, *suffixes: str) -> None:
    with written_beside(path) as draft:
        for suffix in ("", *suffixes):
            (draft / f"{path.name}{suffix}").write_text(f"new{suffix}")


def test_weights_that_the_older_file_kept_apart_go_with_it(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", ".data")
    (tmp_path / "other.onnx.data").touch()
    assert names(tmp_path) == ["model.onnx", "model.onnx.data", "other.onnx.data"]
    write(tmp_path / "model.onnx", ".data")
    assert (tmp_path / "model.onnx.data").read_text() == "new.data"
    write(tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx", "other.onnx.data"]


def test_data_without_an_older_file_is_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").touch()
    write(tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("broken")])
def test_a_failure_leaves_the_older_files(error: Exception, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", ".data")
    expected = InvalidInput if isinstance(error, OSError) else RuntimeError

    def fail() -> None:
        with written_beside(tmp_path / "model.onnx") as draft:
            (draft / "model.onnx").write_text("half")
            raise error

    with pytest.raises(expected, match=str(error)):
        fail()
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").read_text() == "new"


def test_a_place_that_can_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="does not exist; create it first"):
        write(tmp_path / "missing" / "model.onnx")
    with pytest.raises(InvalidInput, match="is a folder"):
        write(tmp_path)

    def read_only(*args: Any, **kwargs: Any) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(InvalidInput, match=r"can't write .*model\.onnx: Read-only file system"):
        write(tmp_path / "model.onnx")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux")
def test_the_folder_of_processes_can_not_be_written_to() -> None:
    with pytest.raises(InvalidInput, match="can't write"):
        write(Path("/proc/model.onnx"))
    with pytest.raises(InvalidInput, match="can't make the folder"):
        make_folder(Path("/proc/new/folder"))


def test_a_folder_is_checked_without_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == []
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="file is a file"):
        check_folder(tmp_path / "file" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InvalidInput, match="a is not writable"):
        check_folder(tmp_path / "a" / "c")


def test_texts_are_written_beside_and_moved(tmp_path: Path) -> None:
    texts = {"a.txt": "über", "b.txt": ""}
    assert write_files(tmp_path / "new", texts) == [tmp_path / "new" / "a.txt", tmp_path / "new" / "b.txt"]
    assert names(tmp_path / "new") == ["a.txt", "b.txt"]
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "über"
    with pytest.raises(UnicodeEncodeError):
        write_files(tmp_path / "new", {"a.txt": "replaced", "b.txt": "\ud800"})
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "über"
    assert names(tmp_path / "new") == ["a.txt", "b.txt"]
