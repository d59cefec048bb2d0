"""Calibration data: what reads as batches, and what every file that can't be used is told."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lobo_fx.errors import InvalidInput
from lobo_fx.graph.inputs import Inputs
from lobo_fx.sources.batches import random_batches, read_batches, read_example_inputs

ROWS = np.arange(30, dtype=np.float32).reshape(5, 6)


def test_rows_of_one_array_are_batches(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    batches = list(read_batches(str(tmp_path / "x.npy"), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), torch.from_numpy(ROWS))


def test_an_array_that_was_saved_without_a_name_is_the_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", ROWS)
    np.savez(tmp_path / "two.npz", ROWS, ROWS)
    batches = list(read_batches(str(tmp_path / "x.npz"), 3))
    assert torch.equal(torch.cat(batches), torch.from_numpy(ROWS))
    assert torch.equal(read_example_inputs(str(tmp_path / "x.npz")).args[0], torch.from_numpy(ROWS))
    assert sorted(next(iter(read_batches(str(tmp_path / "two.npz"), 3)))) == ["arr_0", "arr_1"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_by_name_are_batches_by_name(suffix: str, tmp_path: Path) -> None:
    path, tokens = tmp_path / f"x{suffix}", np.arange(5)
    if suffix == ".npz":
        np.savez(path, x=ROWS, tokens=tokens)
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file({"x": torch.from_numpy(ROWS), "tokens": torch.from_numpy(tokens)}, path)
    batches: list[Any] = list(read_batches(str(path), 3))
    assert [sorted(batch) for batch in batches] == [["tokens", "x"]] * 2
    assert torch.equal(torch.cat([batch["tokens"] for batch in batches]), torch.arange(5))
    assert torch.equal(batches[1]["x"], torch.from_numpy(ROWS[3:]))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(300), b"PK\3\4 cut off", b"\x93NUMPY\1\0"])
def test_a_damaged_file_is_refused(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"is damaged|can't be read|is empty") as error:
        read_batches(str(path))
    assert str(path) in str(error.value)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=ROWS)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    with pytest.raises(InvalidInput, match=r"cut\.npz can't be read"):
        read_batches(str(tmp_path / "cut.npz"))


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["objects.npy", "objects.npz", "plain.npy"])
def test_pickles_are_refused(name: str, tmp_path: Path) -> None:
    path, marker = tmp_path / name, tmp_path / "marker"
    if name == "plain.npy":
        path.write_bytes(pickle.dumps(Touch(marker)))
    else:
        objects = np.array([Touch(marker)], dtype=object)
        np.save(tmp_path / "objects.npy", objects)
        np.savez(tmp_path / "objects.npz", x=objects)
    with pytest.raises(InvalidInput, match="can't be read as plain arrays"):
        read_batches(str(path))
    assert not marker.exists()
    np.load(tmp_path / name, allow_pickle=True) if name != "objects.npz" else np.load(path, allow_pickle=True)["x"]
    assert marker.exists(), "the payload does not work, so nothing was tested"


def test_arrays_that_are_no_rows_of_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.float32(3))
    np.save(tmp_path / "none.npy", ROWS[:0])
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "uneven.npz", a=ROWS, b=ROWS[:3])
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    for name in ("one.npy", "none.npy", "empty.npz"):
        with pytest.raises(InvalidInput, match=rf"{name} holds no rows"):
            read_batches(str(tmp_path / name))
    with pytest.raises(InvalidInput, match=r"text\.npy can't be read"):
        read_batches(str(tmp_path / "text.npy"))
    with pytest.raises(InvalidInput, match=r"different numbers of rows: \{'a': 5, 'b': 3\}"):
        read_batches(str(tmp_path / "uneven.npz"))


@pytest.mark.parametrize("batch", [0, -1])
def test_batches_without_rows_are_refused(batch: int, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ROWS)
    with pytest.raises(InvalidInput, match=f"batch is {batch}"):
        read_batches(str(tmp_path / "x.npy"), batch)


def test_a_function_gives_batches(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def data():\n    return [1, 2]\n\ndef number():\n    return 3\n\ndef fail():\n    raise OSError('x')\n"
    )
    assert read_batches(f"{path}:data") == [1, 2]
    with pytest.raises(InvalidInput, match="returns a int; expected batches"):
        read_batches(f"{path}:number")
    with pytest.raises(InvalidInput, match=r"mine\.py:8: OSError: x"):
        read_batches(f"{path}:fail")


@pytest.mark.parametrize("spec", ["", "x.csv", "x.npy:0", "folder/"])
def test_a_specification_that_is_no_data(spec: str) -> None:
    with pytest.raises(InvalidInput, match="is no data: give"):
        read_batches(spec)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    for name in ("x.npy", "x.safetensors", "x.py:data"):
        with pytest.raises(InvalidInput, match=r"no file .*x\."):
            read_batches(str(tmp_path / name))


def test_random_batches_are_seeded_and_like_the_inputs() -> None:
    inputs = Inputs((torch.randn(2, 50),), {"tokens": torch.tensor([[3, 5], [5, 9]])})
    first, second = random_batches(inputs, 2, seed=1), random_batches(inputs, 2, seed=1)
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.args[0], other.args[0])
        assert sorted(one.kwargs["tokens"].flatten().tolist()) == [3, 5, 5, 9]
    assert not torch.equal(first[0].args[0], first[1].args[0])
    with pytest.raises(InvalidInput, match="0 random batches"):
        random_batches(inputs, 0)
