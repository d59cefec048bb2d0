"""Saving and loading: what comes back is what was saved, and no file makes the loader run its code."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lobo_fx
from lobo_fx import InvalidInput, Result
from lobo_fx.capture.archive import PROGRAM_FILE, _is_arithmetic, read_pt2
from lobo_fx.graph.program import Program
from lobo_fx.measures.counts import measure
from lobo_fx.passes import FoldBatchNorm, PruneWeights, QuantizeStatic
from lobo_fx.saving import MANIFEST_FILE

PROGRAM_NAME = r"program\.[0-9a-f]{16}\.pt2"
Killing = Callable[[int, Callable[[], object]], bool]
Entries = list[tuple[str, bytes]]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(10).view(2, 5)


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 64, 5),
    ).eval()


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.hidden(self.embedding(tokens)))
        return {"logits": self.lm_head(hidden), "hidden": hidden}


@functools.cache
def traced(make: Callable[[], nn.Module]) -> Program:
    """Once for all tests: compiling copies it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lobo_fx.trace(make(), TOKENS if make is TiedLanguageModel else IMAGES[:2])


def compiled(kind: str) -> tuple[Result, torch.Tensor]:
    """A result of each sort, and inputs of another batch size than the one it was traced with."""
    if kind == "tied":
        return lobo_fx.compile(traced(TiedLanguageModel), [PruneWeights(0.5)], progress=False), TOKENS
    passes: dict[str, list[Any]] = {
        "float": [],
        "folded": [FoldBatchNorm()],
        "masked": [PruneWeights(0.6)],
        "quantized": [QuantizeStatic(kernels="all")],
    }
    return lobo_fx.compile(traced(convnet), passes[kind], calibration_data=[IMAGES], progress=False), IMAGES


def program_file(folder: Path) -> Path:
    """The only program in a saved folder; its name holds its checksum."""
    (found,) = folder.glob("program.*.pt2")
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_same_outputs(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["float", "folded", "masked", "quantized", "tied"])
def test_what_was_saved_comes_back(kind: str, tmp_path: Path) -> None:
    result, inputs = compiled(kind)
    assert result.save(tmp_path / "saved") == tmp_path / "saved"
    loaded = lobo_fx.load(tmp_path / "saved")

    assert_same_outputs(loaded.module(inputs), result.module(inputs))
    before, after = result.module.state_dict(), loaded.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in loaded.module.named_parameters()] == [
        name for name, _ in result.module.named_parameters()
    ]
    assert loaded.program.signature == result.program.signature
    assert measure(loaded.program, 0) == measure(result.program, 0)
    assert loaded.passes == result.passes
    assert loaded.report.rows == result.report.rows
    assert loaded.report.notes == result.report.notes
    assert loaded.original is None
    with pytest.raises(InvalidInput, match="does not hold the original"):
        loaded.export_original(tmp_path / "original.onnx")


def test_weights_that_are_transposed_or_parts_of_others_in_memory_come_back(tmp_path: Path) -> None:
    model = nn.ModuleDict({"part": nn.Linear(6, 4), "transposed": nn.Linear(4, 3)})
    whole = torch.randn(9, 6)
    model["part"].weight = nn.Parameter(whole[2:6])
    model["transposed"].weight = nn.Parameter(torch.randn(4, 3).t())
    network, x = nn.Sequential(*model.values()), torch.randn(5, 6)
    lobo_fx.compile(network, [], example_inputs=x).save(tmp_path / "saved")
    torch.testing.assert_close(lobo_fx.load(tmp_path / "saved").module(x), network(x), rtol=0, atol=0)


def test_a_loaded_program_is_independent_of_the_saved_one(tmp_path: Path) -> None:
    result, inputs = compiled("float")
    expected = result.module(inputs)
    result.save(tmp_path)
    loaded = lobo_fx.load(tmp_path)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.zero_()
    assert torch.equal(loaded.module(inputs), expected)
    assert not torch.equal(result.module(inputs), expected)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    result, _ = compiled("tied")
    result.save(tmp_path)
    with zipfile.ZipFile(program_file(tmp_path)) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/weights/weight_" in entry.filename]
    assert sizes.count(12 * 8 * 4) == 1
    loaded = lobo_fx.load(tmp_path)
    named = dict(loaded.module.named_parameters(remove_duplicate=False))
    shared = [name for name, parameter in named.items() if parameter.shape == (12, 8)]
    assert len({named[name].data_ptr() for name in shared}) == 1


def test_a_loaded_module_trains_and_keeps_its_zeros(tmp_path: Path) -> None:
    result, inputs = compiled("masked")
    result.save(tmp_path)
    module = lobo_fx.load(tmp_path).module
    weight = dict(module.named_parameters())["5.weight"]
    zeros = weight == 0
    assert int(zeros.sum()) == round(0.6 * weight.numel())
    before = weight.detach().clone()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    labels = torch.arange(4) % 5
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(inputs), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert torch.equal(weight == 0, zeros)
    assert not torch.equal(weight, before)


def test_a_loaded_module_switches_between_training_and_inference(tmp_path: Path) -> None:
    result, inputs = compiled("float")
    expected = result.module(inputs)
    result.save(tmp_path)
    module = lobo_fx.load(tmp_path).module
    assert not module.training
    assert torch.equal(module(inputs), module(inputs))
    mean = module.get_buffer("1.running_mean").clone()
    module.train()
    assert not torch.equal(module(inputs), module(inputs)), "dropout is off in training mode"
    assert not torch.equal(module.get_buffer("1.running_mean"), mean), "batch norm does not learn its statistics"
    module.eval()
    with torch.no_grad():
        module.get_buffer("1.running_mean").copy_(mean)
        module.get_buffer("1.running_var").copy_(result.module.get_buffer("1.running_var"))
    assert torch.equal(module(inputs), expected)


def test_a_loaded_quantized_program_exports(tmp_path: Path) -> None:
    result, _ = compiled("quantized")
    result.save(tmp_path / "saved")
    artifact = lobo_fx.load(tmp_path / "saved").export(tmp_path / "model.onnx")
    assert artifact.details["kernels"]["QLinearConv"] == 1
    assert artifact.details["kernels"]["QGemm"] == 1


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    result = lobo_fx.compile(transformers.BertModel(config).eval(), progress=False)
    folder = tmp_path_factory.mktemp("bert")
    result.save(folder)
    return folder, result


def test_a_hugging_face_output_comes_back_as_one(saved_bert: tuple[Path, Result]) -> None:
    folder, result = saved_bert
    tokens = torch.arange(48).view(3, 16) % 30
    output = lobo_fx.load(folder).module(input_ids=tokens)
    expected = result.module(input_ids=tokens)
    assert output.keys() == expected.keys()
    assert_same_outputs(output, expected)


@pytest.mark.slow
def test_a_hugging_face_model_loads_where_only_its_outputs_are_known(saved_bert: tuple[Path, Result]) -> None:
    """A fresh process is told what to import, since a file must not choose that; with it the model loads."""
    folder, result = saved_bert
    expected = result.module(input_ids=torch.arange(48).view(3, 16) % 30)
    code = (
        "import sys, torch, lobo_fx\n"
        "try:\n"
        "    lobo_fx.load(sys.argv[1])\n"
        "except lobo_fx.InvalidInput as error:\n"
        "    print(error)\n"
        "import transformers.modeling_outputs\n"
        "output = lobo_fx.load(sys.argv[1]).module(input_ids=torch.arange(48).view(3, 16) % 30)\n"
        "print(type(output).__name__, float(output['last_hidden_state'].double().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    message, output = done.stdout.strip().splitlines()
    assert "import transformers.modeling_outputs first" in message
    name, total = output.split()
    assert name == type(expected).__name__
    assert float(total) == pytest.approx(float(expected["last_hidden_state"].detach().double().sum()), abs=1e-4)


def test_figures_that_json_lacks_come_back(tmp_path: Path) -> None:
    result, _ = compiled("folded")
    first = result.report.rows[0]
    numbers = [math.inf, -math.inf, math.nan, 12.5]
    result.report.rows = [dataclasses.replace(first, snr=number, score=number) for number in numbers]
    result.save(tmp_path)
    json.loads((tmp_path / MANIFEST_FILE).read_text(), parse_constant=pytest.fail)
    rows = lobo_fx.load(tmp_path).report.rows
    assert [repr(row.snr) for row in rows] == [repr(row.score) for row in rows] == ["inf", "-inf", "nan", "12.5"]


def test_files_and_latencies_come_back(tmp_path: Path) -> None:
    result, _ = compiled("float")
    result.export_original(tmp_path / "original.onnx")
    result.export(tmp_path / "model.onnx").gzip_bytes  # noqa: B018
    result.benchmark(rounds=2, warmup=0, memory=False)
    result.save(tmp_path / "saved")
    loaded = lobo_fx.load(tmp_path / "saved")
    assert loaded.report.artifacts == result.report.artifacts
    assert loaded.report.artifacts["compiled"].known_gzip_bytes == result.report.artifacts["compiled"].gzip_bytes
    assert loaded.report.benchmark == result.report.benchmark
    assert str(loaded) == str(result)
    assert list(loaded.benchmark(rounds=1, warmup=0, memory=False).latencies) == ["original", "compiled"]

    (tmp_path / "original.onnx").unlink()
    with (tmp_path / "model.onnx").open("ab") as stream:
        stream.write(b"more")
    assert lobo_fx.load(tmp_path / "saved").report.artifacts == {}


def test_tied_weights_are_one_parameter_to_an_optimizer(tmp_path: Path) -> None:
    result, _ = compiled("tied")
    result.save(tmp_path)
    module = lobo_fx.load(tmp_path).module
    assert len(list(module.parameters())) == len(list(result.module.parameters())) == 3
    assert module.get_parameter("embedding.weight") is module.get_parameter("lm_head.weight")


def test_weights_that_are_equal_but_not_tied_stay_apart(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].load_state_dict(model[0].state_dict())
    lobo_fx.compile(model, example_inputs=torch.ones(2, 3), progress=False).save(tmp_path)
    module = lobo_fx.load(tmp_path).module
    assert len(list(module.parameters())) == 4
    assert module.get_parameter("0.weight").data_ptr() != module.get_parameter("1.weight").data_ptr()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("kept")
    with pytest.raises(InvalidInput, match="holds other files"):
        compiled("float")[0].save(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_saving_again_replaces_and_leaves_no_draft(tmp_path: Path) -> None:
    compiled("float")[0].save(tmp_path)
    result, inputs = compiled("folded")
    result.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [MANIFEST_FILE, program_file(tmp_path).name]
    assert_same_outputs(lobo_fx.load(tmp_path).module(inputs), result.module(inputs))


def test_a_failed_save_leaves_the_old_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = compiled("float")
    result.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InvalidInput, match=r"can't write .*lobo_fx\.json: no space left"):
        result.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("limit", [10, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_an_error_and_no_abort(limit: int, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk, in a process of its own."""
    result = lobo_fx.compile(nn.Linear(64, 64), example_inputs=torch.randn(2, 64), progress=False)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            result.save(tmp_path)
        except InvalidInput as error:
            code = 0 if "File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_old_result_or_the_new_one(tmp_path: Path, killed_after: Killing) -> None:
    old, inputs = compiled("float")
    new, _ = compiled("folded")
    seen = []
    for steps in range(3):
        old.save(tmp_path)
        killed = killed_after(steps, lambda: new.save(tmp_path))
        loaded = lobo_fx.load(tmp_path)
        expected = old if killed else new
        assert_same_outputs(loaded.module(inputs), expected.module(inputs))
        seen.append((killed, [name for name, _ in loaded.passes]))
    assert seen == [(True, []), (True, []), (False, ["fold_batch_norm"])]


@pytest.mark.parametrize("steps", [0, 1])
def test_what_a_killed_first_save_left_is_no_obstacle(steps: int, tmp_path: Path, killed_after: Killing) -> None:
    result, inputs = compiled("float")
    assert killed_after(steps, lambda: result.save(tmp_path))
    assert list(tmp_path.iterdir())
    result.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [MANIFEST_FILE, program_file(tmp_path).name]
    assert_same_outputs(lobo_fx.load(tmp_path).module(inputs), result.module(inputs))


def test_the_program_of_another_result_is_refused(tmp_path: Path) -> None:
    result, _ = compiled("float")
    result.save(tmp_path / "one")
    compiled("folded")[0].save(tmp_path / "other")
    program_file(tmp_path / "one").write_bytes(program_file(tmp_path / "other").read_bytes())
    with pytest.raises(InvalidInput, match=r"program\.\w+\.pt2 is damaged or was replaced"):
        lobo_fx.load(tmp_path / "one")


def test_save_needs_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(InvalidInput, match="can't make the folder"):
        compiled("float")[0].save(file)
    assert file.read_text() == "kept"


DAMAGES: dict[str, Callable[[Any], object]] = {
    "no rows": lambda manifest: manifest["report"].pop("passes"),
    "a row with another figure": lambda manifest: manifest["report"]["passes"][0].update(speed=1),
    "a ratio that is no number": lambda manifest: manifest["report"]["passes"][0].update(snr="loud"),
    "a report that is text": lambda manifest: manifest.update(report="good"),
    "passes without settings": lambda manifest: manifest.update(passes=["fold_batch_norm"]),
    "weights that are a number": lambda manifest: manifest.update(weights=3),
    "types that are numbers": lambda manifest: manifest.update(output_types=[3]),
    "indices that are text": lambda manifest: manifest.update(kept_indices="all"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled("float")[0].save(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused(damage: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    DAMAGES[damage](manifest)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match=r"lobo_fx\.json is damaged .*save the result again"):
        lobo_fx.load(tmp_path)


def test_half_a_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    program_file(tmp_path).unlink()
    with pytest.raises(InvalidInput, match=rf"no file .*{PROGRAM_NAME}"):
        lobo_fx.load(tmp_path)
    (tmp_path / MANIFEST_FILE).unlink()
    with pytest.raises(InvalidInput, match=MANIFEST_FILE):
        lobo_fx.load(tmp_path)


@pytest.mark.parametrize("length", [0, 100, -30])
def test_a_truncated_program_is_refused(length: int, good: Entries, tmp_path: Path) -> None:
    path = write(tmp_path / "cut.pt2", good)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InvalidInput, match=r"cut\.pt2"):
        read_pt2(path)


def test_a_program_with_a_flipped_bit_is_refused(good: Entries, tmp_path: Path) -> None:
    path = write(tmp_path / "flipped.pt2", good)
    data = bytearray(path.read_bytes())
    weight = next(entry for name, entry in good if name.endswith("weight_0"))
    data[bytes(data).index(weight) + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"flipped\.pt2 can't be loaded: Bad CRC"):
        read_pt2(path)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "was not written by Result.save"),
        ("{}", "format None"),
        ('{"format": 1}', "format 1"),
        ('{"format": 99}', "format 99"),
        ("not json", "no JSON file"),
        ("[]", "holds a list"),
        ('{"format": 2}', "is damaged"),
        ('{"format": 2, "weights": [], "passes": [], "report": {"passes": [{"unknown": 1}]}}', None),
    ],
)
def test_a_folder_that_is_not_ours_is_refused(
    manifest: str | None, words: str | None, good: Entries, tmp_path: Path
) -> None:
    write(tmp_path / PROGRAM_FILE, good)
    if manifest is not None:
        (tmp_path / MANIFEST_FILE).write_text(manifest)
    with pytest.raises(InvalidInput, match=words):
        lobo_fx.load(tmp_path)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no file"):
        read_pt2(tmp_path / "missing.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(InvalidInput, match="not an archive"):
        read_pt2(text)
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(InvalidInput, match=r"torch\.export\.save"):
        read_pt2(other)
    pickled = tmp_path / "pickled.pt2"
    torch.save(convnet().state_dict(), pickled)
    with pytest.raises(InvalidInput, match=r"torch\.export\.save"):
        read_pt2(pickled)


# What follows are files that would run code. `MARKER` names a folder that such code makes.


class MakeFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def good(saved: Path) -> Entries:
    """The entries of a sound archive."""
    with zipfile.ZipFile(program_file(saved)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def payload(marker: Path) -> bytes:
    """A pickle that leaves the marker."""
    stream = io.BytesIO()
    torch.save(MakeFolder(marker), stream)
    return stream.getvalue()


def write(path: Path, entries: Entries) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that occur twice
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                archive.writestr(name, data)
    return path


def refuses(path: Path, marker: Path) -> str:
    """Asserts that the file is turned down before anything in it ran; returns the message."""
    try:
        with pytest.raises(InvalidInput) as caught:
            lobo_fx.trace(path).run()
    finally:
        assert not marker.exists(), "the file's code ran"
    return str(caught.value)


def changed(entries: Entries, ending: str, data: bytes) -> Entries:
    assert any(name.endswith(ending) for name, _ in entries)
    return [(name, data if name.endswith(ending) else old) for name, old in entries]


def edited(entries: Entries, ending: str, edit: Callable[[Any], None]) -> Entries:
    content = json.loads(next(data for name, data in entries if name.endswith(ending)))
    edit(content)
    return changed(entries, ending, json.dumps(content).encode())


def test_the_payload_works_and_a_rewritten_archive_loads(
    good: Entries, payload: bytes, marker: Path, tmp_path: Path
) -> None:
    program = lobo_fx.trace(write(tmp_path / "same.pt2", good))
    assert program.run(program.example_inputs).shape == (2, 5)
    torch.load(io.BytesIO(payload), weights_only=False)
    assert marker.exists()


def test_pickled_weights_are_refused(good: Entries, payload: bytes, marker: Path, tmp_path: Path) -> None:
    def pickle_first(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    entries = edited(good, "data/weights/model_weights_config.json", pickle_first)
    entries = changed(entries, "data/weights/weight_0", payload)
    assert "pickled tensors" in refuses(write(tmp_path / "bad.pt2", entries), marker)


@pytest.mark.parametrize("name", ["opaque_obj_0", "custom_obj_0"])
def test_pickled_constants_are_refused(name: str, good: Entries, payload: bytes, marker: Path, tmp_path: Path) -> None:
    def refer(config: Any) -> None:
        config["config"]["c"] = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}

    entries = edited(good, "data/constants/model_constants_config.json", refer)
    entries.append((f"program/data/constants/{name}", payload))
    assert "refused" in refuses(write(tmp_path / "bad.pt2", entries), marker)


def test_compiled_libraries_are_refused(good: Entries, marker: Path, tmp_path: Path) -> None:
    entries = [*good, ("program/data/aotinductor/model/library.so", b"\x7fELF")]
    assert "refused" in refuses(write(tmp_path / "bad.pt2", entries), marker)


def test_pickled_sample_inputs_are_refused(good: Entries, payload: bytes, marker: Path, tmp_path: Path) -> None:
    entries = changed(good, "data/sample_inputs/model.pt", payload)
    assert "more than tensors" in refuses(write(tmp_path / "bad.pt2", entries), marker)


@pytest.mark.parametrize("kind", ["weights", "constants"])
def test_pickles_where_old_versions_kept_tensors_are_refused(
    kind: str, good: Entries, payload: bytes, marker: Path, tmp_path: Path
) -> None:
    refuses(write(tmp_path / "bad.pt2", [*good, (f"program/data/{kind}/model.pt", payload)]), marker)


def test_the_archive_format_of_old_versions_is_refused(
    good: Entries, payload: bytes, marker: Path, tmp_path: Path
) -> None:
    from torch._export.serde.schema import SCHEMA_VERSION

    model = next(data for name, data in good if name.endswith("models/model.json"))
    entries = [
        ("x/archive_format", b"pt2"),
        ("version", ".".join(map(str, SCHEMA_VERSION)).encode()),
        ("serialized_exported_program.json", model),
        ("serialized_state_dict.pt", payload),
        ("serialized_constants.pt", b""),
        ("serialized_example_inputs.pt", b""),
    ]
    refuses(write(tmp_path / "bad.pt2", entries), marker)


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("folder", ["sample_inputs", "SAMPLE_INPUTS"])
def test_an_entry_hidden_behind_one_of_the_same_name_is_not_read(
    folder: str, position: str, good: Entries, payload: bytes, marker: Path, tmp_path: Path
) -> None:
    """PyTorch's reader ignores case, Python's does not; and they may disagree on names that occur twice."""
    entries: Entries = []
    for name, data in good:
        hidden = [(name.replace("sample_inputs", folder), payload)] if "sample_inputs" in name else []
        entries += [*hidden, (name, data)] if position == "before" else [(name, data), *hidden]
    path = write(tmp_path / "bad.pt2", entries)
    with contextlib.suppress(InvalidInput):
        lobo_fx.trace(path).run()
    assert not marker.exists(), "the file's code ran"


def test_names_in_another_case_are_refused(good: Entries, payload: bytes, marker: Path, tmp_path: Path) -> None:
    entries = [(name.replace("sample_inputs", "Sample_Inputs"), data) for name, data in good]
    entries = changed(entries, "data/Sample_Inputs/model.pt", payload)
    refuses(write(tmp_path / "bad.pt2", entries), marker)


def parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """A zip file's entries, its directory, and the record at its end."""
    end = data.rfind(b"PK\5\6")
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    return data[:start], data[start : start + size], data[end:]


def test_the_archive_that_is_read_is_the_one_that_was_inspected(
    good: Entries, payload: bytes, marker: Path, tmp_path: Path
) -> None:
    """Two archives in one file.

    Python takes the directory right before the end record and moves all offsets along with it; PyTorch takes the
    one at the offset that the end record gives. Here these are different directories.
    """
    bad = changed(good, "data/sample_inputs/model.pt", payload)
    (seen, seen_directory, end), (hidden, hidden_directory, _) = (
        parts(write(tmp_path / "part.zip", entries).read_bytes()) for entries in (good, bad)
    )
    assert len(hidden_directory) == len(seen_directory)
    hidden += bytes(max(0, len(seen) - len(hidden)))
    directory, position = bytearray(seen_directory), 0
    while position < len(directory):
        lengths = struct.unpack("<HHH", directory[position + 28 : position + 34])
        (offset,) = struct.unpack("<I", directory[position + 42 : position + 46])
        directory[position + 42 : position + 46] = struct.pack("<I", offset + len(hidden) - len(seen))
        position += 46 + sum(lengths)
    path = tmp_path / "bad.pt2"
    end = end[:16] + struct.pack("<I", len(hidden)) + end[20:]
    path.write_bytes(hidden + hidden_directory + seen + bytes(directory) + end)
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == dict(good)
    with contextlib.suppress(InvalidInput):
        lobo_fx.trace(path).run()
    assert not marker.exists(), "the file's code ran"


def with_call(good: Entries, target: str, *arguments: dict[str, Any]) -> Entries:
    """The model with one more call, ahead of all others, whose result replaces the first layer's."""

    def insert(model: Any) -> None:
        graph = model["graph_module"]["graph"]
        call = {
            "target": target,
            "inputs": [{"name": "", "arg": argument, "kind": 1} for argument in arguments],
            "outputs": [{"as_tensor": {"name": "planted"}}],
            "metadata": {},
            "is_hop_single_tensor_return": True,
            "name": "planted",
        }
        first = graph["nodes"][0]["outputs"][0]["as_tensor"]["name"]
        graph["tensor_values"]["planted"] = copy.deepcopy(graph["tensor_values"][first])
        for node in graph["nodes"][1:]:
            for entry in node["inputs"]:
                if entry["arg"].get("as_tensor", {}).get("name") == first:
                    entry["arg"]["as_tensor"]["name"] = "planted"
        graph["nodes"].insert(1, call)

    return edited(good, "models/model.json", insert)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "os.mkdir",
        "builtins.eval",
        "torch.hub.load",
        "torch.load",
        "torch.serialization.load",
        "torch._C._jit_set_profiling_executor",
        "torch.ops.aten._dir.append",
        "torch.ops.import_module",
        "torch.ops.load_library",
        "torch.ops.load_library.__func__.__globals__.get",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.call",
        "operator.call",
        "#extension:call",
    ],
)
def test_a_call_of_anything_but_an_operator_is_refused(
    target: str, good: Entries, marker: Path, tmp_path: Path
) -> None:
    refuses(write(tmp_path / "bad.pt2", with_call(good, target, {"as_string": str(marker)})), marker)


def test_an_operator_that_opens_files_is_refused(good: Entries, tmp_path: Path) -> None:
    file = tmp_path / "written"
    size = 4 * 8 * 64

    def named(model: Any) -> None:
        call = next(n for n in model["graph_module"]["graph"]["nodes"] if n["name"] == "planted")
        for entry, name in zip(call["inputs"], ("filename", "shared", "size"), strict=True):
            entry["name"] = name

    values: list[dict[str, Any]] = [{"as_string": str(file)}, {"as_bool": True}, {"as_int": size}]
    entries = edited(with_call(good, "torch.ops.aten.from_file.default", *values), "models/model.json", named)
    refuses(write(tmp_path / "bad.pt2", entries), file)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').mkdir('{marker}')",
        "Symbol('s0').__class__",
        "(lambda: __import__('os').mkdir('{marker}'))()",
        "[x for x in (1,)]",
        "Integer(open('{marker}', 'w').close() or 1)",
        "eval('1')",
        "Symbol('__import__(\"os\")')",
        "not an expression (",
        "9**9**9**9",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Pow(Pow(Integer(9), Integer(99)), Integer(99)), Integer(99))",
        "Integer('" + 2000 * "9" + "')",
        "Mul(" + ", ".join(100 * ["Symbol('s0')"]) + ")",
        "1 << 99",
        500 * "(" + "1" + 500 * ")",
    ],
)
def test_a_size_that_is_more_than_arithmetic_is_refused(
    expression: str, good: Entries, marker: Path, tmp_path: Path
) -> None:
    def plant(model: Any) -> None:
        size = {"as_expr": {"expr_str": expression.format(marker=marker), "hint": {"as_int": 2}}}
        for value in model["graph_module"]["graph"]["tensor_values"].values():
            value["sizes"][:1] = [size]

    message = refuses(write(tmp_path / "bad.pt2", edited(good, "models/model.json", plant)), marker)
    assert "not arithmetic" in message


def test_small_powers_are_arithmetic() -> None:
    """Areas and square roots of free sizes, as torch writes them."""
    assert _is_arithmetic("Mul(Integer(3), Pow(Symbol('s0', positive=True, integer=True), Integer(2)))")
    assert _is_arithmetic("FloorDiv(Pow(Add(Symbol('s0'), Integer(-1)), Integer(-1)), Integer(4))")
    assert _is_arithmetic("Pow(Symbol('s0'), Rational(1, 2))")


def test_an_archive_that_unpacks_to_far_more_is_refused(good: Entries, tmp_path: Path) -> None:
    path = tmp_path / "large.pt2"
    for size, refused in ((50 * 10**6, False), (100 * 10**6, True)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in good:
                archive.writestr(name, data)
            archive.writestr(f"{good[0][0].partition('/')[0]}/data/weights/weight_99", bytes(size))
        if not refused:
            assert read_pt2(path).example_inputs is not None
            continue
        with pytest.raises(InvalidInput, match=r"large\.pt2 has 0\.1 MB and unpacks to 100 MB"):
            read_pt2(path)


ENUM = {
    "type": "builtins.dict",
    "context": json.dumps([{"__enum__": True, "fqn": "planted_module:Kind", "name": "ONE"}]),
}
DEFAULT_DICT = {
    "type": "collections.defaultdict",
    "context": {"default_factory_module": "planted_module", "default_factory_name": "Kind", "dict_context": ["a"]},
}


@pytest.mark.parametrize("backslashes", [0, 1, 2, 4], ids=lambda count: f"{count}_backslashes")
@pytest.mark.parametrize("structure", [ENUM, DEFAULT_DICT], ids=["enum", "defaultdict"])
def test_an_output_structure_that_imports_a_module_is_refused(
    structure: dict[str, Any],
    backslashes: int,
    good: Entries,
    marker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Structures are JSON in JSON in JSON, and each layer may write a character as an escape."""
    (tmp_path / "planted_module.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

    def plant(model: Any) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, structure | {"children_spec": [leaf]}])

    entries = edited(good, "models/model.json", plant)
    if backslashes:
        data = next(data for name, data in entries if name.endswith("models/model.json"))
        for word in (b"__enum__", b"default_factory_module", b"default_factory_name"):
            data = data.replace(word, b"\\" * backslashes + b"u%04x" % word[0] + word[1:])
        entries = changed(entries, "models/model.json", data)
    refuses(write(tmp_path / "bad.pt2", entries), marker)


def test_free_dimensions_with_arithmetic_between_them_are_accepted(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, : x.shape[1] // 2], x, x], dim=1).reshape(x.shape[0], -1, 2)

    shapes = ({0: torch.export.Dim("rows", min=2), 1: 4 * torch.export.Dim("quarters", min=1, max=64)},)
    result = lobo_fx.compile(Halves(), example_inputs=torch.randn(3, 8), dynamic_shapes=shapes, progress=False)
    result.save(tmp_path)
    x = torch.randn(5, 12)
    assert torch.equal(lobo_fx.load(tmp_path).module(x), Halves()(x))


def test_a_pickle_is_refused_and_copies_and_state_dicts_are_not(tmp_path: Path) -> None:
    result = lobo_fx.compile(convnet().eval(), example_inputs=IMAGES, progress=False)
    for refused in (result.module, result):
        with pytest.raises(InvalidInput, match=r"result\.save\(folder\)"):
            torch.save(refused, io.BytesIO())
    torch.save(result.module.state_dict(), tmp_path / "weights.pt")
    for twin in (copy.deepcopy(result.module), copy.copy(result.module)):
        twin.load_state_dict(torch.load(tmp_path / "weights.pt"))
        assert torch.equal(twin(IMAGES), result.module(IMAGES))


def test_an_output_type_inside_another_class_comes_back(tmp_path: Path) -> None:
    torch.utils._pytree.register_dataclass(Outer.Scores, serialized_type_name="tests.Outer.Scores")

    class Scoring(nn.Module):
        def forward(self, x: torch.Tensor) -> Outer.Scores:
            return Outer.Scores(x + 1)

    result = lobo_fx.compile(Scoring(), [], example_inputs=torch.ones(2, 3), progress=False)
    (name,) = json.loads((result.save(tmp_path) / MANIFEST_FILE).read_text())["output_types"]
    assert name.endswith(".Outer")
    sys.modules.setdefault(__name__, sys)  # pytest's import mode leaves test modules out
    assert isinstance(lobo_fx.load(tmp_path).module(torch.ones(4, 3)), Outer.Scores)


class Outer:
    @dataclasses.dataclass
    class Scores:
        values: torch.Tensor


class Tells(nn.Module):
    """Returns more than tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x), "text" if self.kind == "text" else x.sum().item() > 0


@pytest.mark.parametrize(
    ("kind", "told"), [("text", "output 1 is the text 'text'"), ("bool", "output 1 is a computed bool")]
)
def test_outputs_that_could_not_be_read_back_are_refused(kind: str, told: str, tmp_path: Path) -> None:
    result = lobo_fx.compile(Tells(kind).eval(), [], example_inputs=torch.randn(3, 4), progress=False)
    with pytest.raises(InvalidInput, match=f"the result can't be saved: {told}; leave it out"):
        result.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
