"""Weights and biases fitted to the data: codes that keep each layer's output, and biases that keep its mean.

It is a stage of its own behind the ranges: with scales known, some samples run once more and give exact moments of the
codes that every int8 layer reads (`moments`). Each weight is then rounded
by its effect on the output (`rounding`), and what is left of the mean goes into the bias (`bias`). FP8 weights,
ConvTranspose, and products of sequences keep the nearest codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.moments import Layer, Moments, collect_moments, describe_layer
from trtforge.calibration.placement import Placement, QuantizedWeight
from trtforge.calibration.ranges import Ranges
from trtforge.calibration.rounding import output_noise, round_weights
from trtforge.calibration.weights import FittedWeight, constant_array, constant_shape, quantize_weight
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.runner import Tensors
from trtforge.runtime.tensors import load_tensors, save_tensors

__all__ = ["Fit", "FitSettings", "LayerFit", "describe_key", "fit_weights", "load_fit", "save_fit"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What is fitted.

    Attributes:
        rounding: Weights are rounded by their effect on the output; without it, each to its nearest code.
        bias: What is left of the mean error goes into the bias.
    """

    rounding: bool = True
    bias: bool = True

    def describe(self) -> str:
        """In words, with the version of the algorithms."""
        parts = [name for name, on in (("rounding 1", self.rounding), ("bias 1", self.bias)) if on]
        return ", ".join(parts) or "nearest codes"


@dataclass(frozen=True, slots=True)
class LayerFit:
    """What fitting did to one layer.

    Attributes:
        node: Its id.
        nearest_db: Variance of its output over that of the error of nearest codes, in dB; None without signal or error.
        fitted_db: The same of the codes that are used.
        bias_shift: Root mean square of what was added to the bias, over the output's standard deviation.
    """

    node: str
    nearest_db: float | None
    fitted_db: float | None
    bias_shift: float


@dataclass(frozen=True, slots=True)
class Fit:
    """Codes by the id of the node that reads them, additions to biases, and what they did.

    Attributes:
        weights: For `insert_qdq`.
        biases: float32 of shape (output channels,), for `apply_corrections`.
        layers: In the graph's order.
        settings: As `FitSettings.describe` writes them.
        key: `describe_key` of what it was made from.
    """

    weights: Mapping[str, FittedWeight] = field(default_factory=dict)
    biases: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    layers: tuple[LayerFit, ...] = ()
    settings: str = ""
    key: str = ""

    def to_json(self) -> dict[str, Any]:
        """Settings, key and layers; not the arrays."""
        layers = [{name: getattr(layer, name) for name in LayerFit.__slots__} for layer in self.layers]
        return {"settings": self.settings, "key": self.key, "layers": layers}


def describe_key(graph: str, ranges: Ranges, settings: FitSettings, dtype: ir.DataType) -> str:
    """SHA-256 of what a fit depends on; it is used for nothing else.

    Args:
        graph: Hash of the graph as exported.
        ranges: With what they were made from, and the smoothing.
        settings: What is fitted.
        dtype: The float type that scales are exact in.
    """
    made = ranges.made_from
    facts = {
        "graph": graph,
        "data": made.data,
        "provider": made.provider,
        "versions": dict(made.versions),
        "ranges": {name: found.amax for name, found in ranges.tensors.items()},
        "smoothing": dict(ranges.smoothing),
        "settings": settings.describe(),
        "dtype": dtype.name,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fit_weights(
    model: OnnxModel,
    placement: Placement,
    ranges: Ranges,
    samples: Sequence[Tensors],
    *,
    settings: FitSettings = FitSettings(),
    dtype: ir.DataType = ir.DataType.FLOAT,
    provider: str = "cpu",
) -> Fit:
    """Fits the weights and biases of every int8 Conv, Gemm and MatMul that placement quantizes.

    Args:
        model: The float32 model that placement saw.
        placement: What is quantized.
        ranges: Of its tensors.
        samples: Calibration data; `choose_samples` gives 64.
        settings: What to fit; nothing gives an empty fit.
        dtype: The float type that the graph will have: scales are exact in it.
        provider: "cpu" or "cuda".

    Raises:
        CalibrationError: a tensor has no range, a weight is not finite, or there are no samples.
        ParityError: onnxruntime failed.
    """
    key = describe_key(ranges.made_from.graph or model.hash, ranges, settings, dtype)
    if not (settings.rounding or settings.bias):
        return Fit(settings=settings.describe(), key=key)
    graph = load_graph(model.path)
    nodes = {node.name or "": node for node in graph.graph}
    layers = _layers(nodes, placement, ranges)
    moments = collect_moments(
        model,
        list(layers.values()),
        samples,
        provider=provider,
        products=settings.rounding,
    )
    weights: dict[str, FittedWeight] = {}
    biases: dict[str, NDArray[np.float32]] = {}
    facts: dict[str, LayerFit] = {}
    for weight in placement.weights:
        readers = [use.node for use in weight.uses if use.node in layers]
        if not readers or weight.format != "int8":
            continue
        job = _Job(nodes, weight, {name: (layers[name], moments.pop(name)) for name in readers}, dtype)
        fitted = job.fit() if settings.rounding else job.nearest
        weights |= dict.fromkeys((use.node for use in weight.uses), fitted)
        for name in readers:
            delta = job.shift(name, fitted)
            facts[name] = job.describe(name, fitted, delta if settings.bias else None)
            if settings.bias:
                biases[name] = delta.astype(np.float32)
    ordered = tuple(facts[name] for name in nodes if name in facts)
    return Fit(weights if settings.rounding else {}, biases, ordered, settings.describe(), key)


def _layers(nodes: Mapping[str, ir.Node], placement: Placement, ranges: Ranges) -> dict[str, Layer]:
    """Those whose first input is a quantized activation and whose second is a quantized weight, both in int8."""
    weighted = {use.node for w in placement.weights if w.format == "int8" for use in w.uses if use.index == 1}
    found: dict[str, Layer] = {}
    for tensor in placement.tensors:
        for use in tensor.uses:
            if use.index != 0 or use.node not in weighted or tensor.format != "int8":
                continue
            weight = nodes[use.node].inputs[1]
            assert weight is not None
            scale = ranges[tensor.measured].scale("int8")
            layer = describe_layer(nodes[use.node], tensor.name, scale, constant_shape(weight))
            if layer is not None:
                found[use.node] = layer
    return found


class _Job:
    """One weight, and the layers that read it."""

    def __init__(
        self,
        nodes: Mapping[str, ir.Node],
        weight: QuantizedWeight,
        readers: Mapping[str, tuple[Layer, Moments]],
        dtype: ir.DataType,
    ) -> None:
        first = next(iter(readers))
        value = nodes[first].inputs[1]
        assert value is not None
        self.array = constant_array(value)
        self.readers = readers
        self.groups = readers[first][0].groups
        node = nodes[first]
        # (K, O) as MatMul and Gemm without transB have it; else the output comes first.
        self.transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not ("transB" in node.attributes and node.attributes["transB"].as_int())
        )
        self.nearest = FittedWeight(*quantize_weight(weight.name, self.array, weight.axis, weight.format, dtype))
        self.scales = np.broadcast_to(self.nearest.scales.astype(np.float64), (self._grouped(self.array)[..., 0].size,))
        self.scales = self.scales.reshape(self.groups, -1)
        self.exact = self._grouped(self.array)

    def fit(self) -> FittedWeight:
        """The rounded codes; the nearest where there is no covariance, or where they are no worse."""
        covariance = self._covariance()
        if covariance is None:
            return self.nearest
        codes = round_weights(self.exact, self.scales, covariance)
        fitted = FittedWeight(self._ungrouped(codes), self.nearest.scales)
        better = output_noise(self._errors(fitted), covariance) < output_noise(self._errors(self.nearest), covariance)
        return fitted if better else self.nearest

    def shift(self, name: str, weight: FittedWeight) -> Floats:
        """What the bias must gain for the output to keep its mean; shape (output channels,)."""
        layer, moments = self.readers[name]
        floats, codes = moments.means()
        wanted = np.einsum("gok,gk->go", self.exact, floats)
        got = np.einsum("gok,gk->go", self.exact + self._errors(weight), codes)
        return np.asarray((wanted - got).reshape(-1) * layer.scale)

    def describe(self, name: str, weight: FittedWeight, delta: Floats | None) -> LayerFit:
        layer, moments = self.readers[name]
        covariance = moments.covariance()
        if covariance is None:
            return LayerFit(name, None, None, 0.0)
        signal = output_noise(self.exact, covariance)
        nearest, fitted = (_decibels(signal, output_noise(self._errors(w), covariance)) for w in (self.nearest, weight))
        deviation = np.sqrt(signal / self.scales.size) * layer.scale
        shift = 0.0 if delta is None or deviation == 0 else float(np.sqrt(np.mean(delta**2)) / deviation)
        return LayerFit(name, nearest, fitted, shift)

    def _covariance(self) -> Floats | None:
        """Of all layers that read the weight, summed; None with fewer rows than inputs, which would fit noise."""
        if any(moments.count < layer.inputs for layer, moments in self.readers.values()):
            return None
        found = [moments.covariance() for _, moments in self.readers.values()]
        shapes = {None if one is None else one.shape for one in found}
        if None in shapes or len(shapes) > 1:
            return None
        scales = [layer.scale for layer, _ in self.readers.values()]
        return np.asarray(sum(one * scale**2 for one, scale in zip(found, scales, strict=True) if one is not None))

    def _errors(self, weight: FittedWeight) -> Floats:
        return self._grouped(weight.codes) * self.scales[:, :, None] - self.exact

    def _grouped(self, array: NDArray[Any]) -> Floats:
        """As (G, O, K)."""
        flat = array.astype(np.float64)
        flat = flat.T if self.transposed else flat.reshape(len(flat), -1)
        return np.ascontiguousarray(flat).reshape(self.groups, -1, flat.shape[1])

    def _ungrouped(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        flat = codes.reshape(-1, codes.shape[2])
        return np.ascontiguousarray((flat.T if self.transposed else flat).reshape(self.array.shape))


def _decibels(signal: float, noise: float) -> float | None:
    return 10 * float(np.log10(signal / noise)) if signal > 0 and noise > 0 else None


def save_fit(path: Path, fit: Fit) -> None:
    """Writes codes, scales and biases as safetensors, the rest as its metadata; equal fits give equal bytes.

    Raises:
        ArtifactError: the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {f"bias/{node}": delta for node, delta in fit.biases.items()}
    for node, weight in fit.weights.items():
        arrays |= {f"codes/{node}": weight.codes, f"scales/{node}": weight.scales}
    save_tensors(path, arrays, {"fit": json.dumps(fit.to_json(), sort_keys=True)})


def load_fit(path: Path) -> Fit:
    """Reads what `save_fit` wrote.

    Raises:
        ArtifactError: it cannot be read, or is no such file.
    """
    arrays, metadata = load_tensors(path)
    try:
        facts = json.loads(metadata["fit"])
        layers = tuple(LayerFit(**layer) for layer in facts["layers"])
        names = [name.removeprefix("codes/") for name in arrays if name.startswith("codes/")]
        weights = {name: FittedWeight(arrays[f"codes/{name}"], arrays[f"scales/{name}"]) for name in names}
        biases = {
            name.removeprefix("bias/"): np.asarray(array, np.float32)
            for name, array in arrays.items()
            if name.startswith("bias/")
        }
        return Fit(weights, biases, layers, facts["settings"], facts["key"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is damaged: {type(error).__name__} {error}", fix="delete it and calibrate again"
        ) from error
