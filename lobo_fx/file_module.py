"""Calls an exported file as the module that it was made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lobo_fx.graph.program import Program
from lobo_fx.graph.sized_inputs import named_arrays
from lobo_fx.plugins.protocols import Session

__all__ = ["FileModule"]


class FileModule(nn.Module):
    """A file in its runtime, with the inputs and outputs of the module that it was exported from.

    Inputs are passed by position or by name; outputs nest as the module's do (a tuple, a dict, a `ModelOutput`). It has
    no parameters, and its outputs no gradients.

    Args:
        session: the loaded file.
        program: the program that was exported.

    Example:
        ```python
        from lobo_fx.exporters.onnxruntime.runtime import OnnxRuntime
        from lobo_fx.file_module import FileModule

        result = lobo_fx.compile(model, example_inputs=images)
        path = result.export("model.onnx").path
        FileModule(OnnxRuntime().load(path, threads=1), result.program)(images)
        ```
    """

    def __init__(self, session: Session, program: Program) -> None:
        super().__init__()
        self.session, self.program = session, [program]  # in a list, so that it does not become a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the file for a call of the module."""
        (program,) = self.program
        signature = program.signature
        found = iter(self.session.run(named_arrays(program, signature.bind(args, kwargs))))
        leaves = [None if spec is None else torch.from_numpy(next(found)) for spec in signature.outputs]
        return pytree.tree_unflatten(leaves, signature.structure)
