"""Outliers of a matrix product's input move into its weight, where every output channel has a scale of its own.

x.W = (x / s).(s W) for any s > 0, one number for each input channel. A transformer's activations have a few channels
far larger than all others, which alone decide the scale of the tensor; divided by s they do not (Xiao et al.,
"SmoothQuant", arXiv:2211.10438, equation 4: s = max|x|**a / max|w|**(1 - a)). The division is a Mul in front of the
QuantizeLinear, as ModelOpt's `pre_quant_scale`, which TensorRT fuses with what makes the tensor; it is exact in float
but for rounding.

Whether it pays, and with which a, is measured for each tensor (`smoothing_trial`): what quiet channels lose is the
headroom that they have in a tensor with one scale. The outputs of a random encoder's attention, averages over the
sequence, gain 4 dB at the length that calibration saw and lose 16 at an eighth of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.crops import crop_sample, smallest_shapes
from trtforge.calibration.placement import Placement, QuantizedTensor, Use
from trtforge.calibration.ranges import Method
from trtforge.calibration.smoothing_trial import Trial
from trtforge.calibration.taps import Taps
from trtforge.calibration.weights import constant_array, constant_shape, is_constant
from trtforge.runtime.errors import ParityError
from trtforge.runtime.graph import META_LINE, META_MODULE, META_ORIGIN, OnnxModel, load_graph
from trtforge.runtime.runner import Tensors
from trtforge.runtime.specs import InputSpec, Profile

__all__ = ["ORIGIN", "Factors", "apply_smoothing", "measure_smoothing"]

ORIGIN = "smooth"
"""`META_ORIGIN` of every node inserted here."""

Factors = Mapping[str, tuple[float, ...]]
"""What each channel (the last axis) of a tensor is divided by, by the tensor's name; float32 numbers."""

_EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WORTH = 2.0
"""Times less noise (3 dB) that a Mul must give: predicted, then measured, at every shape.

Channels that are all alike have different peaks by chance, and dividing by those is no gain but headroom lent. Of
normal values in N rows the largest of one channel is near sqrt(2 ln N) deviations, the largest of C channels near
sqrt(2 ln NC): chance alone promises 1 + ln C / ln N times less noise, which is at most 2 where N >= C. Fewer rows are
not trusted.
"""

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]


@dataclass(slots=True)
class _Channels:
    """What is known of a tensor's channels: rows seen, the largest |x| of each, and its sum of squares."""

    rows: int
    peaks: Floats
    squares: Floats

    @classmethod
    def none(cls, width: int) -> _Channels:
        return cls(0, np.zeros(width), np.zeros(width))

    def add(self, rows: Singles) -> None:
        self.rows += len(rows)
        self.peaks = np.maximum(self.peaks, np.abs(rows).max(axis=0))
        self.squares += np.sum(np.square(rows, dtype=np.float64), axis=0)


def measure_smoothing(
    model: OnnxModel,
    placement: Placement,
    samples: Sequence[Tensors],
    method: Method = "auto",
    *,
    specs: Sequence[InputSpec] = (),
    profiles: Sequence[Profile] = (),
) -> dict[str, tuple[float, ...]]:
    """Finds the factors of every int8 tensor that only Gemm and MatMul with constant weights read in int8.

    Every other sample gives peaks and ranges, and the rest judges them: as they are, and cut to the smallest shapes of
    the profiles. What passes gets its factors from the peaks of all samples.

    Args:
        model: The float model that placement saw.
        placement: What is quantized.
        samples: Run one by one, in an order that says nothing of them (`choose_samples`); none is kept.
        method: How ranges will be chosen.
        specs: The model's inputs.
        profiles: The shapes that it will run at.

    Returns:
        Factors of the tensors where they pay: where the noise of the products that read them falls by 3 dB, predicted
        and on all that judges.

    Raises:
        CalibrationError: activations that are not finite.
        ParityError: onnxruntime failed.
    """
    graph = load_graph(model.path)
    nodes = {node.name or "": node for node in graph.graph}
    weights = {
        tensor.name: np.concatenate([_weight(nodes[use.node]) for use in tensor.uses])
        for tensor in placement.tensors
        if _smoothable(nodes, tensor)
    }
    if not weights or not samples:
        return {}
    shown, judged = samples[::2], samples[1::2]
    seen = {name: _Channels.none(weight.shape[1]) for name, weight in weights.items()}
    for name, rows in _tap(model, weights)(shown):
        seen[name].add(rows)
    # One row a sample (a classifier's head) shows too little of each channel: its largest value is not the largest of
    # data to come, which would saturate.
    trials = {
        name: Trial(name, weights[name], _candidates(channels.peaks, weights[name]), method)
        for name, channels in seen.items()
        if channels.rows >= len(channels.peaks) and _predict(channels, weights[name]) >= _WORTH
    }
    if not trials:
        return {}
    run = _tap(model, trials)
    for name, rows in run(shown):
        trials[name].show(rows)
    for name, rows in run(judged):
        seen[name].add(rows)
        trials[name].judge(rows)
    for kind, sizes in enumerate(smallest_shapes(specs, profiles), 1):
        cut = [crop for feeds in judged if (crop := crop_sample(feeds, specs, sizes)) is not None]
        # A model may not take its inputs cut (indices that point beyond them): then they say nothing.
        with contextlib.suppress(ParityError):
            for name, rows in run(cut):
                trials[name].judge(rows, kind)
    found: dict[str, tuple[float, ...]] = {}
    for name, trial in trials.items():
        best, gain = trial.choose()
        if gain >= _WORTH:
            factors = _candidates(seen[name].peaks, weights[name])[best]
            found[name] = tuple(float(value) for value in factors)
    return found


def _tap(model: OnnxModel, tensors: Iterable[str]) -> Callable[[Iterable[Tensors]], Iterator[tuple[str, Singles]]]:
    """What gives the tensors of each sample, as rows of channels."""
    taps = Taps(model.path, list(tensors), threads=None, provider="cpu")

    def run(samples: Iterable[Tensors]) -> Iterator[tuple[str, Singles]]:
        for feeds in samples:
            for name, array in taps.run(feeds).items():
                yield name, array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)

    return run


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


def _candidates(peaks: Floats, weights: Floats) -> list[Floats]:
    """Factors of every exponent, float32 numbers whose geometric mean is 1."""
    largest = np.abs(weights).max(axis=0)
    if not (peaks.max() > 0 and largest.max() > 0):
        return [np.ones_like(peaks) for _ in _EXPONENTS]
    # A channel that is never seen, or has no weight, must not get a factor of 0 or a huge one.
    peaks, largest = np.maximum(peaks, peaks.max() * 1e-4), np.maximum(largest, largest.max() * 1e-4)
    candidates = [peaks**exponent / largest ** (1 - exponent) for exponent in _EXPONENTS]
    return [(s / np.exp(np.log(s).mean())).astype(np.float32).astype(np.float64) for s in candidates]


def _predict(channels: _Channels, weights: Floats) -> float:
    """How many times less noise the best candidate leaves, by ranges of the largest value; 0.0 without signal."""
    peaks, squares = channels.peaks, channels.squares / channels.rows
    least = min(_noise(peaks / s, squares / (s * s), weights * s) for s in _candidates(peaks, weights))
    return _noise(peaks, squares, weights) / least if least > 0 else 0.0


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
