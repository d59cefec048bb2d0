"""The report: what is in it, that every format reads back, and that names stay names."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import html
import io
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from torch import nn

import lobo_fx
from lobo_fx import Artifact, InvalidInput, Report
from lobo_fx.graph.notes import Note
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.passes import PruneChannels, PruneWeights, QuantizeStatic
from lobo_fx.report.dashboards import DASHBOARDS
from lobo_fx.report.records import Row, Sheet
from lobo_fx.terminal.tables import decimals, escape, new_table, printable, render, to_markdown

NAMES = ["a|b", "<script>alert(1)</script>", "**bold** *it*", "`code`", "back\\slash", "a&lt;b", "[link](javascript:x)"]


def row(name: str = "original", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "parameters": 1_234_567,
        "nonzero": 600_000,
        "sparsity": 0.5140,
        "macs": 98_765_432,
        "bytes": 4_938_268,
        "snr": math.inf,
        "score": None,
        "seconds": 0.25,
    }
    return Row(name=name, **(values | changes))


def artifact(path: Path, parity: float, **details: Any) -> Artifact:
    return Artifact(path=path, files=(path,), bytes=path.stat().st_size, parity=parity, details=details)


@pytest.fixture
def artifacts(tmp_path: Path) -> dict[str, Artifact]:
    for name, size in (("original.onnx", 4_000_000), ("model.onnx", 1_000_000)):
        (tmp_path / name).write_bytes(b"\0" * size)
    details: dict[str, Any] = {"opset": 20, "kernels": {"QLinearConv": 3, "QGemm": 1}}
    return {
        "original": artifact(tmp_path / "original.onnx", 1e-7, opset=20),
        "compiled": artifact(tmp_path / "model.onnx", 0.0123, **details),
    }


@pytest.fixture
def report(artifacts: dict[str, Artifact]) -> Report:
    slow = Latency(p5=9.0, p50=10.0, p95=14.0, cpu=10.5, throughput=100.0, memory=90_000_000, base_memory=40_000_000)
    fast = Latency(p5=2.0, p50=2.5, p95=3.0, cpu=2.625, throughput=400.0)
    return Report(
        model="Network",
        rows=[row(score=0.9876), row("QuantizeStatic()", snr=41.2345, score=0.9831, bytes=1_300_000, seconds=12.34)],
        notes=[Note("the first note"), Note("the second note")],
        artifacts=artifacts,
        benchmark=Benchmark("onnxruntime 1.0", 1, 1, 30, {"original": slow, "compiled": fast}),
    )


def cells(markdown: str, heading: str) -> list[list[str]]:
    """The rows of the table under a heading, split at bars that are not escaped."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# Formats.


def test_markdown_holds_every_row(report: Report) -> None:
    markdown = report.to_markdown()
    assert markdown.startswith("# Network\n")
    header, rule, *found = cells(markdown, "Passes")
    assert set("".join(rule)) <= set("-:")
    assert len(rule) == len(header)
    assert [dict(zip(header, line, strict=True)) for line in found] == [
        {
            "pass": "original",
            "params": "1,234,567",
            "non-zero": "600,000",
            "sparsity": "51.4%",
            "MACs": "98.8M",
            "MB in memory": "4.94",
            "SNR dB": "=",
            "score": "0.9876",
            "seconds": "0.2",
        },
        {
            "pass": "QuantizeStatic()",
            "params": "1,234,567",
            "non-zero": "600,000",
            "sparsity": "51.4%",
            "MACs": "98.8M",
            "MB in memory": "1.30",
            "SNR dB": "41.2",
            "score": "0.9831",
            "seconds": "12.3",
        },
    ]
    assert "- the first note\n- the second note\n" in markdown
    assert f"Measured on {report.machine}, with lobo_fx {lobo_fx.__version__}, torch" in markdown


def test_markdown_holds_files_and_latencies(report: Report) -> None:
    markdown = report.to_markdown()
    header, _, *found = cells(markdown, "Files")
    by_label = {line[1]: dict(zip(header, line, strict=True)) for line in found}
    assert by_label["compiled"]["file"] == "model.onnx"
    assert by_label["compiled"]["MB"] == "1.00"
    assert by_label["compiled"]["of original"] == "0.25"
    assert by_label["compiled"]["gzip MB"] == "not measured"
    assert by_label["compiled"]["parity"] == "1.2e-02"
    assert by_label["compiled"]["kernels"] == "3 QLinearConv, 1 QGemm"
    header, _, *found = cells(markdown, "Latency")
    by_label = {line[0]: dict(zip(header, line, strict=True)) for line in found}
    assert by_label["original"]["p50 ms"] == "10.00"
    assert by_label["original"]["peak MB"] == "90"
    assert by_label["original"]["model MB"] == "50"
    assert by_label["compiled"]["CPU ratio"] == by_label["compiled"]["p50 ratio"] == "0.25"
    assert by_label["compiled"]["peak MB"] == by_label["compiled"]["model MB"] == "not measured"
    assert "onnxruntime 1.0, 1 thread, batch 1, 30 rounds" in markdown


def test_gzip_sizes_are_shown_once_they_were_asked_for(report: Report) -> None:
    compiled = report.artifacts["compiled"]
    assert report.artifacts["compiled"].known_gzip_bytes is None
    size = compiled.gzip_bytes
    assert 0 < size < 20_000, "zeros compress"
    assert compiled.known_gzip_bytes == size
    header, _, *found = cells(report.to_markdown(), "Files")
    line = next(line for line in found if line[1] == "compiled")
    assert line[header.index("gzip MB")] == f"{size / 1e6:.3g}"
    assert json.loads(report.to_json())["artifacts"]["compiled"]["gzip_bytes"] == size


def test_csv_reads_back_with_raw_numbers(report: Report) -> None:
    report.rows.append(row('a "quoted", name\nof two lines', macs=None, snr=-3.5))
    found = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["name"] for line in found] == [r.name for r in report.rows]
    for line, expected in zip(found, report.rows, strict=True):
        assert list(line) == [field.name for field in dataclasses.fields(Row)]
        for field, value in dataclasses.asdict(expected).items():
            if value is None:
                assert line[field] == ""
            elif isinstance(value, str):
                assert line[field] == value
            else:
                assert float(line[field]) == value


def test_json_reads_back_with_everything(report: Report) -> None:
    constants: list[str] = []
    found = json.loads(report.to_json(), parse_constant=constants.append)
    assert constants == [], "NaN and Infinity are no JSON"
    assert found["model"] == "Network"
    assert [Note(**note) for note in found["notes"]] == report.notes
    assert found["passes"] == [
        dataclasses.asdict(r)
        | {name: "inf" if getattr(r, name) == math.inf else getattr(r, name) for name in ("snr", "worst")}
        for r in report.rows
    ]
    compiled = found["artifacts"]["compiled"]
    assert compiled["path"] == str(report.artifacts["compiled"].path)
    assert (compiled["bytes"], compiled["parity"], compiled["details"]["opset"]) == (1_000_000, 0.0123, 20)
    assert compiled["details"]["kernels"] == {"QLinearConv": 3, "QGemm": 1}
    assert found["benchmark"]["latencies"]["compiled"]["p50"] == 2.5
    assert found["benchmark"]["latencies"]["compiled"]["memory"] is None
    assert "Python" in found["machine"]


def test_json_of_a_bare_report_is_complete() -> None:
    found = json.loads(Report("m", [row()]).to_json())
    assert found["artifacts"] == {}
    assert found["benchmark"] is None
    assert found["notes"] == []


def test_saving_writes_every_form(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    written = report.save(folder)
    assert [path.name for path in written] == ["report.md", "report.csv", "report.html", *DASHBOARDS, "report.json"]
    assert written[0].read_text(encoding="utf-8") == report.to_markdown()
    assert written[1].read_text(encoding="utf-8") == report.to_csv()
    assert written[2].read_text(encoding="utf-8") == report.to_html()
    saved = json.loads(written[-1].read_text(encoding="utf-8"))
    assert saved.pop("files") == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written[:-1]}
    assert saved == json.loads(report.to_json())
    assert report.save(folder) == written


def test_a_report_that_can_not_be_written_leaves_the_older_one(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report")
    before = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    report.notes.append(Note("\ud800 is no text"))
    with pytest.raises(UnicodeEncodeError):
        report.save(tmp_path / "report")
    assert {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="can't make the folder"):
        report.save(tmp_path / "file")


def test_the_terminal_shows_tables_and_notes(report: Report) -> None:
    text = str(report)
    for word in ("Network", "QuantizeStatic()", "41.2", "model.onnx", "0.25", "note: the second note"):
        assert word in text
    assert "score" in text
    bare = str(Report("Network", [row()]))
    assert "score" not in bare
    assert "files" not in bare


def test_notes_of_many_layers_are_one_for_people_and_all_there_for_programs() -> None:
    names = [f"layers.{index}" for index in range(12)]
    notes = [Note("stays float", "", "aten.add.Tensor", name, "net.py:4: x + y") for name in names]
    notes += [Note("stays float", "", "aten.add.Tensor", "head", "net.py:9: a + b"), Note("a note")]
    notes += [Note("is left alone", parameter=name) for name in names[:2]]
    report = Report("m", [row()], notes=notes)

    def shown(text: str) -> list[str]:
        return [line.removeprefix("note: ") for line in text.splitlines() if line.startswith("note: ")]

    assert shown(str(report)) == [
        "'layers.0', 'layers.1' and 11 others: each stays float",
        "a note",
        "'layers.0' and 'layers.1': each is left alone",
    ]
    assert shown(report.to_text(verbose=True)) == [
        "aten.add.Tensor in 12 modules, 'layers.0', 'layers.1' and others (net.py:4: x + y) stays float",
        *notes[12:14],
        "'layers.0' and 'layers.1': each is left alone",
    ]
    two = Report("m", [row()], notes=notes[3:5])
    assert shown(str(two)) == ["'layers.3' and 'layers.4': each stays float"]
    assert shown(two.to_text(verbose=True)) == [
        "aten.add.Tensor in modules 'layers.3' and 'layers.4' (net.py:4: x + y) stays float"
    ]
    assert [Note(**note) for note in json.loads(report.to_json())["notes"]] == notes


def test_notes_that_differ_in_quantities_alone_are_one_with_ranges() -> None:
    def took(name: str, floating: int, integer: int) -> Note:
        return Note(f"stays float: {floating} µs, as integers {integer} µs in 3x3", module=name)

    notes = [took("a", 42, 23), took("b", 7, 23), took("c", 110, 23), Note("stays float: 12 µs in 5x5", module="d")]
    lines = [line for line in str(Report("m", [row()], notes=notes)).splitlines() if line.startswith("note: ")]
    assert lines == [
        "note: 'a', 'b' and 1 other: each stays float: 7 to 110 µs, as integers 23 µs in 3x3",
        "note: 'd' stays float: 12 µs in 5x5",
    ]


def test_what_was_not_measured_says_so() -> None:
    report = Report("m", [row(score=0.5), row("later", macs=None, score=None)])
    header, _, _, line = cells(report.to_markdown(), "Passes")
    assert line[header.index("MACs")] == "not measured"
    assert line[header.index("score")] == "not measured"


@pytest.mark.parametrize("snr", [-math.inf, math.nan])
def test_a_ratio_that_is_no_agreement_is_not_shown_as_one(snr: float) -> None:
    """Only exactly equal outputs, an infinite ratio, are shown as equal."""
    report = Report("m", [row(), row("bad", snr=snr)])
    header, _, first, line = cells(report.to_markdown(), "Passes")
    assert first[header.index("SNR dB")] == "="
    assert line[header.index("SNR dB")] != "="


# Names.


@pytest.mark.parametrize("name", NAMES)
def test_names_are_not_read_as_markdown(name: str) -> None:
    """Oracle: what a markdown reader makes of the text, here undone by hand, is the name again."""
    escaped = escape(name)
    plain = re.sub(r"\\([\\`*|\[\]()_<>])", r"\1", escaped)
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        plain = plain.replace(entity, character)
    assert plain == name
    assert "<" not in escaped
    for character in "|*`[":
        assert not re.search(rf"(?<!\\){re.escape(character)}", escaped.replace("\\\\", ""))


def test_figures_of_small_models_keep_their_digits(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\0" * 23_476)
    found = {"compiled": artifact(tmp_path / "model.onnx", 0.0)}
    times = {"compiled": Latency(0.00954, 0.0102, 0.0119, 0.0101, 100.0)}
    small = Report("net", [row(macs=47_744, bytes=21_936)], artifacts=found, benchmark=Benchmark("rt", 1, 1, 3, times))
    for text in (small.to_text(), small.to_markdown()):
        for figure in ("47,744", "0.0219", "0.0235", "0.00954", "0.0102", "0.0119", "0.0101"):
            assert figure in text
    page = small.to_html()
    assert all(figure in page for figure in ("47,744", "21.94 kB", "23.48 kB"))
    assert decimals(0.0) == "0.00"
    assert decimals(-12.345) == "-12.35"


BLOCKS = ["# heading", "> quoted", "- item", "+ item", "1. item", "12) item", "---", "===", "~~~", "1.", "-"]
INLINE = [
    "_x_",
    "a _b_ c",
    "__init__",
    "snake_case_name",
    "a_",
    "~~struck~~",
    "-0.6%",
    "1.5",
    "#1",
    "_conv_.bn_",
    "ö_x_",
]


@pytest.mark.parametrize("name", [*NAMES, *BLOCKS, *INLINE])
@pytest.mark.parametrize("before", ["# ", "- ", ""], ids=["heading", "item", "paragraph"])
def test_a_reader_of_markdown_sees_the_name(before: str, name: str) -> None:
    """Oracle: another project's reader, whose page must hold the name and no mark-up but the line's own."""
    page = MarkdownIt().enable(["table", "strikethrough"]).render(before + escape(name))
    bare = re.sub(r"</?(h1|ul|li|p)>|\n", "", page)
    assert html.unescape(bare) == name
    assert "<" not in bare


def test_a_reader_of_markdown_sees_what_is_not_escaped() -> None:
    for name in ("_x_", "~~struck~~"):
        assert name not in MarkdownIt().enable("strikethrough").render(name)


def test_titles_of_sheets_are_escaped() -> None:
    report = Report("net", [row()], sheets=[Sheet("<b>*own*</b>", ("a",), (("1",),))])
    assert "## &lt;b>\\*own\\*&lt;/b>\n" in report.to_markdown()


@pytest.mark.parametrize("name", NAMES)
def test_names_break_no_table(name: str) -> None:
    report = Report(name, [row(name), row("next")], notes=[Note(f"{name} was left alone")])
    markdown = report.to_markdown()
    header, _, *found = cells(markdown, "Passes")
    assert [len(line) for line in found] == [len(header)] * 2
    assert found[0][0] == escape(name)
    assert found[1][0] == "next"
    assert f"# {escape(name)}\n" in markdown
    assert f"- {escape(name)} was left alone\n" in markdown
    assert "<script>" not in markdown


def test_names_of_files_are_escaped_too(tmp_path: Path) -> None:
    path = tmp_path / "a|b <script> *.onnx"
    path.write_bytes(b"x")
    report = Report("m", [row()], artifacts={"lab|el": artifact(path, 0.0, kernels={"<Op>": 1})})
    latency = Latency(1.0, 1.0, 1.0, 1.0, 1.0)
    report.benchmark = Benchmark("run|time <b>", 1, 1, 1, {"fi|le": latency})
    markdown = report.to_markdown()
    assert "<script>" not in markdown
    assert "<b>" not in markdown
    header, _, line = cells(markdown, "Files")
    assert len(line) == len(header)
    assert line[0] == escape(path.name)
    header, _, line = cells(markdown, "Latency")
    assert len(line) == len(header)


def test_a_line_break_in_a_name_breaks_no_table() -> None:
    markdown = Report("two\nlines", [row("first\nsecond"), row("next")], notes=[Note("one\n# two")]).to_markdown()
    header, _, *found = cells(markdown, "Passes")
    assert [len(line) for line in found] == [len(header)] * 2
    assert [line for line in markdown.splitlines() if line.startswith("# ")] == [markdown.splitlines()[0]]


@pytest.mark.parametrize("name", ["Net[int]", "[red]alert", "[/b]", "a[b][/b]", r"\[x]"])
def test_brackets_in_names_are_shown_as_they_are(name: str) -> None:
    """The library that draws tables reads `[red]` as a colour and stumbles over `[/b]`."""
    report = Report(name, [row(name)], notes=[Note(name)])
    text = str(report)
    assert text.count(name) == 3
    title = new_table(name, ["file"])
    assert name in render(title)
    assert escape(name) in to_markdown(title)


# From a compilation.


def compiled(tmp_path: Path) -> lobo_fx.Result:
    x = torch.randn(2, 4)
    result = lobo_fx.compile(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(),
        [PruneWeights(0.5), QuantizeStatic(kernels="all")],
        example_inputs=x,
        calibration_data=[x],
        evaluate=lambda module: float(module(x).detach().sum()),
        progress=False,
    )
    result.export(tmp_path / "model.onnx")
    return result


def test_a_compilation_reports_a_row_per_pass_and_what_it_wrote(tmp_path: Path) -> None:
    result = compiled(tmp_path)
    report = result.report
    assert [r.name for r in report.rows] == ["original", "PruneWeights()", "QuantizeStatic(kernels='all')"]
    assert report.model == "Sequential"
    first, pruned, quantized = report.rows
    assert first.snr == math.inf
    assert pruned.nonzero == 4 * 8 // 2 + 8 * 2 // 2 + 10
    assert pruned.snr > quantized.snr - 6
    assert all(r.score is not None for r in report.rows)
    assert str(result) == str(report)
    header, _, *found = cells(report.to_markdown(), "Files")
    assert [line[header.index("of original")] for line in found] == ["not measured"]

    # a file that was moved away is no reason to lose the report
    (tmp_path / "model.onnx").unlink()
    assert "QuantizeStatic(kernels='all')" in str(result)
    assert "QuantizeStatic(kernels='all')" in report.to_markdown()
    result.save(tmp_path / "saved")
    assert [r.name for r in lobo_fx.load(tmp_path / "saved").report.rows] == [r.name for r in report.rows]


# Names that others chose.


def test_control_characters_reach_no_terminal() -> None:
    """An escape sequence in a name would move the cursor, hide lines or set the window's title."""
    hostile = "a\x1b[2Jb\x9b1mc\x07d\re\x00\u202e\u2066f"
    report = Report(hostile, [row(hostile)], [Note(f"{hostile}\tnote")])
    for text in (str(report), report.to_markdown()):
        assert not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf")]
        assert "2Jb1mcdef" in text
    assert "ef note" in str(report)
    assert printable("naïve → 日本 👩‍🔬\n") == "naïve → 日本 👩‍🔬\n"


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_spreadsheet_computes_no_name(name: str) -> None:
    report = Report("m", [row(name, snr=-3.5), row(f"a{name}")])
    first, second = csv.DictReader(io.StringIO(report.to_csv()))
    assert first["name"] == f"'{name}"
    assert second["name"] == f"a{name}"
    assert float(first["snr"]) == -3.5


def test_two_passes_that_add_the_same_sheet_draw_two_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lobo_fx.report.report.can_draw", lambda: True)
    monkeypatch.setattr("lobo_fx.report.report.draw", lambda sheet: sheet.title.encode())
    sheets = [Sheet(title, ("a", "b"), ()) for title in ("refitting", "refitting", "sensitivity", "refitting")]
    written = Report("m", [row()], sheets=sheets).save(tmp_path)
    assert [file.name for file in written[5:-1]] == [
        "refitting.png",
        "refitting 2.png",
        "sensitivity.png",
        "refitting 3.png",
    ]


def test_a_pruned_model_reports_its_axes_its_settings_and_its_seed() -> None:
    """Oracle: the widths of the modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12 * 4, 5)).eval()
    result = lobo_fx.compile(
        model, [PruneChannels(0.5)], example_inputs=torch.randn(2, 3, 6, 6), seed=3, progress=False
    )
    report = result.report
    axes = {axis.name: axis for axis in report.axes}
    first = axes["0.weight[0]"]
    assert (first.before, first.after, first.members) == (8, 4, 3), "its weight, its bias, the next one's input"
    assert first.parameters == 8 * 3 * 9 + 8 + 12 * 8 * 9
    assert axes["2.weight[0]"].after == result.module.state_dict()["2.weight"].shape[0] == 6
    assert (report.seed, [name for name, _ in report.settings]) == (3, ["prune_channels"])
    assert report.settings is result.passes
    assert report.settings[0][1]["ratio"] == 0.5
    assert {"lobo_fx", "torch", "onnxruntime"} == set(report.versions)
    assert "| 0.weight\\[0] | 8 | 4 | 50.0% |" in report.to_markdown()
    assert lobo_fx.compile(model, [], example_inputs=torch.randn(2, 3, 6, 6), progress=False).report.axes == []


def test_without_jinja2_or_matplotlib_the_other_forms_are_written(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("can_render", "can_draw"):
        monkeypatch.setattr(f"lobo_fx.report.report.{name}", lambda: False)
    assert [path.name for path in report.save(tmp_path)] == ["report.md", "report.csv", "report.json"]


def test_a_full_disk_leaves_the_older_report(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lobo_fx.report.report.dashboards", lambda runs: dict.fromkeys(DASHBOARDS, runs[0].model.encode())
    )
    report.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    report.model = "another"
    write = Path.write_bytes

    def fails(path: Path, content: bytes) -> int:
        if path.name == "report.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(InvalidInput, match="No space left"):
        report.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
