"""The page: its numbers are the report's, names stay names; and as headless Chromium shows it.

There: numbers, hover, sorting, filter, two widths, light and dark; no error, no request, nothing wider than the page.
"""

from __future__ import annotations

import fcntl
import html.parser
import json
import math
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lobo_fx import Artifact, Report
from lobo_fx.graph.notes import Note
from lobo_fx.measures.latency import Benchmark, Latency
from lobo_fx.measures.module_figures import ModuleFigures
from lobo_fx.report.comparison import Comparison
from lobo_fx.report.records import AxisRow, CandidateRow, ModuleRow, Row, Sheet

HOSTILE = "</script><img src=http://example.com/x onerror=alert(1)>"
WIDTHS = (400, 1400)
SHOWN = [
    *((400, True), (1400, False)),
    *(pytest.param(width, dark, marks=pytest.mark.slow) for width, dark in ((400, False), (1400, True))),
]
"""Widths and whether the page is dark: colours move nothing, so that each is met once."""
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """Chromium, driven through two pipes by its DevTools protocol: a JSON text for each message, a null between."""

    def __init__(self, program: str, folder: Path) -> None:
        for_it, self.commands = os.pipe()
        self.answers, from_it = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (for_it, from_it)]
        options = [*OPTIONS, f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = ["bash", "-c", script, "bash", program, *options, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (for_it, from_it, *ends):
            os.close(end)
        self.events: list[dict[str, Any]] = []
        self._number, self._rest = 0, b""

    def call(self, method: str, session: str = "", **arguments: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        command: dict[str, Any] = {"id": self._number, "method": method, "params": arguments}
        os.write(self.commands, json.dumps(command | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self.events.append(message)

    def wait_for(self, method: str, session: str) -> None:
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._read())

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self.answers, 1 << 20) if ready else b""
            assert part, "Chromium does not answer"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def close(self) -> None:
        os.close(self.commands)  # Chromium ends with its pipe
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.answers)


class Page:
    """A page in a browser of a given width."""

    def __init__(self, browser: Browser, file: Path, width: int, dark: bool = False) -> None:
        self.browser, self.url = browser, file.as_uri()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=self.url)
        browser.wait_for("Page.loadEventFired", self.session)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **arguments)

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=f"(() => {{ {script} }})()", returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def hover(self, selector: str) -> None:
        """Moves the mouse over the middle of an element."""
        place = self.run(
            f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', "
            "behavior: 'instant'}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    def faults(self) -> list[str]:
        """What went wrong since it was opened: errors, and requests beyond the page itself."""
        found = []
        self.run("return 0")
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, given = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            if method == "Runtime.consoleAPICalled" or (
                method == "Log.entryAdded" and given["entry"]["level"] == "error"
            ):
                found.append(str(given))
            if method == "Network.requestWillBeSent" and given["request"]["url"] not in (self.url, "data:,"):
                found.append(f"asked for {given['request']['url']}")
        return found

    def too_wide(self) -> list[str]:
        """Elements that reach beyond the page, apart from what scrolls in a frame of its own."""
        wide: list[str] = self.run(
            "const width = document.documentElement.clientWidth; const found = [];"
            "if (document.documentElement.scrollWidth > width) found.push('the page itself');"
            "for (const e of document.querySelectorAll('body *')) {"
            "  if (e.closest('.scroll') && !e.matches('.scroll')) continue;"
            "  const r = e.getBoundingClientRect();"
            "  if (r.width && (r.right > width + 0.5 || r.left < -0.5)) found.push(e.outerHTML.slice(0, 200)); }"
            "return found"
        )
        return wide


def report(model: str = "torchvision:resnet50", factor: float = 1.0) -> Report:
    old = Latency(30.25, 31.5, 36.125, 31.0, 31.7, 300_000_000, 90_000_000)
    new = Latency(9.25, 9.5 * factor, 12.125, 9.4, 105.3)
    name = f"QuantizeStatic(observer='mse', kernels='all', {'patterns=long, ' * 8})"
    files = [Artifact(Path(f"/out/{label}.onnx"), (), size, 1e-4, {"kernels": {"QLinearConv": 53, "QGemm": 1}})
             for label, size in (("original", 102_146_000), ("model", round(25_870_000 * factor)))]  # fmt: skip
    layers = [(f"layer{i // 9}.{i % 9}.conv", 60.0 - 1.37 * ((i * 7) % 31), ("int8", "float")[i % 5 == 0])
              for i in range(60)]  # fmt: skip
    return Report(
        model,
        [
            Row("original", 25_557_032, 25_500_000, 0.002, 4_089_184_256, 102_228_128, math.inf, 0.761, 0.0),
            Row("PruneChannels(0.5)", 6_900_000, 6_900_000, 0.0, 1_022_000_000, 27_600_000, 18.25, 0.7323, 31.5),
            Row(name, 6_900_000, 6_900_000, 0.0, None, 6_950_000, 17.5, 0.7312 * factor, 12.25, 12.0, "logits"),
        ],
        [Note("WARNING: the weights are random"), Note(HOSTILE)]
        + [Note("stays float", "quantize_static", "aten.add.Tensor", f"layer{i}", "net.py:4: x + y") for i in range(9)],
        dict(zip(("original", "compiled"), files, strict=True)),
        Benchmark("onnxruntime 1.23", 1, 1, 30, {"original": old, "compiled": new}),
        [
            Sheet("sensitivity", ("layer", "SNR alone, dB", "precision"), (*layers, (HOSTILE, "inf", "float"))),
            Sheet("refitting", ("layer", "gain, dB", "way"), (("conv1", 0.5, 1), ("conv2", -1.5, 0))),
        ],
        [
            CandidateRow("int8", 0.31, True, 25_870_000, 17.5, 0.7312, True),
            CandidateRow("float", 0.62, True, 60_000_000, 25.0, 0.755),
            CandidateRow("mixed", 0.64, False, 61_000_000, 24.0, 0.751),
            CandidateRow(HOSTILE, 0.21, False, 16_000_000, 9.0, None),
        ],
        [AxisRow("conv1.weight[0]", 5, 64, 32, 9408), AxisRow(f"{HOSTILE}[0]", 3, 128, 96, 147456)],
        [("prune_channels", {"ratio": 0.5}), ("quantize_static", {"observer": HOSTILE})],
        0,
        "AMD EPYC, Linux x86_64, Python 3.11",
        {"lobo_fx": "0.1.0", "torch": "2.13.0"},
        modules(),
    )


def modules() -> list[ModuleRow]:
    """A stem, four stages of three blocks of two layers each, and a layer of a hostile name; half of it pruned."""
    rows = [module("", 0, 0), module("conv1", 64, 32)]
    for stage in range(4):
        rows.append(module(f"layer{stage}", 0, 0))
        for block in range(3):
            rows.append(module(f"layer{stage}.{block}", 0, 0))
            rows += [module(f"layer{stage}.{block}.conv{at}", 64 << stage, 45 << stage, stage) for at in (1, 2)]
    return [*rows, module(HOSTILE, 1000, 1000, 4)]


def module(name: str, before: int, after: int, stage: int = 0) -> ModuleRow:
    kind = "convolution" if before else ""
    stored, computed = (("int8", "int8"), ("int8", "float32"), ("int4", "float32"), ("float32", "float32"))[stage % 4]
    old = ModuleFigures(kind, before or None, 9 * before**2, 9 * before**2, 36 * before**2, "float32", "float32", 125.5)
    new = ModuleFigures(kind, after or None, 9 * after**2, 7 * after**2, 9 * after**2, stored, computed)
    return ModuleRow(name, old, new, 41.25 if stage == 1 and kind else None)


def bare() -> Report:
    return Report("Network", [Row("original", 10, 10, 0.0, None, 40_000_000, math.inf, None, 0.0)])


def compared() -> Comparison:
    runs = {f"run {index}": report(HOSTILE, 1 + index / 10) for index in range(10)}
    return Comparison.of({**runs, HOSTILE: bare()})


class Figures(html.parser.HTMLParser):
    """Every number that a page shows, with what it says of its source."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.numbers: list[tuple[dict[str, str], str]] = []
        self.points: list[dict[str, str]] = []
        self.cells: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.tags.add(tag)
        self._inside = tag
        if tag == "data":
            self.numbers.append((given, ""))
        if "data-x" in given:
            self.points.append(given)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside == "data":
            self.numbers[-1] = (self.numbers[-1][0], text)
        if self._inside == "td":
            self.cells.append(text.strip())


def found_under(data: Any, path: str, by: str) -> float:
    """A number of report.json, or the quotient of two."""
    values = []
    for keys in (path, by):
        value: Any = data if keys else 1.0
        for key in json.loads(keys) if keys else ():
            value = value[key]
        values.append(float(value))
    return values[0] / values[1]


def says(text: str, value: float) -> bool:
    """Whether a text with a unit is a number, to the digits that it has."""
    if math.isinf(value):
        return text == "∞"
    number, unit = re.fullmatch(r"([-+]?[\d,]+(?:\.\d+)?(?:e[-+]\d+)?)\W*([A-Za-zµ]*)", text).groups()  # type: ignore[union-attr]
    scale = {"MB": 1e6, "M": 1e6, "kB": 1e3}.get(unit, 0.01 if text.endswith("%") else 1.0)
    shown = float(number.replace(",", "")) * scale
    digits, _, power = number.partition("e")
    step = 10.0 ** (int(power or 0) - len(digits.partition(".")[2])) * scale
    return abs(shown - value) <= max(step, 5e-4 * abs(value))


def test_every_number_of_the_page_is_the_reports() -> None:
    data = json.loads(report().to_json())
    shown = Figures(report().to_html())
    assert len(shown.numbers) > 150
    for given, text in shown.numbers:
        value = float(given["value"])
        assert value == found_under(data, given["data-path"], given.get("data-by", "")), given
        assert says(text, value), (text, value)
    assert len(shown.points) == 6
    for point in shown.points:
        for axis in "xy":
            assert float(point[f"data-{axis}"]) == found_under(data, point[f"data-{axis}-path"], "")
    unsourced = [cell for cell in shown.cells if re.fullmatch(r"[-+\d.,%]+", cell)]
    assert unsourced == [], "a number that says nothing of where it is from"
    assert not says("1.26", 1.2345)
    assert not says("24.9 MB", 25_870_000)


def test_every_number_of_a_comparison_is_the_reports() -> None:
    found = compared()
    data = json.loads(json.dumps(found.as_json()))
    runs = {run["name"]: run for run in data["runs"]}
    shown = Figures(found.to_html())
    sourced = [given for given, _ in shown.numbers if "data-path" in given]
    assert len(sourced) > 80
    for given in sourced:
        assert float(given["value"]) == found_under(data, given["data-path"], given.get("data-by", ""))
    for given, text in shown.numbers:
        assert says(text, float(given["value"]))
    ranked = [given for given, _ in shown.numbers if given.get("data-metric") == "speed"]
    assert len(ranked) == 1 + 10, "the best, and the ranking of those that were measured"
    for given in ranked:
        run = runs[given["data-run"]]
        assert float(given["value"]) == run["original_milliseconds"] / run["milliseconds"]


def test_what_was_not_measured_is_not_zero() -> None:
    page = bare().to_html()
    assert [text for _, text in Figures(page).numbers if text in ("0", "0.00 MB", "0.000 ms")] == []
    assert page.count("not measured") > 10
    assert "Trade-off" not in page, "there is nothing to draw"
    empty = Report("m", [])
    assert "Before and after" in empty.to_html()
    assert Comparison.of({"a": empty, "b": bare()}).to_html().count("not measured") > 10


@pytest.mark.parametrize("name", [HOSTILE, "<b>x</b>", "a&lt;b", "'\"><svg onload=alert(1)>", "{{ 7 * 7 }}", "]]>"])
def test_names_are_escaped_wherever_they_stand(name: str) -> None:
    one = report(name)
    one.rows.append(Row(name, 1, 1, 0.0, 1, 4, 3.0, 0.1, 1.0, 2.0, name))
    one.notes.append(Note(name, name, name, name, name, name))
    one.artifacts[name] = Artifact(Path(f"/{name}/{name}"), (), 5, 0.0, {"kernels": {name: 1}})
    one.sheets.append(Sheet(name, (name, name), ((name, name), (name, 1.5))))
    one.settings.append((name, {name: name}))
    one.machine, one.versions[name] = name, name
    whole = one.to_html()
    plain, other = Figures(report("m").to_html()), Figures(whole)
    assert other.tags == plain.tags, "a name became an element"
    assert whole.count("<script") == whole.count("</script") == 2
    embedded = whole.split('id="report">')[1].split("</script>")[0]
    assert json.loads(embedded) == json.loads(one.to_json())
    several = Figures(Comparison.of({name: one, "other": bare()}).to_html())
    assert several.tags <= plain.tags | {"h3"}


def test_the_page_asks_nothing_of_a_network() -> None:
    for page in (report("m").to_html(), Comparison.of({"a": report("m"), "b": report("m")}).to_html()):
        without = page.replace("http://example.com/x", "")
        assert "http" not in without.replace("http-equiv", "")
        assert "default-src 'none'" in page
        assert "@import" not in page
        assert "url(" not in page


def test_a_large_report_is_a_small_page() -> None:
    """As many layers, notes and rows as the largest models have."""
    one = report()
    one.sheets = [Sheet(f"s{n}", ("layer", "dB", "what"), tuple((f"layer{i}.conv", i / 7, "int8") for i in range(160)))
                  for n in range(4)]  # fmt: skip
    one.notes = [Note("stays float: 12 µs, as integers 14 µs", "quantize_static", "aten.add.Tensor", f"layer{i}",
                      "/usr/lib/python3/site-packages/torchvision/models/resnet.py:143: out += identity")
                 for i in range(300)]  # fmt: skip
    assert len(one.to_html().encode()) < 2_000_000


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((path for path in map(shutil.which, PROGRAMS) if path), None)
    if program is None:
        said = f"no Chromium here ({', '.join(PROGRAMS)}): the page was opened by no browser; apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(said)
        pytest.skip(said)
    found = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "report.json").write_text(report().to_json(), encoding="utf-8")
    (folder / "report.html").write_text(report().to_html(), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    file = folder / "comparison.html"
    file.write_text(compared().to_html(), encoding="utf-8")
    return file


@pytest.mark.parametrize(("width", "dark"), SHOWN)
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_the_page_fits_and_says_nothing_to_console_or_network(
    kind: str, width: int, dark: bool, browser: Browser, page_file: Path, comparison_file: Path
) -> None:
    page = Page(browser, page_file if kind == "report" else comparison_file, width, dark)
    assert page.too_wide() == []
    assert page.faults() == []
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    red = int(colour.partition("(")[2].partition(",")[0])
    assert red < 60 if dark else red > 200
    assert page.run("return document.querySelectorAll('img').length") == 0, "a name became an element"
    assert page.run("return document.querySelector('h1').textContent")


def test_numbers_of_the_page_are_those_of_the_report(browser: Browser, page_file: Path) -> None:
    page = Page(browser, page_file, 1400)
    saved = json.loads((page_file.parent / "report.json").read_text(encoding="utf-8"))
    shown = page.run("return JSON.parse(document.getElementById('report').textContent)")
    assert shown == saved
    tiles = page.run("return [...document.querySelectorAll('.tiles li')].map(e => e.innerText)")
    assert "3.95×\ntimes as small\n102.15 MB → 25.87 MB" in tiles  # noqa: RUF001
    assert "3.32×\ntimes as fast\n31.500 ms → 9.500 ms" in tiles  # noqa: RUF001
    assert any("of the peak memory" in tile and "not measured" in tile for tile in tiles)


@pytest.mark.parametrize("width", WIDTHS)
def test_hovering_or_focusing_a_point_tells_what_it_is(width: int, browser: Browser, page_file: Path) -> None:
    page = Page(browser, page_file, width)
    visible = "return [...document.querySelectorAll('.tip:not([hidden])')].map(e => e.textContent)"
    assert page.run(visible) == []
    page.hover(".point.compiled .dot")
    assert page.run(visible) == ["int8, taken: latency, of the original's 0.310, score 0.7312, on the front"]
    assert page.too_wide() == []
    page.hover("h1")
    assert page.run(visible) == []
    page.run("document.querySelector('.point').focus()")
    assert len(page.run(visible)) == 1
    assert page.faults() == []


COLUMN = (
    "return [...document.querySelectorAll('#sheet-0 tbody tr')].filter(r => !r.hidden).map(r => r.cells[{}].innerText)"
)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_layer_table_is_sorted_and_filtered(width: int, browser: Browser, page_file: Path) -> None:
    page = Page(browser, page_file, width)
    sort = (
        "const button = document.querySelectorAll('#sheet-0 thead button')[1]; button.click();"
        "return button.closest('th').ariaSort"
    )
    for wanted in ("ascending", "descending"):
        assert page.run(sort) == wanted
        cells = page.run(COLUMN.format(1))
        numbers = [math.inf if cell == "∞" else float(cell) for cell in cells]
        assert len(numbers) == 61
        assert numbers == sorted(numbers, reverse=wanted == "descending")
    others = page.run("return [...document.querySelectorAll('#sheet-0 thead th')].map(e => e.ariaSort)")
    assert others == ["none", "descending", "none"]
    page.run(
        "const i = document.querySelector('#sheet-0 input'); i.value = 'LAYER3.'; i.dispatchEvent(new Event('input'))"
    )
    names = page.run(COLUMN.format(0))
    assert len(names) == 9
    assert all(name.startswith("layer3.") for name in names)
    assert page.run("return document.querySelector('#sheet-0 [role=status]').textContent") == "9 of 61 rows"
    assert page.faults() == []


ROWS = "[...document.querySelectorAll('#network .part-row')].filter(e => e.checkVisibility())"


@pytest.mark.parametrize(("width", "dark"), SHOWN)
def test_the_network_opens_module_by_module_and_bars_are_to_scale(
    width: int, dark: bool, browser: Browser, page_file: Path
) -> None:
    page = Page(browser, page_file, width, dark)
    names = f"return {ROWS}.map(e => e.querySelector('.part-name > span:nth-child(2)').textContent)"
    assert page.run(names) == ["torchvision:resnet50", "conv1", *(f"layer{stage}" for stage in range(4)), HOSTILE]
    page.run(f"{ROWS}[2].focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    assert page.run(names)[3:6] == ["0", "1", "2"]
    fold = "document.querySelector('[data-fold=\"{}\"]').click()"
    page.run(fold.format("open"))
    assert len(page.run(names)) == 2 + 4 * (1 + 3 * 3) + 1
    assert page.too_wide() == []
    lengths = page.run(
        f"return {ROWS}.filter(e => e.querySelector('.layer')).map(e => ['.layer', '.was', '.now'].map("
        "s => e.querySelector(s).getBoundingClientRect().width))"
    )
    wanted = [(64, 32), *((64 << stage, 45 << stage) for stage in range(4) for _ in range(6)), (1000, 1000)]
    assert len(lengths) == len(wanted)
    assert len({round(whole, 1) for whole, _, _ in lengths}) == 1, "bars of all depths have one scale"
    for (whole, was, now), (before, after) in zip(lengths, wanted, strict=True):
        assert was / whole == pytest.approx(before / 1000, abs=0.01)
        assert now / whole == pytest.approx(after / 1000, abs=0.01)
    colours = page.run(
        "return [...document.querySelectorAll('#network .now')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) == 4
    page.run(fold.format(""))
    assert len(page.run(names)) == 7
    assert page.faults() == []


def test_the_network_is_opened_for_print_and_folded_after(browser: Browser, page_file: Path) -> None:
    page = Page(browser, page_file, 1400)
    count = f"return {ROWS}.length"
    assert page.run(count) == 7
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run(count) == 43
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(count) == 7


def test_every_control_can_be_reached_and_has_a_name(browser: Browser, page_file: Path) -> None:
    page = Page(browser, page_file, 1400)
    bare = page.run(
        "return [...document.querySelectorAll('button, input, summary, .scroll, a')].filter(e => e.tabIndex < 0 || "
        "!(e.innerText || e.ariaLabel || e.labels?.[0]?.textContent || e.textContent)).map(e => e.outerHTML)"
    )
    assert bare == []
    assert page.run(
        "return [...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope]'))"
    )
    page.run("document.querySelector('thead button').focus({focusVisible: true})")
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_checks_notice_what_they_look_for(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text(
        "<body><div style='width:3000px'>wide</div><img src='http://127.0.0.1:9/a.png'><script>missing()</script>"
    )
    page = Page(browser, file, 400)
    faults = "\n".join(page.faults())
    assert "asked for http://127.0.0.1:9/a.png" in faults
    assert "missing is not defined" in faults
    assert "the page itself" in page.too_wide()
