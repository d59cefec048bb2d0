"""Shared by all tests: operators that torchvision's wheels lack beside a CPU-only torch, a fixed seed, and killing."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.config
from torch import nn
from torch.fx import graph_module
from torch_tables import tables_built_once

from lobo_fx.capture import tracing
from lobo_fx.content import checksum_of
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.program import Program
from lobo_fx.graph.tensors import register
from lobo_fx.measures.kernel_costs import CostTable
from lobo_fx.plugins.kernels import Cost
from lobo_fx.plugins.registry import RUNTIMES
from lobo_fx.sources.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
gc.freeze()  # what was imported stays: looking through it for garbage again and again takes a tenth of the run
gc.set_threshold(100_000, 20, 20)
torch.set_num_threads(1)  # the workers of a parallel run share the cores


def pytest_configure(config: pytest.Config) -> None:
    """Traces small networks without PyTorch's cache of shapes, which costs a third of each; slow tests run with it."""
    torch._dynamo.config.fake_tensor_cache_enabled = config.option.markexpr != "not slow"


def pytest_collectstart() -> None:
    """Data and networks that a test file makes while it is imported are the same in every run, alone or with others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables measured by tests are theirs alone, and what they print is as wide as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "180")  # whatever terminal the tests are started from
        yield


@pytest.fixture(autouse=True, scope="session")
def _tables_built_once() -> Iterator[None]:
    """Half of the time of the exports here goes to what PyTorch does anew for each."""
    with tables_built_once():
        yield


@pytest.fixture(autouse=True, scope="session")
def _graphs_compiled_once() -> Iterator[None]:
    """Six of seven graphs have the Python of an earlier one, of which they are copies."""
    known: dict[str, Any] = {}

    def compiled(source: str, *args: Any, **settings: Any) -> Any:
        if source not in known:
            known[source] = compile(source, *args, **settings)
        return known[source]

    with mock.patch.object(graph_module, "compile", compiled, create=True):
        yield


@pytest.fixture(autouse=True, scope="session")
def _records_dropped() -> Iterator[None]:
    """What libraries log is dropped throughout: switching it off and on clears the caches of all loggers each time."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def _kernels_timed_shortly() -> Iterator[None]:
    """No test reads what a kernel takes, only that it takes some time: a few runs give that too."""
    from lobo_fx.exporters.onnxruntime import kernel_costs

    with mock.patch.multiple(kernel_costs, _ROUNDS=3, _MORE=1, repeatedly=range):
        yield


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state, and leaves the threads of the process as they were."""
    torch.default_generator.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def _traced() -> dict[str, tuple[Program, list[str]]]:
    """Programs of this process by what they were traced from, and which of their parameters are the model's own."""
    return {}


@pytest.fixture(autouse=True)
def _traced_once(request: pytest.FixtureRequest, _traced: dict[str, tuple[Program, list[str]]]) -> Iterator[None]:
    """Traces a network once: a third of the run would go to tracing what is built anew with the same weights.

    Not where tracing itself is tested, or a test asks to exchange something.
    """
    trace_anew = tracing._freed

    def traced(model: nn.Module, inputs: Inputs, which: str) -> Program:
        forms = inputs.map(lambda tensor: (tuple(tensor.shape), tensor.stride(), tensor.dtype))
        key = checksum_of(model, forms.args, dict(forms.kwargs), which, torch.get_default_dtype())
        own = dict(model.named_parameters(remove_duplicate=False))
        if key not in _traced:
            program = trace_anew(model, inputs, which)
            found = dict(program.module.named_parameters(remove_duplicate=False))
            if key:
                _traced[key] = program.clone(), [name for name in found if found[name] is own.get(name)]
            if len(_traced) > 30:  # what is kept is looked through for garbage again and again
                del _traced[next(iter(_traced))]
            return program
        known, shared = _traced[key]
        copy = known.clone()
        for name in shared:
            register(copy.module, name, own[name])
        return Program(copy.module, inputs)

    exchanges = "monkeypatch" in inspect.signature(request.function).parameters
    if exchanges or request.node.get_closest_marker("usefixtures") or "capture" in request.path.parts:
        yield
        return
    with mock.patch.object(tracing, "_freed", traced):
        yield


@pytest.fixture
def free_integers(tmp_path: Path) -> Callable[[], str]:
    """Writes a cost table that makes all kernels that were measured until now integer ones."""

    def write() -> str:
        here = CostTable.of_this_machine(RUNTIMES.get(RUNTIMES.default)().version)
        path = tmp_path / "free_integers.json"
        costs = {key: Cost(1 if key.startswith("convert") else 100, 1) for key in here.costs}
        CostTable(here.machine, costs).save(path)
        return str(path)

    return write


def _killed_after(steps: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a process that is killed after so many files were moved; whether it came to that."""
    child = os.fork()
    if child == 0:
        moved, replace = 0, os.replace

        def move(source: Any, target: Any) -> None:
            nonlocal moved
            if moved == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            moved += 1

        os.replace = move  # type: ignore[assignment]
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.fixture(name="killed_after")
def killed_after_fixture() -> Callable[[int, Callable[[], object]], bool]:
    """Runs work in a process that is killed after so many files were moved; says whether it came to that."""
    return _killed_after
