"""Test kit for pass authors: run a pass as the compiler does and assert what every pass owes its users.

Example:
    ```python
    def test_my_pass():
        result = check_pass(MyPass(), model, torch.randn(2, 3, 8, 8))
        assert result.report.rows[-1].parameters == 100
    ```
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lobo_fx.compiler import compile
from lobo_fx.contracts.passbase import Pass
from lobo_fx.result import Result

__all__ = ["assert_untouched", "check_pass"]


def check_pass(pass_: Pass, model: nn.Module, example_inputs: Any, *, export: bool = False, **settings: Any) -> Result:
    """Compiles `model` with one pass and asserts what holds for every pass.

    Asserts: the model is left as it was; inputs and outputs keep names, dtypes, shapes and structure; the
    promise is kept (the compiler's own checks); the result deep-copies.

    Args:
        pass_: the pass.
        model: what to compile.
        example_inputs: as `lobo_fx.compile` takes them.
        export: also write ONNX and compare it with PyTorch.
        **settings: further arguments of `lobo_fx.compile`.
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
