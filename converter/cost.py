"""How much work each node of a graph is: multiply-accumulates, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

__all__ = ["NOMINAL", "count_macs"]

NOMINAL: Mapping[str, float] = {"fp32": 1.0, "tf32": 0.6, "fp16": 0.5, "bf16": 0.5, "fp8": 0.25, "int8": 0.25}
"""What a multiply-accumulate costs by its operands' width: an order to search in, where nothing can be timed."""


def count_macs(path: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    """Multiply-accumulates of every Conv, ConvTranspose, Gemm and MatMul of the main graph, by node name.

    Args:
        path: The ONNX file; weights beside it are not read.
        sizes: The size of every named dimension.

    Returns:
        0 for a node whose shapes onnx cannot infer.
    """
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {value.name: _dims(value) for value in (*inferred.graph.value_info, *inferred.graph.output)}
    shapes |= {value.name: _dims(value) for value in inferred.graph.input}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    return {node.name: _macs(node, shapes) for node in inferred.graph.node}


def _dims(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    dims = value.type.tensor_type.shape.dim
    if not value.type.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...] | None]) -> int:
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = (shapes.get(name) for name in node.input[:2])
    out = shapes.get(node.output[0])
    if first is None or second is None or out is None:
        return 0
    match node.op_type:
        case "Conv":  # each output sums over the weight's channels and window
            return math.prod(out) * math.prod(second[1:])
        case "ConvTranspose":  # each input is spread over them
            return math.prod(first) * math.prod(second[1:])
        case "Gemm":
            across = next((a.i for a in node.attribute if a.name == "transA"), 0)
            return math.prod(out) * first[0 if across else 1]
        case _:
            return math.prod(out) * (first[-1] if first else 1)
