"""Bias correction: what quantization adds to each layer's output on average is taken out of its bias.

Rounding a small kernel (9 weights of a depthwise convolution) or clipping shifts the mean of a channel; layer after
layer such shifts add up in amplitude, where noise adds up in power. The bias is in float, so that the shift can be
measured and removed, at no cost to the engine (Nagel et al., "Data-Free Quantization Through Weight Equalization and
Bias Correction", 2019, section 4.2, with measured means). Layers are corrected in order, each behind the corrected ones
before it: the quantized model runs once, layer by layer, over some samples whose activations are kept meanwhile.
Correcting all layers at once instead corrects every shift again in each layer behind it, and made things worse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.placement import Placement
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.calibration.taps import reads
from trtforge.calibration.weights import constant_array, is_constant
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array, Tensors

if TYPE_CHECKING:
    import onnx

__all__ = ["apply_corrections", "measure_corrections"]

_CHANNEL_AXIS: Mapping[str, int] = {"Conv": 1, "ConvTranspose": 1, "Gemm": -1}

Floats = NDArray[np.float32]
Means = dict[str, NDArray[np.float64]]


def measure_corrections(
    model: OnnxModel, placement: Placement, ranges: Ranges, samples: Sequence[Tensors]
) -> dict[str, Floats]:
    """Measures on onnxruntime what to add to the bias of every quantized Conv, ConvTranspose and Gemm.

    Args:
        model: The float32 model that placement saw.
        placement: What is quantized.
        ranges: Of its tensors.
        samples: Batches of calibration data; 32 samples do. Activations of all of them, at one depth, are in memory.

    Returns:
        For each node id, float32 of shape (output channels,), for `apply_corrections`.

    Raises:
        CalibrationError: there are no samples, or as `insert_qdq`.
        ParityError: onnxruntime failed.
    """
    if not samples:
        raise CalibrationError("bias correction needs samples", fix="give some batches of the calibration data")
    graph = load_graph(model.path)
    outputs = _outputs(graph, placement)
    if not outputs:
        return {}
    wanted = _float_means(ir.to_proto(graph).SerializeToString(), outputs, samples)
    insert_qdq(graph, placement, ranges)
    deltas: dict[str, Floats] = {}
    for node, arrays in _Stepper(ir.to_proto(graph), outputs, samples):
        axis = outputs[node][1]
        delta = (wanted[node] - _mean(arrays, axis)).astype(np.float32)
        deltas[node] = delta
        for array in arrays:
            np.add(array, delta.reshape([-1 if i == axis % array.ndim else 1 for i in range(array.ndim)]), out=array)
    return deltas


def apply_corrections(model: ir.Model, deltas: Mapping[str, Floats]) -> int:
    """Adds to the biases of the nodes with these ids, in place, in each bias's own float type.

    A node without a bias gets one; a bias that other nodes read is copied; one that is computed is left as it is.

    Returns:
        How many nodes were corrected.
    """
    count = 0
    for node in model.graph:
        delta = deltas.get(node.name or "")
        if delta is None:
            continue
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and not is_constant(bias):
            continue
        old = np.zeros(len(delta), np.float32) if bias is None else np.asarray(constant_array(bias), np.float32)
        factor = node.attributes["beta"].as_float() if "beta" in node.attributes and bias is not None else 1.0
        dtype = _bias_type(node, bias)
        if factor == 0 or dtype is None:
            continue
        summed = (np.broadcast_to(old, (len(delta),)) + delta / factor) if old.ndim < 2 else old + delta / factor
        _set_bias(model.graph, node, ir.Tensor(summed.astype(dtype.numpy()), dtype=dtype))
        count += 1
    return count


def _bias_type(node: ir.Node, bias: ir.Value | None) -> ir.DataType | None:
    for value in (bias, node.outputs[0], *node.inputs):
        if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return value.dtype
    return None


def _set_bias(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    name = f"{node.name}/corrected_bias"
    existing = graph.initializers.get(name)
    if existing is not None:
        existing.const_value = tensor
        return
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    old = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, value)
    if old is not None and old.name and old.name in graph.initializers and not old.uses() and not old.is_graph_output():
        del graph.initializers[old.name]


def _outputs(graph: ir.Model, placement: Placement) -> dict[str, tuple[str, int]]:
    """Output name and channel axis of every quantized node that can hold a bias."""
    quantized = set(placement.nodes)
    return {
        node.name: (node.outputs[0].name or "", _CHANNEL_AXIS[node.op_type])
        for node in graph.graph
        if node.name in quantized and node.op_type in _CHANNEL_AXIS
    }


def _float_means(model: bytes, outputs: Mapping[str, tuple[str, int]], samples: Iterable[Tensors]) -> Means:
    runner = OnnxRuntimeRunner(model, extra_outputs=[name for name, _ in outputs.values()])
    sums: Means = {}
    counts: dict[str, int] = {}
    for feeds in samples:
        found = runner.run_borrowed(feeds)
        for node, (name, axis) in outputs.items():
            total, count = _sums(found[name], axis)
            sums[node] = sums.get(node, 0.0) + total
            counts[node] = counts.get(node, 0) + count
    return {node: total / counts[node] for node, total in sums.items()}


def _mean(arrays: Sequence[Array], axis: int) -> NDArray[np.float64]:
    parts = [_sums(array, axis) for array in arrays]
    mean: NDArray[np.float64] = np.sum([total for total, _ in parts], axis=0) / sum(count for _, count in parts)
    return mean


def _sums(array: Array, axis: int) -> tuple[NDArray[np.float64], int]:
    others = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    return np.asarray(array.sum(axis=others, dtype=np.float64)), array.size // array.shape[axis]


class _Stepper:
    """Runs a graph over samples from one node of `stops` to the next.

    Iterating gives each stop's id and its output for every sample, writable: what is changed there, the rest reads.
    """

    def __init__(
        self, model: onnx.ModelProto, stops: Mapping[str, tuple[str, int]], samples: Sequence[Tensors]
    ) -> None:
        self.model, self.stops = model, stops
        self.constants = {value.name: value for value in model.graph.initializer}
        self.live: list[dict[str, Array]] = [dict(feeds) for feeds in samples]

    def __iter__(self) -> Iterator[tuple[str, list[Array]]]:
        nodes = list(self.model.graph.node)
        start = 0
        for index, node in enumerate(nodes):
            if node.name not in self.stops:
                continue
            needed = {name for later in nodes[index + 1 :] for name in reads(later)}
            self._run(nodes[start : index + 1], needed | {node.output[0]})
            start = index + 1
            yield node.name, [values[node.output[0]] for values in self.live]

    def _run(self, nodes: Sequence[onnx.NodeProto], needed: set[str]) -> None:
        made = [name for node in nodes for name in node.output if name]
        read = {name for node in nodes for name in reads(node)} - set(made)
        kept = [name for name in made if name in needed]
        piece = self._piece(nodes, read, kept)
        runner = OnnxRuntimeRunner(piece, disable_quant_qdq=True)
        for values in self.live:
            results = runner.run({spec.name: values[spec.name] for spec in runner.inputs})
            for name in [name for name in values if name not in needed]:
                del values[name]
            values.update(results)

    def _piece(self, nodes: Sequence[onnx.NodeProto], read: set[str], kept: Sequence[str]) -> bytes:
        import onnx

        piece = onnx.ModelProto()
        piece.CopyFrom(self.model)
        graph = piece.graph
        for field in (graph.node, graph.initializer, graph.input, graph.output, graph.value_info):
            del field[:]
        graph.node.extend(nodes)
        graph.initializer.extend(self.constants[name] for name in read if name in self.constants)
        for name in sorted(read & self.live[0].keys()):
            array = self.live[0][name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in kept)
        return bytes(piece.SerializeToString())
