"""The package as it is installed: folders, links, guards, layers, and an import that is silent and light."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import lobo_fx

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "lobo_fx"
LINKED = ("passes", "exporters")


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, from `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def setuptools_settings() -> dict[str, list[str]]:
    """Lists and tables of `[tool.setuptools…]`, read line by line: Python 3.10 has no TOML reader."""
    found: dict[str, list[str]] = {}
    section = ""
    text = re.sub(r"\[\n([^\]]*)\n\]", lambda m: f"[{' '.join(m[1].split())}]", (ROOT / "pyproject.toml").read_text())
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif section.startswith("tool.setuptools") and "=" in line:
            key, _, value = line.partition("=")
            literal = ast.literal_eval(value.strip())
            found[f"{section}.{key.strip()}"] = literal if isinstance(literal, list) else [literal]
    return found


# --- folders, links, guards ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_the_top_level_folders_are_linked_into_the_package(name: str) -> None:
    link = CORE / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_every_package_is_listed_and_nothing_else() -> None:
    listed = setuptools_settings()["tool.setuptools.packages"]
    modules = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in module_files().items()}
    data = {package for package in listed if not list((ROOT / package.replace(".", "/")).glob("*.py"))}
    assert sorted(listed) == sorted(modules | data)
    assert data <= packaged_data().keys()


def test_the_linked_packages_are_mapped_to_their_folders() -> None:
    settings = setuptools_settings()
    for name in LINKED:
        assert settings[f'tool.setuptools.package-dir."lobo_fx.{name}"'] == [name]


def packaged_data() -> dict[str, set[Path]]:
    """By package, the data files that its wheel holds."""
    prefix = "tool.setuptools.package-data."
    found: dict[str, set[Path]] = {}
    for key, patterns in setuptools_settings().items():
        if key.startswith(prefix):
            package = key.removeprefix(prefix).strip('"')
            found[package] = {path for pattern in patterns for path in (ROOT / package.replace(".", "/")).glob(pattern)}
    return found


def test_data_files_are_packaged() -> None:
    packaged = set().union(*packaged_data().values())
    listed = setuptools_settings()["tool.setuptools.packages"]
    assert packaged_data().keys() <= set(listed)
    assert {CORE / "py.typed", CORE / "recipes" / "balanced.yaml"} <= packaged
    assert packaged >= {
        path for suffix in ("yaml", "json", "typed", "html", "css", "js") for path in CORE.rglob(f"*.{suffix}")
    }


@pytest.mark.parametrize("name", LINKED)
def test_the_folders_can_not_be_imported_by_their_bare_names(name: str) -> None:
    done = python(f"import {name}", ROOT)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: import lobo_fx.{name}, not {name}")


def test_entry_points_lead_into_the_package() -> None:
    for group in ("passes", "exporters", "runtimes"):
        points = entry_points(group=f"lobo_fx.{group}")
        assert points
        assert all(point.load().__module__ == point.module for point in points)


# --- importing -------------------------------------------------------------------------------------------

HEAVY = (
    "accelerate",
    "jinja2",
    "torch._dynamo",
    "matplotlib",
    "optuna",
    "torchao",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich",
    "typer",
    "yaml",
    "transformers",
    "timm",
    "torchvision",
)


def loaded(*codes: str) -> list[set[str]]:
    """Which of the heavy packages are imported after each of `codes`, one after the other; they must print nothing."""
    probe = f"import sys\nprint(*sorted(n for n in {HEAVY + LINKED} if n in sys.modules))"
    done = python("\n".join(f"{code}\n{probe}" for code in codes), ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == len(codes), f"the import printed: {done.stdout}"
    return [set(line.split()) for line in done.stdout.splitlines()]


@functools.cache
def imported() -> list[set[str]]:
    """What is there after PyTorch, after the package, and after passes and exporters."""
    return loaded("import torch", "import lobo_fx", "import lobo_fx.passes, lobo_fx.exporters")


def test_importing_the_package_imports_little_and_prints_nothing() -> None:
    torch, package, _ = imported()
    assert package <= torch


def test_a_runtime_needs_no_pytorch() -> None:
    """The process that measures a file's memory holds nothing else, and starts in a fraction of a second."""
    code = (
        "import lobo_fx.exporters.onnxruntime.runtime, lobo_fx.measures.memory, sys; assert 'torch' not in sys.modules"
    )
    assert "onnx" not in loaded(code)[0]


def test_the_probe_notices_an_import_and_a_print() -> None:
    before, after = loaded("import lobo_fx", "import yaml")
    assert after - before == {"yaml"}
    with pytest.raises(AssertionError, match="printed"):
        loaded("print('hello')")


def test_importing_passes_and_exporters_prints_nothing_and_makes_one_module_of_each() -> None:
    names = imported()[-1]
    assert not names & {"passes", "exporters", "torch._dynamo", "transformers", "timm", "torchvision", "rich"}


@pytest.mark.parametrize("name", ["lobo_fx", "lobo_fx.cli"])
def test_the_package_runs_as_the_command(name: str) -> None:
    command = [sys.executable, "-m", name, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"lobo-fx {lobo_fx.__version__}\n", "")


def test_every_public_name_is_there() -> None:
    names = [name for name in dir(lobo_fx) if not name.startswith("_")]
    for name in ("Artifact", "Context", "LoboError", "Pass", "Program", "Result", "compile", "load", "trace"):
        assert name in names
    for name in names:
        assert getattr(lobo_fx, name) is not None
    with pytest.raises(AttributeError, match="compyle"):
        lobo_fx.compyle  # noqa: B018


# --- layers ----------------------------------------------------------------------------------------------


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file of the package, parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at its head or inside its functions."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(f"{p}.") for p in packages)}


def core_files() -> list[Path]:
    files = [*CORE.glob("*.py")]
    files += [
        path for path in CORE.rglob("*.py") if path.relative_to(CORE).parts[0] not in LINKED and path not in files
    ]
    return sorted(files)


def test_the_core_names_no_pass_no_exporter_and_no_onnx() -> None:
    assert len(core_files()) > 20
    for path in core_files():
        if path.parent in (CORE / "cli", CORE / "testing") or path == CORE / "__main__.py":
            continue
        above = under(
            imports(path), "lobo_fx.passes", "lobo_fx.exporters", "lobo_fx.cli", "onnx", "onnxruntime", "torchao"
        )
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_passes_name_no_exporter_and_exporters_no_pass() -> None:
    files = {name: sorted((ROOT / name).rglob("*.py")) for name in LINKED}
    assert all(files.values())
    for path in files["passes"]:
        assert not under(imports(path), "lobo_fx.exporters", "lobo_fx.cli", "onnx", "onnxruntime"), path.name
    for path in files["exporters"]:
        assert not under(imports(path), "lobo_fx.passes", "lobo_fx.cli"), path.name


def test_the_layer_check_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text("def f():\n    from lobo_fx import passes\n    import lobo_fx.exporters.onnx as o\n")
    assert under(imports(path), "lobo_fx.passes", "lobo_fx.exporters") == {"lobo_fx.passes", "lobo_fx.exporters.onnx"}
    other = tmp_path / "other.py"
    other.write_text("from lobo_fx.contracts.passbase import Pass\nimport onnx_graph\n")
    assert not under(imports(other), "lobo_fx.passes", "onnx")


# --- circles ---------------------------------------------------------------------------------------------


def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = {*core_files(), *(path for name in LINKED for path in (ROOT / name).rglob("*.py"))}
    named = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "lobo_fx" else ("lobo_fx", *parts)
        named[".".join(parts).removesuffix(".__init__")] = path
    return named


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of more than one)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(module: str, ways: dict[str, set[str]], found: list[str]) -> None:
        stack = [(module, iter(sorted(ways.get(module, ()))))]
        seen.add(module)
        while stack:
            _, ahead = stack[-1]
            step = next((other for other in ahead if other not in seen), None)
            if step is None:
                found.append(stack.pop()[0])
            else:
                seen.add(step)
                stack.append((step, iter(sorted(ways.get(step, ())))))

    for module in sorted(arrows):
        if module not in seen:
            visit(module, arrows, order)
    back: dict[str, set[str]] = {}
    for module, others in arrows.items():
        for other in others:
            back.setdefault(other, set()).add(module)
    seen.clear()
    groups = []
    for module in reversed(order):
        if module not in seen:
            group: list[str] = []
            visit(module, back, group)
            groups.append(group)
    return [sorted(group) for group in groups if len(group) > 1]


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Imports inside functions count; a package's own list of its modules does not."""
    files = module_files()
    arrows = {
        name: {other for other in imports(path) if other in files and other != name}
        for name, path in files.items()
        if path.name != "__init__.py" and name != "lobo_fx"
    }
    assert circles(arrows) == []


def test_the_search_for_circles_finds_them() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_tests_stand_where_the_code_stands() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    for folder in folders:
        places = (CORE / folder, ROOT / folder)
        assert any(place.is_dir() for place in places), f"tests/{folder} mirrors nothing"


# --- what is public ---------------------------------------------------------------------------------------

PUBLIC = {
    "lobo_fx": """
        Artifact Context ContractError ExportError Goal InvalidInput LoboError Pass Program Promise Report Result
        TraceError Tuning __version__ axes compile exporters graph load measures passes plugins search sources testing
        trace
    """,
    "lobo_fx.axes": """
        Axis AxisError Call Inference KINDS MOVED NOWHERE all_of any_of axis_rule elementwise kind through
    """,
    "lobo_fx.axes.members": """
        Member members parameters
    """,
    "lobo_fx.contracts.passbase": """
        EXACT_TOLERANCE Pass Promise exact_tolerance shown
    """,
    "lobo_fx.contracts.setting_facts": """
        SettingFacts description_of example_of settings_of
    """,
    "lobo_fx.errors": """
        ContractError ExportError InvalidInput LoboError TraceError first_few suggestion
    """,
    "lobo_fx.exporters.onnx.inspection": """
        FileFacts Stored inspect_file
    """,
    "lobo_fx.exporters.onnx.reader": """
        OnnxModule READ_TOLERANCE example_inputs_of read_onnx
    """,
    "lobo_fx.graph.layers": """
        LAYERS LOOKUPS Layer LayerKind WeightUse is_constant layer_of layers weight_uses
    """,
    "lobo_fx.graph.operators": """
        CONVOLUTIONS RECURRENT SPLITS TRANSPOSED_CONVOLUTIONS VALUE_PRESERVING arguments aten is_call is_inplace is_view
        named_values set_argument training_flag works_on_codes
    """,
    "lobo_fx.graph.rewriting": """
        Match Op Rejected Rule add_parameter call drop_unused erase_dead free_name rename replace_parameter
        replace_results rewrite
    """,
    "lobo_fx.graph.running": """
        AS_IT_IS Runner kept_buffers watch written_buffers
    """,
    "lobo_fx.own_operators.formats": """
        FORMATS Format pack unit unpack
    """,
    "lobo_fx.passes": """
        ComputeInFloat Distill EqualizeLayers Factorize FineTune FitGoal FoldBatchNorm FoldWeights FuseAttention
        GoalPlan IterativePrune MixedPrecision PruneChannels PruneWeights PruningPlan QuantizationAwareTraining
        QuantizeDynamic QuantizeStatic QuantizeWeights SmoothActivations SparseTraining Student
    """,
    "lobo_fx.passes.pruning.criteria": """
        Activation BatchNormScale CRITERIA Consensus Criterion Elementwise Fisher GeometricMedian Importance Lamp
        Magnitude Random Scorer SecondOrder Taylor resolve
    """,
    "lobo_fx.passes.quantization.integers.observer_names": """
        OBSERVERS
    """,
    "lobo_fx.passes.quantization.integers.observers": """
        ChannelObserver CountingObserver EntropyObserver HistogramObserver MeanSquaredErrorObserver MovingObserver
        Observers PercentileObserver RangeObserver SMALLEST_SCALE observers
    """,
    "lobo_fx.plugins.protocols": """
        ArraySpec Arrays ChecksPrograms Exporter LoadsExactly Runtime Session
    """,
    "lobo_fx.plugins.registry": """
        EXPORTERS PASSES RUNTIMES Registry snake_case
    """,
    "lobo_fx.plugins.settings": """
        Range check_names check_settings named_settings
    """,
    "lobo_fx.testing": """
        assert_untouched check_axis_rule check_criterion check_exporter check_number_format check_observer check_pass
        check_pass_battery check_runtime check_translation
    """,
}
"""The surface of users and pass authors: a name that goes, or comes, is a decision."""


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_these(module: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == PUBLIC[module].split()


def test_every_module_says_what_is_public() -> None:
    for name, path in module_files().items():
        if path.name in ("__init__.py", "__main__.py"):
            continue
        tree = tree_of(path)
        stated = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["__all__"]
        ]
        assert stated, f"{name} has no __all__"
        bound = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        bound |= {n.id for node in tree.body for n in ast.walk(node) if isinstance(n, ast.Name)}
        bound |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
        assert set(stated[0]) <= bound, f"{name} names what it does not have: {set(stated[0]) - bound}"
