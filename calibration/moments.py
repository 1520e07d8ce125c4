"""Exact moments of what quantized layers will read: means and second moments of int8 codes, over the calibration data.

A layer's products are sums over `K` inputs (a kernel's window, a row of a matrix), in `G` groups. For each group this
gathers the sum of the codes, of what rounding and clipping took from them, and of all products of two codes. Codes are
whole numbers, and the remainder is counted in steps of 2**-16 of a code, so that every sum is exact: it depends on the
multiset of samples alone, not on their order, their batches or the number of threads. At most `ROWS` windows of a
sample are taken, at places that its own hash chooses.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from trtforge.calibration.stream import Unit, count_workers, hash_sample, run_units, split_units, splits_samples
from trtforge.calibration.taps import Taps
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.runner import Array, Tensors

__all__ = ["LARGEST_INPUT", "ROWS", "Layer", "Moments", "collect_moments", "describe_layer"]

ROWS = 128
"""Windows or rows of a sample at most. Sums of so many products of two codes are exact in float32."""
LARGEST_INPUT = 2304
"""Inputs of a group past which second moments are not gathered: 42 MB a layer, growing with the square."""

_CODE = 127
_FRACTION = 65536.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantized product: which tensor it reads, and how windows are cut from it.

    Attributes:
        node: The id of a Conv, Gemm or MatMul.
        tensor: What it reads.
        scale: Of that tensor.
        groups: G.
        inputs: K, the inputs of one group.
        rows: From one sample's array and a number that chooses places, float32 of shape (rows, G, K).
    """

    node: str
    tensor: str
    scale: float
    groups: int
    inputs: int
    rows: Callable[[Array, int], Array]


@dataclass(slots=True)
class Moments:
    """Sums over `count` rows, in codes; shapes (G, K) and (G, K, K), None where K is past `LARGEST_INPUT`."""

    count: int
    codes: Floats
    remainders: NDArray[np.int64]
    products: Floats | None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def means(self) -> tuple[Floats, Floats]:
        """The mean of the float inputs and of their codes, both in codes; shape (G, K)."""
        codes = self.codes / self.count
        return codes + self.remainders / (_FRACTION * self.count), codes

    def covariance(self) -> Floats | None:
        """Of the codes, shape (G, K, K); None where it was not gathered."""
        if self.products is None:
            return None
        mean = self.codes / self.count
        return np.asarray(self.products / self.count - mean[:, :, None] * mean[:, None, :])


def describe_layer(node: ir.Node, tensor: str, scale: float, weight: Sequence[int]) -> Layer | None:
    """How a node's windows are cut; None where its products are not sums over windows (ConvTranspose) or not known.

    Of products of matrices only those of rank 2 are taken, whose rows are samples as a rule. Rows of a sequence are
    tokens, padding among them, whose mean and covariance say little of any one token: fitted to them, MiniLM's worst
    embedding fell from a cosine of 0.985 to 0.68.

    Args:
        node: The consumer, the activation being its first input.
        tensor: The activation's name.
        scale: Of the activation.
        weight: The shape of its second input.
    """
    name = node.name or ""
    if node.op_type == "Conv":
        groups = _int(node, "group", 1)
        inputs = math.prod(weight[1:])
        cut = functools.partial(_windows, geometry=_Geometry.of(node, weight), groups=groups)
        return Layer(name, tensor, scale, groups, inputs, cut)
    if node.inputs[0] is None or node.inputs[0].shape is None or len(node.inputs[0].shape) != 2:
        return None
    if node.op_type == "Gemm":
        inputs = weight[1] if _int(node, "transB", 0) else weight[0]
        return Layer(name, tensor, scale, 1, inputs, _columns if _int(node, "transA", 0) else _rows)
    if node.op_type == "MatMul" and len(weight) == 2:
        return Layer(name, tensor, scale, 1, weight[0], _rows)
    return None


def collect_moments(
    model: OnnxModel,
    layers: Sequence[Layer],
    batches: Iterable[Tensors],
    *,
    products: bool = True,
    provider: str = "cpu",
) -> dict[str, Moments]:
    """Runs the float model over the data and gathers the moments of every layer's input.

    Args:
        model: The float model.
        layers: Of it.
        batches: Inputs by name, as `read_batches` gives them.
        products: Gather second moments; without them means alone.
        provider: "cpu" or "cuda".

    Returns:
        By node id.

    Raises:
        CalibrationError: a tensor that the graph lacks, or no samples.
        ParityError: onnxruntime failed on a batch.
        Exception: whatever `batches` raises, as it is.
    """
    if not layers:
        return {}
    by_sample = splits_samples(model, provider)
    taps = Taps(
        model.path,
        tuple(dict.fromkeys(layer.tensor for layer in layers)),
        threads=1 if by_sample else None,
        provider=provider,
    )
    found = {layer.node: _empty(layer, products=products) for layer in layers}

    def work(unit: Unit) -> int:
        number = hash_sample(unit.feeds)
        activations = taps.run(unit.feeds)
        for layer in layers:
            for row in _each_sample(activations[layer.tensor], unit.samples):
                _add(found[layer.node], layer, layer.rows(row, number))
        return unit.samples

    units = split_units(batches, by_sample=by_sample)
    if run_units(units, work, count_workers(by_sample=by_sample)) == 0:
        raise CalibrationError("no samples to fit weights on", fix="give the calibration data again")
    return found


def _empty(layer: Layer, *, products: bool) -> Moments:
    shape = (layer.groups, layer.inputs)
    second = np.zeros((*shape, layer.inputs)) if products and layer.inputs <= LARGEST_INPUT else None
    return Moments(0, np.zeros(shape), np.zeros(shape, np.int64), second)


def _each_sample(array: Array, samples: int) -> list[Array]:
    if samples > 1 and len(array) == samples:
        return [array[index : index + 1] for index in range(samples)]
    return [array]


def _add(moments: Moments, layer: Layer, rows: Array) -> None:
    scaled = np.asarray(rows, np.float32) / np.float32(layer.scale)
    codes = np.clip(np.rint(scaled), -_CODE, _CODE)
    remainder = np.rint((scaled - codes).astype(np.float64) * _FRACTION).astype(np.int64).sum(axis=0)
    total = codes.sum(axis=0, dtype=np.float64)
    products = None
    if moments.products is not None:
        grouped = np.ascontiguousarray(codes.transpose(1, 2, 0))
        # Whole numbers below 2**24 (128 rows of 127 * 127): exact in float32, in whatever order they are summed.
        products = grouped @ grouped.transpose(0, 2, 1)
    with moments.lock:
        moments.count += len(rows)
        moments.codes += total
        moments.remainders += remainder
        if products is not None and moments.products is not None:
            moments.products += products


def _choose(count: int, seed: int) -> NDArray[np.intp]:
    """`ROWS` of `count` places, in order; all of them where there are no more."""
    if count <= ROWS:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, ROWS, replace=False))


def _rows(array: Array, seed: int) -> Array:
    matrix = array.reshape(-1, array.shape[-1])
    return np.asarray(matrix[_choose(len(matrix), seed)][:, None, :])


def _columns(array: Array, seed: int) -> Array:
    return _rows(array.T, seed)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """A convolution's window along each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str

    @classmethod
    def of(cls, node: ir.Node, weight: Sequence[int]) -> _Geometry:
        kernel = tuple(weight[2:])
        ones, zeros = (1,) * len(kernel), (0,) * (2 * len(kernel))
        auto = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
        return cls(
            kernel, _ints(node, "strides", ones), _ints(node, "dilations", ones), _ints(node, "pads", zeros), auto
        )

    def padding(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Before and after, for each axis (ONNX's Conv)."""
        axes = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return [(self.pads[axis], self.pads[axis + axes]) for axis in range(axes)]
        if self.auto_pad == "VALID":
            return [(0, 0)] * axes
        found = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return found


def _windows(array: Array, seed: int, *, geometry: _Geometry, groups: int) -> Array:
    """Windows of one sample (1, C, ...): (rows, G, C / G * kernel)."""
    image = np.pad(array[0], [(0, 0), *geometry.padding(array.shape[2:])])
    axes = range(1, image.ndim)
    spans = [dilation * (size - 1) + 1 for size, dilation in zip(geometry.kernel, geometry.dilations, strict=True)]
    view = sliding_window_view(image, spans, axis=tuple(axes))
    places = tuple(slice(None, None, stride) for stride in geometry.strides)
    taps = tuple(slice(None, None, dilation) for dilation in geometry.dilations)
    view = view[(slice(None), *places, *taps)]
    sizes = view.shape[1 : image.ndim]
    chosen = np.unravel_index(_choose(math.prod(sizes), seed), sizes)
    index: tuple[Any, ...] = (slice(None), *chosen)
    taken = view[index]
    return np.asarray(np.moveaxis(taken, 1, 0).reshape(taken.shape[1], groups, -1))


def _int(node: ir.Node, name: str, default: int) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else default


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default
