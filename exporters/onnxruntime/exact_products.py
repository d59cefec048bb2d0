"""Sessions whose sums of integer products are exact on every CPU.

An x86 CPU without VNNI adds two products of uint8 and int8 at 16 bits, and larger sums saturate. A file made for
another CPU (`target="arm"`) is right there and wrong here. To check such a file here, what stands between
DequantizeLinear and QuantizeLinear runs as float, and int8 weights of integer products become uint8, whose products are
added at 32 bits.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

from lobo_fx.exporters.onnx.writer import Writer
from lobo_fx.exporters.onnxruntime.session_options import ONLY_FATAL
from lobo_fx.files import temporary_folder

__all__ = ["exact_session"]

_WEIGHTS = {"MatMulInteger": ((1, 3),), "ConvInteger": ((1, 3),), "DynamicQuantizeLSTM": ((1, 9), (2, 11))}
"""Where weights, and the zero point of each, stand among the inputs of operators that multiply integers."""
_OFFSET = 128
"""What turns the range of int8 into that of uint8."""


def exact_session(path: Path) -> onnxruntime.InferenceSession:
    """A session of an ONNX file in which no sum of integer products saturates, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = ONLY_FATAL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    model = ir.load(path)
    _make_weights_unsigned(model)
    with temporary_folder() as folder:
        ir.save(model, folder / path.name, external_data=f"{path.name}.data")
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(folder / path.name), options, providers=providers)


def _make_weights_unsigned(model: ir.Model) -> None:
    """Adds the offset to int8 weights and to their zero points, so that their differences stay what they were."""
    ShapeInferencePass()(model)  # types of weights that are computed, a transposed one say
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for weight, zero_point in _WEIGHTS.get(node.op_type, ()):
            codes = node.inputs[weight]
            if codes is None or codes.dtype != ir.DataType.INT8 or node.graph is None:
                continue
            write = Writer(node.graph, node)

            def unsigned(value: ir.Value, write: Writer = write) -> ir.Value:
                moved = write.op("Add", write.op("Cast", value, to=ir.DataType.INT32), write.constant(_OFFSET, "int32"))
                return write.op("Cast", moved, to=ir.DataType.UINT8)

            node.resize_inputs(max(len(node.inputs), zero_point + 1))
            zero = node.inputs[zero_point]
            node.replace_input_with(weight, unsigned(codes))
            node.replace_input_with(zero_point, write.constant(_OFFSET, "uint8") if zero is None else unsigned(zero))
