"""The schema of report.json: written down, complete, and what does not fit it is refused with a sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lobo_fx import Artifact, InvalidInput, Report
from lobo_fx.graph.notes import Note
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.measures.module_figures import ModuleFigures
from lobo_fx.report.reading import read_report
from lobo_fx.report.records import AxisRow, CandidateRow, ModuleRow, Row, Sheet
from lobo_fx.report.schema import SCHEMA, first_fault, schema

DOCUMENT = Path(__file__).parents[2] / "docs" / "report_schema.json"


def full() -> Report:
    latency = Latency(9.0, 10.0, 14.0, 10.5, 100.0, 90_000_000, 40_000_000)
    return Report(
        "Network",
        [Row("original", 10, 10, 0.0, None, 40, math.inf, 0.5, 0.0), Row("p", 10, 5, 0.5, 7, 40, -3.5, None, 1.0)],
        [Note("stays float", "quantize_static", "aten.add.Tensor", "layer1.0", "net.py:3: x + y")],
        {"original": Artifact(Path("gone/original.onnx"), (Path("gone/original.onnx"),), 5, math.nan, {"opset": 20})},
        Benchmark("onnxruntime 1", 1, 1, 30, {"original": latency}),
        [Sheet("sensitivity", ("layer", "dB"), (("conv", 30.5), ("<b>", "inf")))],
        [CandidateRow("int8", 0.5, True, 4, math.inf, None, True)],
        [AxisRow("conv1.weight[0]", 3, 64, 32, 9408)],
        [("quantize_static", {"observer": "mse", "kernels": None})],
        7,
        modules=[
            ModuleRow("", ModuleFigures("", None, 10, 10, 40, "float32", "float32", 12.5), None, math.inf),
            ModuleRow("conv", None, ModuleFigures("convolution", 4, 10, 9, 12, "int8", "int8"), 30.5),
        ],
    )


def saved(folder: Path, **changes: Any) -> Path:
    content = json.loads(full().to_json()) | changes
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(content))
    return folder


def test_the_document_is_what_the_records_say() -> None:
    """`python -m lobo_fx.report.schema > docs/report_schema.json` writes it anew."""
    assert json.loads(DOCUMENT.read_text(encoding="utf-8")) == schema()


def test_every_entry_of_every_record_is_described() -> None:
    whole = schema()
    described = {"report": whole, **whole["$defs"]}
    bare = {(name, key) for name, one in described.items() for key, entry in one["properties"].items()
            if "description" not in entry}  # fmt: skip
    assert bare == {("report", "schema")}
    records = "Artifact AxisRow Benchmark CandidateRow Latency ModuleFigures ModuleRow Note Row Sheet"
    assert list(whole["$defs"]) == records.split()


def test_a_report_fits_and_reads_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lobo_fx.report.report.dashboards", lambda runs: {})
    report = full()
    written = json.loads(report.to_json())
    assert first_fault(written) is None
    assert written["schema"] == SCHEMA
    report.save(tmp_path / "run")
    assert first_fault(json.loads((tmp_path / "run" / "report.json").read_text())) is None
    back = read_report(tmp_path / "run")
    assert back.as_json() == report.as_json(), "a file that is gone keeps its size"
    assert (back.seed, back.settings, back.candidates) == (7, report.settings, report.candidates)
    assert back.rows[0].snr == math.inf
    assert Report.from_json(written).artifacts == {}, "a program that is loaded exports anew"


def test_a_report_from_before_modules_were_in_it_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run")
    content = json.loads((folder / "report.json").read_text())
    del content["modules"]
    (folder / "report.json").write_text(json.dumps(content))
    assert read_report(folder).modules == []
    with pytest.raises(InvalidInput, match=r"report.modules\[0\] lacks 'name'"):
        read_report(saved(tmp_path / "bad", modules=[{}]))


def test_a_report_from_before_ratios_were_taken_by_round_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run")
    content = json.loads((folder / "report.json").read_text())
    for latency in content["benchmark"]["latencies"].values():
        del latency["cpu_ratio"]
    (folder / "report.json").write_text(json.dumps(content))
    found = read_report(folder).benchmark
    assert found is not None
    assert all(latency.cpu_ratio is None for latency in found.latencies.values())


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_another_schema_is_refused(tmp_path: Path, number: object) -> None:
    with pytest.raises(InvalidInput, match=f"has schema {number!r}; this version reads schema 1"):
        read_report(saved(tmp_path / "run", schema=number))
    with pytest.raises(InvalidInput, match="reads schema 1"):
        Report.from_json({"schema": number})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": "one"}, r"report.seed is \"one\""),
        ({"seed": True}, "report.seed is true"),
        ({"passes": [{"name": "original"}]}, r"report.passes\[0\] lacks 'parameters'"),
        ({"passes": {}}, "report.passes is {}, no array"),
        ({"versions": {"torch": 2}}, "report.versions.torch is 2, no string"),
        ({"more": 1}, None),
        ({"artifacts": {"a": {"size": 1}}}, "report.artifacts.a lacks 'path'"),
        ({"settings": [["one"]]}, r"report.settings\[0\] holds 1 entries, not 2"),
        ({"settings": [["one", "two"]]}, r"report.settings\[0\]\[1\] is \"two\", no object"),
        ({"settings": [[1, {}]]}, r"report.settings\[0\]\[0\] is 1, no string"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], said: str | None) -> None:
    folder = saved(tmp_path / "run", **changes)
    if said is None:
        assert read_report(folder).model == "Network"
        return
    with pytest.raises(InvalidInput, match=said):
        read_report(folder)


def test_a_folder_without_a_report_or_without_a_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").touch()
    with pytest.raises(InvalidInput, match=r"report\.json is a file; give its folder, .*run$"):
        read_report(tmp_path / "run" / "report.json")
    with pytest.raises(InvalidInput, match=r"holds no report\.json"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text('{"model": "m"}')
    with pytest.raises(InvalidInput, match="no schema number"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InvalidInput, match="is no JSON file"):
        read_report(tmp_path)
