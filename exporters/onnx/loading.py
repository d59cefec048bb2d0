"""ONNX files of strangers: opened without weights, refused where they are damaged or reach beyond their folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from lobo_fx.errors import InvalidInput
from lobo_fx.files import check_readable

__all__ = ["element_type", "files_of", "load_structure", "shown_value"]


def load_structure(path: Path) -> onnx.ModelProto:
    """The model without the weights that lie beside it.

    Raises:
        InvalidInput: no such file, no ONNX, or its weights are said to lie outside of its folder.
    """
    check_readable(path)
    if not path.stat().st_size:
        raise InvalidInput(f"{path} is empty")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise InvalidInput(f"{path} is damaged, or no ONNX file") from error
    if not model.ir_version or not model.graph.node or not model.opset_import:
        raise InvalidInput(f"{path} is damaged, or no ONNX file: it holds no graph")
    if not all(map(_is_text, _parts(model))):
        raise InvalidInput(f"{path} is damaged: it holds names that are no text")
    files_of(path, model)
    return model


def files_of(path: Path, model: onnx.ModelProto) -> list[Path]:
    """The file, and those beside it that hold its weights.

    Raises:
        InvalidInput: one lies elsewhere, or is missing.
    """
    places = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    for place in sorted(places):
        if Path(place).name != place:
            raise InvalidInput(f"{path} wants weights from '{place}', outside of its folder; refused")
        check_readable(path.parent / place, f"{path} has its weights in '{place}', which is not beside it")
    return [path, *(path.parent / place for place in sorted(places))]


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """All stored tensors, those in attributes, subgraphs and functions too."""
    yield from (part for part in _parts(message) if isinstance(part, onnx.TensorProto))


def _parts(message: Any) -> Iterator[Any]:
    """The message and all messages within."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _parts(part)


def element_type(number: int) -> str:
    """An ONNX element type by the name that numpy has for it: `float32`, `int8`."""
    try:
        name = str(onnx.TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return "unknown"
    return {"float": "float32", "double": "float64", "undefined": "unknown"}.get(name, name)


def _is_text(message: Any) -> bool:
    """Whether the message's own names are text; protobuf gives bytes for those that are not."""
    own = [value for field, value in message.ListFields() if field.type == field.TYPE_STRING]
    return all(isinstance(text, str) for value in own for text in ([value] if isinstance(value, bytes) else value))


def shown_value(value: onnx.ValueInfoProto) -> str:
    """An input or output in words: `images: float32[batch, 3, 224, 224]`."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return f"{value.name}: {value.type.WhichOneof('value') or 'unknown'}"
    if not tensor.HasField("shape"):
        return f"{value.name}: {element_type(tensor.elem_type)} of a shape that is not said"
    sizes = [d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else "any") for d in tensor.shape.dim]
    return f"{value.name}: {element_type(tensor.elem_type)}[{', '.join(sizes)}]"
