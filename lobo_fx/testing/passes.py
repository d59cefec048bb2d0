"""Test kit for passes."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.capture.tracing import trace
from lobo_fx.compiler import compile
from lobo_fx.contracts.passbase import Pass, Promise, exact_tolerance
from lobo_fx.graph.inputs import Inputs
from lobo_fx.graph.sized_inputs import with_rows
from lobo_fx.measures.fidelity import largest_error
from lobo_fx.plugins.registry import PASSES
from lobo_fx.recipe import PassSpec
from lobo_fx.result import Result, load

__all__ = ["assert_untouched", "check_composed", "check_pass", "check_pass_battery", "check_saved"]


def check_pass(pass_: Pass, model: nn.Module, example_inputs: Any, *, export: bool = False, **settings: Any) -> Result:
    """Compiles `model` with one pass and asserts what holds for every pass.

    Asserts: the model is left as it was; inputs and outputs keep names, dtypes, shapes and structure; the
    promise is kept (the compiler's own checks); the result can be deep-copied.

    Args:
        pass_: the pass.
        model: the model to compile.
        example_inputs: as `lobo_fx.compile` takes them.
        export: also write ONNX and compare it with PyTorch.
        **settings: further arguments of `lobo_fx.compile`.

    Raises:
        ContractError: the pass broke its promise, or another rule of the compiler for passes.
        ExportError: the compiled program could not be written.
    """
    with assert_untouched(model):
        result = compile(model, [pass_], example_inputs=example_inputs, progress=False, **settings)
    assert result.original is not None
    assert result.program.signature == result.original.signature
    twin = copy.deepcopy(result.module)
    assert twin.state_dict().keys() == result.module.state_dict().keys()
    if export:
        with tempfile.TemporaryDirectory() as folder:
            result.export(Path(folder) / "model.onnx")
    return result


def check_pass_battery(
    pass_: Pass,
    model: nn.Module,
    example_inputs: torch.Tensor,
    *,
    twins: Sequence[tuple[nn.Module, torch.Tensor]],
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    **settings: Any,
) -> None:
    """Runs `check_pass` in every mode and dtype, on twins that must not match, and with other passes after it.

    Asserts: the pass changes the model, in training and evaluation mode, with frozen and with free weights, and in each
    dtype; other numbers of rows run, and an exact pass is exact on them; twins keep their graph and every weight; the
    result exports, quantizes, saves and loads.

    Args:
        pass_: the pass.
        model: a model that the pass changes.
        example_inputs: one float tensor, rows first.
        twins: models with inputs that are like `model`, but that the pass must leave alone.
        dtypes: dtypes of weights and inputs; modes are tried in float32.
        **settings: further arguments of `lobo_fx.compile`.
    """
    original = trace(copy.deepcopy(model).eval(), example_inputs)
    variants = [(dtype, False, False) for dtype in dtypes] + [
        (torch.float32, True, False),
        (torch.float32, False, True),
    ]
    for dtype, train, frozen in variants:
        variant = copy.deepcopy(model).to(dtype).train(train).requires_grad_(not frozen)
        result = check_pass(pass_, variant, example_inputs.to(dtype), **settings)
        assert _changed(original, result), f"the pass changes nothing ({dtype}, {'train' if train else 'eval'})"
        _check_rows(pass_, result)
    for index, (twin, inputs) in enumerate(twins):
        before = trace(copy.deepcopy(twin).eval(), inputs)
        assert not _changed(before, check_pass(pass_, twin, inputs, **settings)), f"twin {index} was changed"
    check_composed(pass_, model, example_inputs, **settings)


def _changed(before: Any, result: Result) -> bool:
    """Whether the operators or a weight changed; names of nodes are ignored."""
    calls = [
        [str(node.target) for node in p.graph.nodes if node.op == "call_function"] for p in (before, result.program)
    ]
    one, other = before.module.state_dict(), result.program.module.state_dict()
    same = one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and torch.equal(one[name].double(), other[name].double()) for name in one
    )
    return calls[0] != calls[1] or not same


def _check_rows(pass_: Pass, result: Result) -> None:
    assert result.original is not None
    if not result.program.signature.batch:
        return
    for rows in (1, 3):
        inputs = with_rows(result.program, rows)
        before, after = result.original.run(inputs), result.program.run(inputs)
        shapes = [[tensor.shape for tensor in Inputs((outputs,)).tensors] for outputs in (before, after)]
        assert shapes[0] == shapes[1], f"{rows} rows give {shapes[1]}, not {shapes[0]}"
        if pass_.promise is Promise.EXACT:
            off = largest_error(before, after)
            assert off <= exact_tolerance(before), f"an exact pass is off by {off:.1e} on {rows} rows"


def check_composed(pass_: Pass, model: nn.Module, example_inputs: torch.Tensor, **settings: Any) -> None:
    """Asserts that a pass's result can be quantized (weights only, and static), exported, saved and loaded."""
    given = {"calibration_data": [example_inputs], **settings}
    for after in (
        PASSES.ours("quantize_weights")(method="round", compute="float32"),
        PASSES.ours("quantize_static")(kernels="all"),
    ):
        check_saved([pass_, after], model, example_inputs, **given)


def check_saved(passes: Sequence[PassSpec], model: nn.Module, example_inputs: Any, **settings: Any) -> Result:
    """Asserts that passes combine, and that their result exports, and computes the same when saved and loaded."""
    result = compile(model, passes, example_inputs=example_inputs, progress=False, **settings)
    with tempfile.TemporaryDirectory() as folder:
        result.export(Path(folder) / "model.onnx", confirm=False)
        twin = load(result.save(Path(folder) / "saved"))
    off = largest_error(result.module(example_inputs), twin.module(example_inputs))
    assert off == 0, f"a saved program computes something else when it is loaded: off by {off:.1e}"
    return result


@contextlib.contextmanager
def assert_untouched(model: nn.Module) -> Iterator[None]:
    """Asserts that a block leaves a model's weights, buffers, modes, attributes and gradient flags as they were."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    yield
    after = model.state_dict()
    assert before.keys() == after.keys(), "parameters or buffers were added or removed"
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), f"'{name}' was changed"
    assert modes == [module.training for module in model.modules()], "a module's training mode was changed"
    for module, own in zip(model.modules(), attributes, strict=True):
        changed = sorted(name for name in {*own, *vars(module)} if own.get(name) is not vars(module).get(name))
        assert not changed, f"attributes of a {type(module).__name__} were changed: {', '.join(changed)}"
    assert trained == [parameter.requires_grad for parameter in model.parameters()], "requires_grad was changed"
