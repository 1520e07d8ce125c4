"""Outliers of a matrix product's input move into its weight, where every output channel has a scale of its own.

x.W = (x / s).(s W) for any s > 0, one number for each input channel. A transformer's activations have a few channels
far larger than all others, which alone decide the scale of the tensor; divided by s they do not (Xiao et al.,
"SmoothQuant", arXiv:2211.10438, equation 4: s = max|x|**a / max|w|**(1 - a)). The division is a Mul in front of the
QuantizeLinear, as ModelOpt's `pre_quant_scale`, which TensorRT fuses with what makes the tensor; it is exact in float
but for rounding. Which a, and whether it pays, is computed for each tensor from both errors that it trades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.placement import Placement, QuantizedTensor, Use
from trtforge.calibration.taps import Taps
from trtforge.calibration.weights import constant_array, constant_shape, is_constant
from trtforge.runtime.graph import META_LINE, META_MODULE, META_ORIGIN, OnnxModel, load_graph
from trtforge.runtime.runner import Tensors

__all__ = ["ORIGIN", "Factors", "apply_smoothing", "measure_smoothing"]

ORIGIN = "smooth"
"""`META_ORIGIN` of every node inserted here."""

Factors = Mapping[str, tuple[float, ...]]
"""What each channel (the last axis) of a tensor is divided by, by the tensor's name; float32 numbers."""

_EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORTH = 2.5
"""Times less predicted noise (4 dB) that a Mul must give.

Dividing every channel by its largest value takes the headroom that quiet channels have in a tensor with one scale:
values beyond those seen then saturate. Without outliers the prediction still says 2 to 3.4 dB, and a random encoder
calibrated at one length and run at others lost 5 to 10 dB. MiniLM's tensors, which have some, gain 4 to 14 dB.
"""

Floats = NDArray[np.float64]


def measure_smoothing(model: OnnxModel, placement: Placement, samples: Sequence[Tensors]) -> dict[str, tuple[float, ...]]:  # fmt: skip  # noqa: E501
    """Finds the factors of every int8 tensor that only Gemm and MatMul with constant weights read in int8.

    Args:
        model: The float model that placement saw.
        placement: What is quantized.
        samples: Run one by one. Only maxima and sums of squares over them are used.

    Returns:
        Factors of the tensors where they pay: those whose predicted output noise falls by 4 dB.

    Raises:
        ParityError: onnxruntime failed.
    """
    graph = load_graph(model.path)
    nodes = {node.name or "": node for node in graph.graph}
    able = [tensor for tensor in placement.tensors if _smoothable(nodes, tensor)]
    if not able or not samples:
        return {}
    taps = Taps(model.path, [tensor.name for tensor in able], threads=None, provider="cpu")
    peaks: dict[str, Floats] = {}
    squares: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    for feeds in samples:
        for name, array in taps.run(feeds).items():
            rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
            counts[name] = counts.get(name, 0) + len(rows)
            peaks[name] = np.maximum(peaks.get(name, 0.0), np.abs(rows).max(axis=0))
            squares[name] = squares.get(name, 0.0) + np.mean(rows * rows, axis=0) / len(samples)
    found: dict[str, tuple[float, ...]] = {}
    for tensor in able:
        if counts[tensor.name] < len(peaks[tensor.name]):
            # One row a sample (a classifier's head) shows too little of each channel: its largest value is not the
            # largest of data to come, which would saturate.
            continue
        weights = [_weight(nodes[use.node]) for use in tensor.uses]
        factors = _choose(peaks[tensor.name], squares[tensor.name], np.concatenate(weights))
        if factors is not None:
            found[tensor.name] = tuple(float(value) for value in factors)
    return found


def apply_smoothing(model: ir.Model, placement: Placement, factors: Factors) -> int:
    """Divides tensors and multiplies weights, in place, for the uses that `placement` quantizes.

    Args:
        model: The graph that placement saw, or one with the same ids, cast since.
        placement: Of the graph without smoothing. Tensors that it does not quantize are left as they are.
        factors: By the names of that graph.

    Returns:
        How many Mul nodes were inserted.
    """
    nodes = {node.name or "": node for node in model.graph}
    order = {node: position for position, node in enumerate(model.graph)}
    count = 0
    for tensor in placement.tensors:
        if tensor.name not in factors:
            continue
        values = np.array(factors[tensor.name], np.float32)
        by_value: dict[ir.Value, list[Use]] = {}
        for use in tensor.uses:
            value = nodes[use.node].inputs[use.index]
            assert value is not None
            by_value.setdefault(value, []).append(use)
        for number, (value, uses) in enumerate(by_value.items()):
            base = f"{tensor.name}_smoothed" + (f"_{number}" if number else "")
            readers = [nodes[use.node] for use in uses]
            first = min(readers, key=order.__getitem__)
            dtype = value.dtype or ir.DataType.FLOAT
            inverse = _initializer(model.graph, f"{base}_factor", (1 / values).astype(dtype.numpy()), dtype)
            mul = ir.node("Mul", [value, inverse], name=f"{base}/Mul")
            mul.metadata_props[META_ORIGIN] = ORIGIN
            for key in (META_MODULE, META_LINE):
                if key in first.metadata_props:
                    mul.metadata_props[key] = first.metadata_props[key]
            output = mul.outputs[0]
            output.name, output.dtype, output.shape = base, dtype, value.shape
            model.graph.insert_before(first, [mul])
            for use, reader in zip(uses, readers, strict=True):
                reader.replace_input_with(use.index, output)
                _multiply_weight(model.graph, reader, values)
            count += 1
    return count


def _smoothable(nodes: Mapping[str, ir.Node], tensor: QuantizedTensor) -> bool:
    if tensor.format != "int8":
        return False
    for use in tensor.uses:
        node = nodes[use.node]
        weight = node.inputs[1]
        if use.index != 0 or node.op_type not in ("Gemm", "MatMul") or weight is None or not is_constant(weight):
            return False
        if len(constant_shape(weight)) != 2 or ("transA" in node.attributes and node.attributes["transA"].as_int()):
            return False
    return True


def _transposed(node: ir.Node) -> bool:
    """Whether the weight is (outputs, inputs)."""
    return node.op_type == "Gemm" and "transB" in node.attributes and bool(node.attributes["transB"].as_int())


def _weight(node: ir.Node) -> Floats:
    """As (outputs, inputs)."""
    value = node.inputs[1]
    assert value is not None
    array = constant_array(value).astype(np.float64)
    return array if _transposed(node) else array.T


def _choose(peaks: Floats, squares: Floats, weights: Floats) -> Floats | None:
    """The factors with the least predicted noise; None where they do not pay."""
    largest = np.abs(weights).max(axis=0)
    if not (peaks.max() > 0 and largest.max() > 0):
        return None
    # A channel that is never seen, or has no weight, must not get a factor of 0 or a huge one.
    peaks, largest = np.maximum(peaks, peaks.max() * 1e-4), np.maximum(largest, largest.max() * 1e-4)
    candidates = [peaks**exponent / largest ** (1 - exponent) for exponent in _EXPONENTS]
    candidates = [(s / np.exp(np.log(s).mean())).astype(np.float32).astype(np.float64) for s in candidates]
    noises = [_noise(peaks / s, squares / (s * s), weights * s) for s in candidates]
    best = int(np.argmin(noises))
    return candidates[best] if noises[best] * _WORTH <= _noise(peaks, squares, weights) else None


def _noise(peaks: Floats, squares: Floats, weights: Floats) -> float:
    """Variance of the summed output that rounding adds, in units of step**2 / 12 with steps of range / 127.

    Rounding noise of the activations, equal in every channel, through the weights; and noise of the weights, equal
    within each output, through the activations.
    """
    activations = peaks.max() ** 2 * float((weights * weights).sum())
    rounding = float((np.abs(weights).max(axis=1) ** 2).sum()) * float(squares.sum())
    return float(activations + rounding)


def _multiply_weight(graph: ir.Graph, node: ir.Node, factors: NDArray[np.float32]) -> None:
    value = node.inputs[1]
    assert value is not None
    array = constant_array(value)
    column = factors[None, :] if _transposed(node) else factors[:, None]
    product = (array.astype(np.float32) * column).astype(array.dtype)
    node.replace_input_with(1, _initializer(graph, f"{node.name}/smoothed_weight", product, value.dtype))
    if value.name and value.name in graph.initializers and not value.uses() and not value.is_graph_output():
        del graph.initializers[value.name]


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic], dtype: ir.DataType | None) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
