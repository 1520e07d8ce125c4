"""Bias correction: what quantization adds to each layer's output on average is taken out of its bias.

Rounding and clipping shift means: those of a small kernel (9 weights of a depthwise convolution) most. Layer after
layer shifts add up in amplitude, where noise adds up in power. Biases are in float, so that a shift that is known can
be removed at no cost to the engine (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721, section 4.2). Each layer's own shift is w.E[x] - w_q.E[x_q], with the means of the float
inputs and of their codes as the float model has them (`moments`). Measured in the quantized model instead, a shift
would hold those of all layers before it, to be corrected again and again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.weights import constant_array, is_constant

__all__ = ["apply_corrections"]

Floats = NDArray[np.float32]


def apply_corrections(model: ir.Model, deltas: Mapping[str, Floats]) -> tuple[str, ...]:
    """Adds to the biases of the nodes with these ids, in place, in each bias's own float type.

    A Conv or Gemm without a bias gets one; a bias that other nodes read is copied. The bias of a MatMul is the constant
    vector of the Add that alone reads it. What has no bias, or one that is computed, is left as it is.

    Args:
        model: The quantized graph.
        deltas: By node id, float32 of shape (output channels,).

    Returns:
        The ids of the nodes that were corrected.
    """
    done = []
    for node in list(model.graph):
        delta = deltas.get(node.name or "")
        if delta is None:
            continue
        place = (node, 2) if node.op_type != "MatMul" else _added(node, len(delta))
        if place is not None and _correct(model.graph, *place, delta):
            done.append(node.name or "")
    return tuple(done)


def _added(node: ir.Node, channels: int) -> tuple[ir.Node, int] | None:
    """The Add behind a MatMul, and which of its inputs is the constant vector."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add, index = uses[0]
    other = add.inputs[1 - index]
    if other is None or not is_constant(other) or constant_array(other).shape != (channels,):
        return None
    return add, 1 - index


def _correct(graph: ir.Graph, node: ir.Node, index: int, delta: Floats) -> bool:
    bias = node.inputs[index] if len(node.inputs) > index else None
    if bias is not None and not is_constant(bias):
        return False
    old = np.zeros(len(delta), np.float32) if bias is None else np.asarray(constant_array(bias), np.float32)
    factor = node.attributes["beta"].as_float() if "beta" in node.attributes and bias is not None else 1.0
    dtype = _bias_type(node, bias)
    if factor == 0 or dtype is None:
        return False
    summed = (np.broadcast_to(old, (len(delta),)) + delta / factor) if old.ndim < 2 else old + delta / factor
    _set_bias(graph, node, index, ir.Tensor(summed.astype(dtype.numpy()), dtype=dtype))
    return True


def _bias_type(node: ir.Node, bias: ir.Value | None) -> ir.DataType | None:
    for value in (bias, node.outputs[0], *node.inputs):
        if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return value.dtype
    return None


def _set_bias(graph: ir.Graph, node: ir.Node, index: int, tensor: ir.TensorProtocol) -> None:
    name = f"{node.name}/corrected_bias"
    existing = graph.initializers.get(name)
    if existing is not None:
        existing.const_value = tensor
        return
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    old = node.inputs[index] if len(node.inputs) > index else None
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and old.name and old.name in graph.initializers and not old.uses() and not old.is_graph_output():
        del graph.initializers[old.name]
