"""The command line: what it writes, and that every wrong argument is refused before anything is made."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import lobo_fx
from lobo_fx.cli.app import app
from lobo_fx.graph.program import Program
from lobo_fx.plugins.artifact import Artifact
from lobo_fx.plugins.protocols import ArraySpec
from lobo_fx.plugins.registry import EXPORTERS, RUNTIMES
from lobo_fx.report.dashboards import DASHBOARDS
from lobo_fx.report.report import REPORT_FILES
from lobo_fx.result import CARD, SAMPLE
from lobo_fx.sources.losses import loss_names, read_loss

MODEL = """\
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("was_built").touch()


def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4)


def wide():
    return nn.Sequential(nn.Linear(4, 2048)), torch.ones(2, 4)


def narrow():
    return nn.Sequential(nn.Linear(4, 2)).bfloat16(), torch.ones(2, 4).bfloat16()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.up(x)
        return {"hidden": hidden, "logits": self.down(hidden)}


def two():
    return Two(), torch.ones(2, 4)


def data():
    return [torch.randn(3, 4), torch.randn(3, 4)]


def labelled():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    return [(part, part.argmax(1) // 2) for part in rows.split(4)]


def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels)


def score(module):
    with torch.no_grad():
        return -sum(float(loss(module(rows), labels)) for rows, labels in labelled())
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "net.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return "net.py:make"


@pytest.fixture(autouse=True)
def _no_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of fresh processes has tests of its own; here each would cost seconds."""
    monkeypatch.setattr("lobo_fx.measures.latency.peak_memory", lambda *arguments: (1_000_000, 2_000_000))


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have tests of their own too; here they are drawn where their files are looked for."""
    if request.function is not test_compile_writes_files_program_and_report:
        monkeypatch.setattr("lobo_fx.report.report.dashboards", lambda runs: dict.fromkeys(DASHBOARDS, b""))


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def compiled(*arguments: str) -> Result:
    return call("compile", *arguments, "--rounds", "1")


def test_compile_writes_files_program_and_report(model: str, tmp_path: Path) -> None:
    done = compiled(model, "--pass", "prune_weights:amount=0.5", "--pass", "quantize_static", "-o", "made/here")
    assert done.exit_code == 0, done.output
    names = {"original.onnx", "model.onnx", "program", "node_data", CARD, SAMPLE, *REPORT_FILES, *DASHBOARDS}
    assert {entry.name for entry in (tmp_path / "made" / "here").iterdir()} == names
    report = json.loads((tmp_path / "made" / "here" / "report.json").read_text())
    assert [row["name"] for row in report["passes"]] == ["original", "PruneWeights()", "QuantizeStatic()"]
    assert list(report["benchmark"]["latencies"]) == ["original", "compiled"]
    assert all(module["after"]["microseconds"] for module in report["modules"])
    assert any("random data" in note["reason"] for note in report["notes"])
    assert not any("weights are random" in note["reason"] for note in report["notes"])
    loaded = lobo_fx.load("made/here/program")
    assert list(loaded.report.artifacts) == ["original", "compiled"]

    again = compiled(model, "--pass", "fold_bn", "-o", "made/here")
    assert again.exit_code == 0, again.output


class OtherWriter:
    """Writes what only `OtherReader` reads."""

    suffix = ".other"

    def export(self, program: Program, path: Path, metadata: Mapping[str, str]) -> Artifact:
        path.write_text("a model")
        return Artifact(path, (path,), path.stat().st_size, 0.0)


class OtherReader:
    version = "other 1"
    inputs = (ArraySpec("input", "float32", (None, 4)),)

    def load(self, path: Path, threads: int) -> Any:
        assert path.read_text() == "a model"
        return self

    def run(self, arrays: Any) -> list[Any]:
        return []


def test_files_of_another_exporter_are_measured_and_have_no_card(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (EXPORTERS, RUNTIMES):
        monkeypatch.setattr(registry, "added", {})
    EXPORTERS.register("other", OtherWriter)
    RUNTIMES.register("other", OtherReader)
    done = compiled(model, "--pass", "fold_bn", "--exporter", "other", "--runtime", "other")
    assert done.exit_code == 0, done.output
    names = {"original.other", "model.other", "program", *REPORT_FILES, *DASHBOARDS}
    assert {entry.name for entry in Path("out").iterdir()} == names


def test_weights_that_runtimes_do_not_compute_in_are_refused_at_once_and_widened_on_request(model: str) -> None:
    narrow = model.replace("make", "narrow")
    refused = call("compile", narrow, "--pass", "fold_bn")
    assert refused.exit_code == 2
    assert "'0.weight' is bfloat16" in refused.output
    assert "--float32" in refused.output
    assert not Path("out").exists()
    done = compiled(narrow, "--pass", "fold_bn", "--float32")
    assert done.exit_code == 0, done.output
    assert lobo_fx.load("out/program").module(torch.ones(3, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", ["original.onnx", "model.onnx", *REPORT_FILES])
def test_a_place_that_can_not_be_written_to_is_refused_before_any_work(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    done = call("compile", model, "--pass", "fold_bn")
    assert done.exit_code == 2
    assert f"{name} is a folder" in " ".join(done.output.split())
    assert not (tmp_path / "was_built").exists()


def test_calibration_data_is_used(model: str) -> None:
    np.save("rows.npy", np.ones((6, 4), np.float32))
    for data in ("rows.npy", "net.py:data"):
        done = compiled(model, "--pass", "quantize_static", "--calibration-data", data, "--batch", "2")
        assert done.exit_code == 0, done.output
        assert "random data" not in done.output


@pytest.mark.usefixtures("model")
def test_outputs_are_chosen() -> None:
    done = compiled("net.py:two", "--pass", "prune_channels", "--outputs", "logits")
    assert done.exit_code == 0, done.output
    loaded = lobo_fx.load("out/program")
    assert [str(spec) for spec in loaded.program.signature.outputs] == ["logits: float32[batch, 2]"]
    assert loaded.module.get_parameter("up.weight").shape == (8 // 2, 4)
    assert json.loads(call("inspect", "net.py:two", "--outputs", "hidden", "--json").stdout)["parameters"] == 8 * 4 + 8
    refused = call("inspect", "net.py:two", "--outputs", "logit")
    assert refused.exit_code == 2
    assert "did you mean logits?" in refused.output


def test_files_are_packed_on_request(model: str) -> None:
    done = compiled(
        model.replace("make", "wide"), "--pass", "prune_weights", "--storage", "packed", "--values", "float16"
    )
    assert done.exit_code == 0, done.output
    artifacts = json.loads(Path("out/report.json").read_text())["artifacts"]
    packed = artifacts["compiled"]["details"]["packed"]
    assert packed["weights"]["0.weight"][0] == "mask, float16"
    assert artifacts["original"]["bytes"] - artifacts["compiled"]["bytes"] > packed["saved"] - 1000 > 10_000
    assert "model.onnx is packed" in done.output


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--storage", "sparse"], "storage is 'sparse'"), (["--values", "float16"], "give storage='packed' too")],
)
def test_a_storage_that_makes_no_sense_is_refused_before_any_work(given: list[str], said: str, model: str) -> None:
    refused = call("compile", model, "--pass", "fold_bn", *given)
    assert refused.exit_code == 2
    assert said in refused.output
    assert not Path("was_built").exists()


TUNE = ["--pass", "fine_tune:learning_rate=0.01,epochs=2"]


def tuned(report: str = "out/report.json") -> list[float]:
    rows = json.loads(Path(report).read_text())["passes"]
    return [row["score"] for row in rows]


def test_data_loss_and_score_of_the_users_file_train_a_model(model: str) -> None:
    own = ["--train-data", "net.py:labelled", "--evaluate", "net.py:score"]
    done = compiled(model, *TUNE, *own, "--loss", "net.py:loss")
    assert done.exit_code == 0, done.output
    first = tuned()
    assert first[1] > first[0]
    assert "4 batches in 2 epochs" in Path("out/report.md").read_text()
    done = compiled(model, *TUNE, *own, "--loss", "cross_entropy", "-o", "named")
    assert done.exit_code == 0, done.output
    assert tuned("named/report.json") == first


@pytest.mark.slow
def test_arrays_with_labels_train_a_model(model: str) -> None:
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    arrays = {"images": rows, "labels": rows.argmax(1) // 2}
    np.savez("rows.npz", images=rows.numpy(), labels=arrays["labels"].numpy())
    save_file(arrays, "rows.safetensors")
    data = (
        ["--train-data", "net.py:labelled"],
        *[["--train-data", f"rows.{end}", "--train-batch", "4"] for end in ("npz", "safetensors")],
    )
    found = []
    for given in data:
        done = compiled(model, *TUNE, *given, "--loss", "cross_entropy", "--evaluate", "net.py:score")
        assert done.exit_code == 0, done.output
        found.append(tuned())
    assert found[0] == found[1] == found[2]


def test_losses_by_name_are_those_of_outputs_and_labels() -> None:
    names = loss_names()
    assert {"cross_entropy", "mse_loss", "l1_loss", "nll_loss", "binary_cross_entropy_with_logits"} <= set(names)
    for name in names:
        target = torch.zeros(2).long() if name in ("cross_entropy", "nll_loss") else torch.ones(2, 3)
        if name.startswith("multi"):
            target = torch.zeros(2).long() if name == "multi_margin_loss" else torch.zeros(2, 3).long()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the mean that kl_div takes
            value = read_loss(name)(torch.rand(2, 3), target)
        assert value.dim() == 0, name


REFUSED: dict[str, tuple[list[str], str]] = {
    "neither passes nor recipe": ([], "give --recipe, or one or more --pass"),
    "both": (["--pass", "fold_bn", "--recipe", "balanced"], "give --recipe, or one or more --pass"),
    "a misspelt pass": (["--pass", "prunechannels"], "did you mean prune_channels?"),
    "a misspelt recipe": (["--recipe", "balancd"], "did you mean balanced?"),
    "a missing recipe": (["--recipe", "mine.yaml"], "no recipe file mine.yaml"),
    "a broken value": (["--pass", "prune_weights:amount=["], "the value of 'amount' is not YAML"),
    "an unknown setting": (["--pass", "prune_weights:amonut=1"], "did you mean amount?"),
    "a value out of range": (["--pass", "prune_weights:amount=2"], "amount is 2"),
    "no rounds": (["--pass", "fold_bn", "--rounds", "0"], "--rounds"),
    "no rows": (["--pass", "fold_bn", "--batch", "0"], "--batch"),
    "no threads": (["--pass", "fold_bn", "--threads", "-1"], "--threads"),
    "no batches": (["--pass", "quantize_static", "--batches", "0"], "--batches"),
    "a missing checkpoint": (["--pass", "fold_bn", "--checkpoint", "none.pt"], "none.pt"),
    "missing data": (["--pass", "quantize_static", "--calibration-data", "none.npy"], "no file none.npy"),
    "broken data": (["--pass", "quantize_static", "--calibration-data", "empty.npy"], "empty.npy is empty"),
    "a loss that is none": ([*TUNE, "--loss", "cros_entropy"], "did you mean cross_entropy?"),
    "a function that is no loss": ([*TUNE, "--loss", "relu"], "'relu' is no loss of torch.nn.functional"),
    "a loss in no file": ([*TUNE, "--loss", "none.py:loss"], "no file none.py"),
    "a misspelt loss": ([*TUNE, "--loss", "net.txt:loss"], "'net.txt:loss' names no function"),
    "a score in no file": ([*TUNE, "--evaluate", "none.py:score"], "no file none.py"),
    "a score without a function": ([*TUNE, "--evaluate", "none.py"], "'none.py' names no function"),
    "missing training data": ([*TUNE, "--train-data", "none.npz"], "no file none.npz"),
    "training data without labels": ([*TUNE, "--train-data", "unlabelled.npz"], "did you mean label?"),
    "labels without inputs": ([*TUNE, "--train-data", "labels.npz"], "holds labels and no inputs"),
    "one array to train on": ([*TUNE, "--train-data", "empty.npy"], "training data has labels too"),
    "no training rows": ([*TUNE, "--train-batch", "0"], "--train-batch"),
    "a file for a folder": (["--pass", "fold_bn", "-o", "empty.npy"], "can't make the folder"),
    "a folder of something else": (["--pass", "fold_bn", "-o", "taken"], "holds other files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused_before_any_work(name: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "unlabelled.npz", images=np.ones((4, 4)), label=np.ones(4))
    np.savez(tmp_path / "labels.npz", labels=np.ones(4))
    (tmp_path / "taken" / "program").mkdir(parents=True)
    (tmp_path / "taken" / "program" / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments, words = REFUSED[name]
    done = call("compile", model, *arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--drop", "0.1"], "error: --drop needs --evaluate"),
        (["--pass", "fit_goal:drop=0.1"], "fit_goal needs --evaluate"),
        ([*TUNE, "--loss", "cross_entropy"], "fine_tune needs --train-data"),
        (["--pass", "fold_bn", "--lower-is-better"], "give --evaluate"),
        (
            ["--pass", "fold_bn", "--evaluate", "own.py:mean_loss"],
            "give --lower-is-better, or --higher-is-better where it is a score after all",
        ),
        (["--pass", "fold_bn", "--workdir", "taken"], "can't make the folder taken"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_read(
    tmp_path: Path, given: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    Path("own.py").write_text("def mean_loss(module):\n    return 1.0\n")
    done = call("compile", "none.py:net", *given)
    assert done.exit_code == 2, done.output
    assert words in done.output


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--evaluate", "net.py:scoer"], "net.py has no function 'scoer'; did you mean score?"),
        (["--loss", "net.py:losss"], "did you mean loss?"),
        (["--train-data", "net.py:label"], "did you mean labelled?"),
        (["--train-data", "net.py:labelled"], "fine_tune needs --loss"),
        (["--loss", "cross_entropy"], "fine_tune needs --train-data"),
        (["--train-data", "net.py:score", "--loss", "cross_entropy"], "score"),
    ],
)
def test_what_a_file_lacks_is_said_and_no_folder_made(model: str, given: list[str], words: str) -> None:
    done = call("compile", model, *TUNE, *given)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet50", "names no model"),
        ("net.py:mkae", "did you mean make"),
        ("none.py:make", "no file none.py"),
        ("none.pt2", "no file none.pt2"),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_wrong_model_makes_no_folder(spec: str, words: str) -> None:
    for command in (["compile", spec, "--pass", "fold_bn"], ["inspect", spec]):
        done = call(*command)
        assert done.exit_code == 2
        assert words in " ".join(done.output.split())
    assert not Path("out").exists()


def test_benchmark_measures_files(model: str) -> None:
    assert compiled(model, "--pass", "fold_bn").exit_code == 0
    done = call("benchmark", "out/original.onnx", "out/model.onnx", "--rounds", "2", "--batch", "3", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found["latencies"]) == ["original.onnx", "model.onnx"]
    assert (found["batch"], found["rounds"]) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.onnx"], "none.onnx"),
        (["bad.onnx"], "can't load bad.onnx"),
        (["empty.onnx"], "empty.onnx is empty"),
        (["bad.onnx", "bad.onnx"], "a file is given twice"),
        (["bad.onnx", "--rounds", "0"], "--rounds"),
        (["bad.onnx", "--length", "0"], "--length"),
        (["bad.onnx", "--runtime", "onnxruntimes"], "did you mean onnxruntime?"),
    ],
)
def test_benchmark_refuses_what_it_can_not_measure(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.onnx").write_text("hello")
    Path("empty.onnx").touch()
    done = call("benchmark", *arguments)
    assert done.exit_code == 2, done.output
    assert words in " ".join(done.output.split())


def test_inspect_and_passes_print_json(model: str) -> None:
    facts = json.loads(call("inspect", model, "--json").stdout)
    assert facts["parameters"] == 4 * 8 + 8 + 8 * 2 + 2
    known = json.loads(call("passes", "--json").stdout)
    assert "prune_weights" in [entry["name"] for entry in known["passes"]]
    assert "balanced" in known["recipes"]


def test_costs_are_printed_and_written(tmp_path: Path, model: str) -> None:
    done = call("costs", model, "-o", str(tmp_path / "table.json"))
    assert done.exit_code == 0, done.output
    assert "Microseconds on" in done.output
    assert "operators run as integers in onnxruntime" in done.output
    assert json.loads((tmp_path / "table.json").read_text())["costs"]
    known = json.loads((tmp_path / "table.json").read_text())["costs"]
    assert call("costs", model, "--widths", "-o", str(tmp_path / "widths.json")).exit_code == 0
    assert set(known) < set(json.loads((tmp_path / "widths.json").read_text())["costs"])
    refused = call("costs", model, "-o", str(tmp_path / "none" / "table.json"))
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", f"{'x' * 300}.py:make", "--pass", "fold_bn"],
        ["compile", f"{'x' * 300}.pt2", "--pass", "fold_bn"],
        ["compile", f"transformers:{'x' * 300}", "--pass", "fold_bn"],
        ["compile", "net.py:make", "--recipe", f"{'x' * 300}.yaml"],
        ["compile", "net.py:make", "--pass", "quantize_static", "--calibration-data", f"{'x' * 300}.npz"],
        ["inspect", f"{'x' * 300}.onnx"],
        ["report", "x" * 300],
    ],
)
def test_paths_that_no_file_can_have_are_refused_in_words(model: str, arguments: list[str]) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.exception
    assert "File name too long" in done.output or "transformers has no model" in done.output


@pytest.mark.parametrize("command", ["inspect", "costs", "compile --pass fold_bn"])
def test_example_inputs_of_a_wrong_type_are_refused_in_words(model: str, command: str) -> None:
    """`torch.export` accepts them: it looks at shapes alone."""
    np.save("rows.npy", np.ones((2, 4)))
    done = call(*command.split(), model, "--example-inputs", "rows.npy")
    assert done.exit_code == 2, done.exception
    assert r"does not run on its example inputs (input: float64[batch, 4])" in done.output
    assert "same dtype" in done.output


def test_an_output_that_is_full_is_said() -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("needs Linux")
    with full.open("w") as stdout:
        call = [sys.executable, "-m", "lobo_fx", "recipes", "--json"]
        done = subprocess.run(call, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: can't write to standard output: No space left on device\n"


def test_what_user_code_prints_is_no_part_of_the_json(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(f"print('read')\n{MODEL}\n\ndef made():\n    print('made')\n    return make()\n")
    done = call("inspect", f"{tmp_path / 'net.py'}:made", "--json")
    assert json.loads(done.stdout)["parameters"] == 58
    assert done.stderr == "read\nmade\n"
    assert "read\nmade\n" in call("inspect", f"{tmp_path / 'net.py'}:made").stdout
