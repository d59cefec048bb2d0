"""The file of weights beside a model, named by its content: an older model keeps its own."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lobo_fx.files import name_by_content

__all__ = ["name_weights"]


def name_weights(path: Path) -> None:
    """Names the file of weights beside `path`, if there is one, by its content, and has `path` name it so."""
    data = path.with_name(f"{path.name}.data")
    if not data.exists():
        return
    name, model = name_by_content(data).name, ir.load(path)
    for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
        if isinstance(held := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                name, held.offset, held.length, held.dtype, shape=held.shape, name=held.name, base_dir=path.parent
            )
    ir.save(model, path)
