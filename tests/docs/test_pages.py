"""The pages of the documentation: their Python runs, their commands parse, and what is generated says what is so."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from lobo_docs import api_pages, command_pages, drawings, figures, notebook_pages, pass_pages
from lobo_docs.docstrings import from_markdown, read

from lobo_fx import passes
from lobo_fx.cli.app import app
from lobo_fx.errors import InvalidInput
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import read_pass, read_recipe, resolve

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if path.relative_to(DOCS).parts[0] not in ("generated", "reports") and path.stem not in ("glossary", "zoo")
)
FENCED = re.compile(r"^```(\w+)(?: \{\.([\w-]+)\})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
COMMANDS: Any = typer.main.get_command(app)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what it is written in.
        mark: `slow`, `program`, `no-run` or nothing.
        text: between the fences.
    """

    language: str
    mark: str
    text: str


def blocks(path: Path, language: str) -> list[Block]:
    """The blocks of a page in one language."""
    found = (Block(*groups) for groups in FENCED.findall(path.read_text(encoding="utf-8")))
    return [block for block in found if block.language == language]


def with_blocks(language: str) -> list[Any]:
    """Pages that have such blocks, as parameters."""
    return [pytest.param(path, id=str(path.relative_to(DOCS))) for path in PAGES if blocks(path, language)]


# --- Python ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own, from which a page's own files can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(page: Path, folder: Path, slow: bool) -> None:
    """Runs the Python of a page, block after block, as a reader would; a block may begin with the name of its file.

    A `program` is run by a command of its page; what is marked `no-run` needs what is not installed: both only compile.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    for index, block in enumerate(blocks(page, "python")):
        code = compile(block.text, f"{page.relative_to(ROOT)}:{index}", "exec", dont_inherit=True)
        if file := FILE.match(block.text):
            (folder / file[1]).write_text(block.text, encoding="utf-8")
        if block.mark in (("", "slow") if slow else ("",)):
            exec(code, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_the_page_runs(page: Path, folder: Path) -> None:
    run(page, folder, slow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page",
    [path for path in PAGES if any(b.mark == "slow" for b in blocks(path, "python"))],
    ids=lambda path: path.stem,
)
def test_the_slow_python_of_the_page_runs(page: Path, folder: Path) -> None:
    run(page, folder, slow=True)


# --- commands and recipes --------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Calls of `lobo-fx` in a block of shell, each in words."""
    lines = text.replace("\\\n", " ").replace("&&", "\n").replace("…", "").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words and words[0].rpartition("/")[2] == "lobo-fx"]


def parse(words: list[str]) -> None:
    """Refuses what the command line would refuse, and runs nothing.

    Raises:
        click.UsageError: an option that is not there, or a value of the wrong kind.
        InvalidInput: no such pass, setting or recipe.
    """
    command = COMMANDS.commands[words[1]]
    given = command.make_context(words[1], list(words[2:])).params
    for text in given.get("passes") or ():
        read_pass(re.sub(r"(costs=)[\w.]+,?", "", text))  # a table that is measured first
    recipe = given.get("recipe")
    if recipe and not recipe.endswith((".yaml", ".yml")):
        resolve(recipe)


SHELL = [*with_blocks("sh"), pytest.param(ROOT / "README.md", id="README.md")]


@pytest.mark.parametrize("page", SHELL)
def test_the_commands_of_the_page_can_be_given(page: Path, folder: Path) -> None:
    for block in blocks(page, "sh"):
        for words in commands(block.text):
            for word in words:  # what must be there already
                if word.endswith("/"):
                    (folder / word).mkdir()
                elif word.endswith(".onnx"):
                    (folder / word).parent.mkdir(exist_ok=True)
                    (folder / word).touch()
            parse(words)
        extras = re.findall(r"-e '\.\[([\w,]+)\]'|lobo-fx\[([\w,]+)\]", block.text)
        for extra in ",".join(filter(None, sum(extras, ()))).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra


def test_a_wrong_command_is_noticed() -> None:
    for line in ("lobo-fx compile m.py:f --lattency 1", "lobo-fx compile m.py:f --batch none"):
        with pytest.raises(Exception, match=r"No such option|valid integer"):
            parse(commands(line)[0])
    with pytest.raises(InvalidInput, match="ratoi"):
        parse(commands("lobo-fx compile m.py:f --pass prune_channels:ratoi=1")[0])
    with pytest.raises(KeyError):
        parse(commands(".venv/bin/lobo-fx compyle m.py:f")[0])


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_recipes_of_the_page_can_be_read(page: Path) -> None:
    for block in blocks(page, "yaml"):
        assert read_recipe(block.text, page.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ten_minutes_can_be_followed(folder: Path) -> None:
    """Every command of the page, from the files that it says to save; installing aside."""
    page = DOCS / "ten_minutes.md"
    for block in blocks(page, "python"):
        if file := FILE.match(block.text):
            (folder / file[1]).write_text(block.text, encoding="utf-8")
    shell = [block.text.replace("\\\n", " ") for block in blocks(page, "sh")]
    lines = [line for text in shell for line in text.splitlines() if "pip" not in line and " -m venv" not in line]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        program = ["-m", "lobo_fx.cli"] if words[0].endswith("lobo-fx") else []
        subprocess.run([sys.executable, *program, *words[1:]], cwd=folder, check=True, timeout=900)
    assert {"original.onnx", "model.onnx", "report.json"} <= {path.name for path in (folder / "out").iterdir()}


# --- what is generated -----------------------------------------------------------------------------------


def made(text: str) -> dict[str, str]:
    """The blocks of a generated page by language; each has one of a language."""
    return {language: body for language, _, body in FENCED.findall(text)}


@pytest.fixture(scope="module")
def pass_texts() -> dict[str, str]:
    return pass_pages.pages(DOCS)


def test_every_pass_has_a_page_and_every_fragment_a_pass(pass_texts: dict[str, str]) -> None:
    kinds = [getattr(passes, name) for name in passes.__all__ if name not in ("PruningPlan", "GoalPlan")]
    assert pass_texts.keys() - {"index.md"} == {f"{kind().name}.md" for kind in kinds}
    assert {path.name for path in (DOCS / "fragments").iterdir()} <= pass_texts.keys()


class Asked:
    """`lobo_fx` for an example that only says what it would do."""

    passes = passes

    def compile(self, model: Any, chosen: Any, **given: Any) -> None:
        self.chosen, self.given = chosen, given


def test_a_pass_is_asked_for_alike_in_python_recipes_and_commands(pass_texts: dict[str, str]) -> None:
    for file, text in pass_texts.items():
        if file == "index.md":
            continue
        ways = made(text)
        (from_recipe,) = read_recipe(ways["yaml"], file)
        words = commands(ways["sh"])[0]
        parse(words)
        from_command = read_pass(words[words.index("--pass") + 1])
        asked = Asked()
        names = dict.fromkeys(("model", "images", "loader", "labelled", "cross_entropy", "accuracy"))
        exec(ways["python"], {**names, "lobo_fx": asked})
        (from_python,) = asked.chosen
        assert from_recipe == from_command == from_python
        assert set(from_python.needs) == asked.given.keys() - {"example_inputs"}


def test_every_setting_of_a_pass_is_described(pass_texts: dict[str, str]) -> None:
    for file, text in pass_texts.items():
        if file == "index.md":
            continue
        kind = PASSES.get(file.removesuffix(".md"))
        for field in dataclasses.fields(kind):
            row = re.search(rf"^\| `{field.name}` \| .* \| (.*) \|$", text, re.MULTILINE)
            assert row, f"{file} lacks {field.name}"
            assert len(row[1]) > 5, f"{file} says nothing of {field.name}"


def test_a_paragraph_of_figures_that_is_not_there_is_an_error() -> None:
    assert "ResNet-50" in figures.paragraph(DOCS, "Half of every width removed")
    with pytest.raises(ValueError, match="Two thirds"):
        figures.paragraph(DOCS, "Two thirds of every width removed")


def test_the_readme_tells_no_figure_of_its_own() -> None:
    told = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Figures\n")[2].partition("\n## ")[0]
    numbers = set(re.findall(r"\d+\.\d+", told))
    assert len(numbers) > 10
    assert numbers <= set(re.findall(r"\d+\.\d+", (DOCS / "figures.md").read_text(encoding="utf-8")))


def test_the_page_of_the_command_line_has_every_option() -> None:
    text = command_pages.pages(DOCS)["index.md"]
    for name, command in COMMANDS.commands.items():
        section = text.partition(f"## lobo-fx {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert parameter.opts[0] in section or (parameter.metavar or "?") in section


def test_every_public_name_is_on_a_page() -> None:
    made = api_pages.pages(DOCS)
    for module, names in api_pages.public_modules(DOCS).items():
        text = made[f"{module}.rst"]
        assert all(name in text for name in names if name != "__version__"), module


def test_drawings_and_notebooks_are_made() -> None:
    from xml.etree import ElementTree

    drawn, notebooks = drawings.pages(DOCS), notebook_pages.pages(DOCS)
    assert drawn
    for text in drawn.values():
        assert ElementTree.fromstring(text).tag.endswith("svg")
    assert notebooks.keys() >= {f"{path.stem}.md" for path in (DOCS / "notebooks").glob("*.ipynb")} != set()
    for name, text in notebooks.items():
        assert text.startswith("# "), name


def test_docstrings_become_what_sphinx_reads() -> None:
    lines = ["Takes `a`s; `x @ w` runs", "over `two", "lines`.", "", "Example:", "    ```python", "    f(`)", "    ```"]
    from_markdown(None, "function", "f", None, None, lines)
    assert lines[:2] == ["Takes ``a``\\ s; ``x @ w`` runs", "over ``two lines``."]
    assert lines[3:] == ["Example:", "    .. code-block:: python", "", "        f(`)"]
    assert read(passes.PruneWeights).summary.endswith(".")


# --- notebooks -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, folder: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
