"""Nodes and constants written in the place of a node of an ONNX graph."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lobo_fx.exporters.onnx.placeholders import DOMAIN

__all__ = ["Writer"]


class Writer:
    """Writes nodes and constants in the place of a node, and puts their results into its stead."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The output of a new node."""
        return self.ops(kind, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """The outputs of a new node."""
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        node.metadata_props.update(self.node.metadata_props)  # the user's module, by which it will be named
        self.graph.insert_before(self.node, node)
        return node.outputs

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer; one of the same values is used again."""
        array = np.asarray(values, dtype)
        name = f"{DOMAIN}_{array.dtype}_{array.shape}_{zlib.crc32(array.tobytes())}"
        if name not in self.graph.initializers:
            self.graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", value, self.constant(shape))

    def columns(self, value: ir.Value, count: int, axis: int = 1) -> ir.Value:
        """The first columns of a matrix, or the first positions along another axis."""
        return self.op("Slice", value, self.constant([0]), self.constant([count]), self.constant([axis]))

    def replace(self, *results: ir.Value) -> None:
        for old, result in zip(self.node.outputs, results, strict=True):
            result.type, result.shape = old.type, old.shape
            old.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
        for old, result in zip(self.node.outputs, results, strict=True):
            result.name, old.name = old.name, None
