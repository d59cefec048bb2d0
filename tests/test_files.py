"""Files are written whole or not at all, what belongs together stays together, and what is no file is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lobo_fx import files
from lobo_fx.errors import InvalidInput
from lobo_fx.files import (
    check_folder,
    check_named_by_content,
    check_readable,
    check_writable,
    file_name,
    make_folder,
    name_by_content,
    read_json,
    temporary_folder,
    write_files,
    written_beside,
)

Killing = Callable[[int, Callable[[], object]], bool]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write(path: Path, content: str = "new", apart: str | None = None) -> None:
    """A file, and where asked for one beside it that the first one names."""
    with written_beside(path) as draft:
        named = []
        if apart is not None:
            (draft / "weights.data").write_text(apart)
            named = [name_by_content(draft / "weights.data").name]
        (draft / path.name).write_text("\n".join([content, *named]))


def read(path: Path) -> tuple[str, str]:
    """What the file says, and what stands in the file that it names."""
    content, name = path.read_text().split("\n")
    return content, (path.parent / name).read_text()


def test_a_kill_leaves_the_old_pair_or_the_new_one(tmp_path: Path, killed_after: Killing) -> None:
    path = tmp_path / "model"
    write(path, "old", "old weights")
    seen = []
    for steps in range(3):
        killed = killed_after(steps, lambda: write(path, "new", "new weights"))
        seen.append((killed, read(path)))
    assert seen == [
        (True, ("old", "old weights")),
        (True, ("old", "old weights")),
        (False, ("new", "new weights")),
    ]
    assert len(names(tmp_path)) == 2, "the old weights and the drafts of killed processes are gone"


@pytest.mark.parametrize("steps", [1, 2])
def test_data_that_a_killed_process_moved_in_vain_or_did_not_come_to_remove_goes(
    steps: int, tmp_path: Path, killed_after: Killing, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    write(path, "old", "old weights")

    def write_and_die() -> None:
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: os.kill(os.getpid(), 9))
        write(path, "new", "new weights")

    assert killed_after(steps, write_and_die)
    assert read(path) == ([("old", "old weights"), ("new", "new weights")][steps - 1])
    assert len(names(tmp_path)) == 4, "a model, two files of weights, a draft"
    write(path, "newest", "newest weights")
    assert read(path) == ("newest", "newest weights")
    assert len(names(tmp_path)) == 2


def test_data_that_a_copy_of_the_older_file_names_stays(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", "old", "old weights")
    shutil.copy(tmp_path / "model.onnx", tmp_path / "backup.onnx")
    write(tmp_path / "model.onnx", "new", "new weights")
    assert read(tmp_path / "backup.onnx") == ("old", "old weights")
    assert len(names(tmp_path)) == 4


def test_a_folder_that_another_holds_is_waited_for_and_then_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST_WAIT", 0.1)
    with files._locked(tmp_path) as ours:
        assert ours
        with files._locked(tmp_path, wait=0.1) as twice:
            assert not twice
    with files._locked(tmp_path, wait=0) as again:
        assert again


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    write(tmp_path / "model", "old", "weights")
    write(tmp_path / "model", "new", "new weights")
    assert read(tmp_path / "model") == ("new", "new weights")
    assert len(names(tmp_path)) == 2


def test_the_draft_of_a_living_process_stays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with written_beside(path) as slow:
        write(path, "quick")
        (slow / "model").write_text("slow")
    assert path.read_text() == "slow"
    assert names(tmp_path) == ["model"]


def test_data_that_the_older_file_does_not_name_is_somebody_elses(tmp_path: Path) -> None:
    write(tmp_path / "model", "old", "old weights")
    write(tmp_path / "other", "old", "other weights")
    strangers = ["model.data", "weights.0123456789abcdef.data"]
    for name in strangers:
        (tmp_path / name).write_text("kept")
    write(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "new"
    assert read(tmp_path / "other") == ("old", "other weights")
    assert len(names(tmp_path)) == 5
    assert all((tmp_path / name).read_text() == "kept" for name in strangers)


def test_weights_that_did_not_change_stay(tmp_path: Path) -> None:
    write(tmp_path / "model", "old", "weights")
    before = names(tmp_path)
    write(tmp_path / "model", "new", "weights")
    assert read(tmp_path / "model") == ("new", "weights")
    assert names(tmp_path) == before


def test_content_that_is_not_what_the_name_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.data").write_text("weights")
    file = name_by_content(tmp_path / "weights.data")
    check_named_by_content(file)
    with pytest.raises(InvalidInput, match="no file"):
        check_named_by_content(tmp_path / "weights.data")
    file.write_text("other")
    with pytest.raises(InvalidInput, match="damaged or was replaced"):
        check_named_by_content(file)


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real").write_text("old")
    (tmp_path / "link").symlink_to("store/real")
    write(tmp_path / "link", "new", "weights")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "store" / "real") == ("new", "weights")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InvalidInput, match="leads in a circle"):
        write(tmp_path / "circle")


def test_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(InvalidInput, match="a device or a pipe"):
            check_writable(tmp_path / name)
        with pytest.raises(InvalidInput, match="a device or a pipe"):
            write_files(tmp_path, {name: "text"})
    with pytest.raises(InvalidInput, match="a device or a pipe"):
        check_writable(Path("/dev/null"))
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_title_leads_to_no_other_folder(tmp_path: Path) -> None:
    assert file_name("refitting of layer_1") == "refitting of layer_1"
    assert file_name("../a/b.c\0\n") == "---a-b-c--"
    assert file_name("word " * 30) == "word " * 11 + "word"
    assert file_name("x" * 55 + " whole") == "x" * 55
    assert [len(file_name(title)) for title in ("y" * 90, "y" * 60 + " z", " " * 90)] == [60, 60, 60]
    assert write_files(tmp_path, {f"{file_name('../' * 200)}.txt": ""})[0].resolve().parent == tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [("a\0b", "null character"), ("a\ud800b", "a character that no path may"), ("a" * 300, "File name too long")],
)
def test_a_name_that_no_file_may_have_is_refused(name: str, words: str) -> None:
    for check in (check_writable, check_folder):
        with pytest.raises(InvalidInput, match=words):
            check(Path(name))


def test_a_full_disk_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"temporary files \(the environment variable TMPDIR"), temporary_folder():
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("broken")])
def test_a_failure_leaves_the_older_files(error: Exception, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx")
    expected = InvalidInput if isinstance(error, OSError) else RuntimeError

    def fail() -> None:
        with written_beside(tmp_path / "model.onnx") as draft:
            (draft / "model.onnx").write_text("half")
            raise error

    with pytest.raises(expected, match=str(error)):
        fail()
    assert names(tmp_path) == ["model.onnx"]
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


@pytest.mark.parametrize("read", [check_readable, read_json])
def test_a_file_out_of_reach_is_refused_in_words(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    with pytest.raises(InvalidInput, match=r"no file .*plan\.json"):
        read(file)
    with pytest.raises(InvalidInput, match=r"can't read .*: File name too long"):
        read(tmp_path / ("x" * 300))
    file.write_text("{}")
    read(file)

    def locked(*given: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(InvalidInput, match=r"can't read .*plan\.json: Permission denied"):
        read(file)
    monkeypatch.setattr(Path, "stat", locked)  # as in a folder that may not be entered
    with pytest.raises(InvalidInput, match=r"can't read .*plan\.json: Permission denied"):
        read(file)


def test_json_may_start_with_the_mark_that_windows_editors_write(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}\r\n')
    assert read_json(tmp_path / "plan.json") == {"a": "ü"}
