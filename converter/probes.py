"""Measures a float graph on samples: magnitudes inside it, each reduced to one number where it arises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from trtforge.converter.types import body_graphs
from trtforge.runtime.graph import META_ORIGIN, all_graphs
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array, Tensors

__all__ = ["Kind", "Probe", "detach_weights", "measure"]

_LARGE = 1024
Kind = Literal["abs", "max", "centred", "sum", "norm"]


@dataclass(frozen=True)
class Probe:
    """One number to measure, the largest over all samples.

    Attributes:
        value: A float32 tensor of the graph or of one of its bodies.
        kind: "abs": max |x|; "max": max x; "centred": max |x - mean over `axes`|; "sum": max |sum over `axes`|;
            "norm": the largest Euclidean norm along the last axis.
        axes: What "centred" and "sum" reduce over.
    """

    value: ir.Value
    kind: Kind = "abs"
    axes: tuple[int, ...] = ()


def measure(
    model: ir.Model,
    probes: Iterable[Probe],
    samples: Sequence[Tensors],
    *,
    finite: bool = False,
) -> dict[Probe, float]:
    """Runs the model on every sample with onnxruntime and returns what the probes saw; -inf where nothing ran.

    The reductions stand inside the graph, so that no activation leaves it and memory stays that of inference. In
    Loop and Scan bodies the maximum over iterations is taken, in If bodies that of the branch which ran.

    Args:
        model: The graph; a copy of it is run.
        probes: What to measure; values of `model`.
        samples: Inputs by name.
        finite: Pass over infinite elements, at some cost.

    Raises:
        ConfigError: a sample does not fit the graph's inputs.
        ParityError: onnxruntime failed on one.
    """
    copy = model.clone()
    twins = dict(zip(_values(model), _values(copy), strict=True))
    wanted: dict[ir.Graph, list[tuple[Probe, ir.Value]]] = {}
    for probe in dict.fromkeys(probes):
        twin = twins[probe.value]
        graph = _owner(twin)
        if graph is not None:
            wanted.setdefault(graph, []).append((probe, twin))
    found = _Attachment(copy.graph.opset_imports.get("", 0), wanted, finite).attach(copy.graph)
    if found is None:
        return {}
    vector, order = found
    copy.graph.outputs.clear()
    copy.graph.outputs.append(vector)
    weights = detach_weights(copy)
    runner = OnnxRuntimeRunner(ir.to_proto(copy).SerializeToString(), weights=weights)
    worst = np.full(len(order), -np.inf, np.float64)
    for sample in samples:
        seen = runner.run(sample)[vector.name or ""].astype(np.float64)
        worst = np.fmax(worst, seen)
    return dict(zip(order, worst.tolist(), strict=True))


def detach_weights(model: ir.Model) -> dict[str, Array]:
    """Takes large initializers of the main graph out of the model, which then calls them external."""
    weights: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype.is_string() or value.is_graph_input():
            continue
        if tensor.nbytes < _LARGE and not isinstance(tensor, ir.ExternalTensor):
            continue
        array = np.asarray(tensor.numpy())
        # Packed types have 4 bits an element; of FP8 and bfloat16, which numpy only knows by ml_dtypes, onnxruntime's
        # bindings take no array.
        if array.nbytes != tensor.nbytes or array.dtype.kind not in "biuf":
            continue
        weights[name] = array
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name, base_dir=""
        )
    return weights


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _owner(value: ir.Value) -> ir.Graph | None:
    producer = value.producer()
    graph = value.graph if producer is None else producer.graph
    return graph if isinstance(graph, ir.Graph) else None


class _Attachment:
    """Adds the reductions to a graph and its bodies, and leads their results out to the main graph."""

    def __init__(self, opset: int, wanted: dict[ir.Graph, list[tuple[Probe, ir.Value]]], finite: bool) -> None:
        self.opset = opset
        self.wanted = wanted
        self.finite = finite
        self.count = 0

    def attach(self, graph: ir.Graph) -> tuple[ir.Value, list[Probe]] | None:
        """A vector at the graph's end, and the probe behind each of its elements; None where there is none."""
        parts: list[ir.Value] = []
        order: list[Probe] = []
        for node in list(graph):
            inner = [(body, self.attach(body)) for body in body_graphs(node)]
            if any(found for _, found in inner):
                vector, keys = self._lead_out(graph, node, inner)
                parts.append(vector)
                order.extend(keys)
        for probe, value in self.wanted.get(graph, ()):
            scalar = self._scalar(graph, probe, value)
            parts.append(self._add(graph, "Reshape", [scalar, self._ints(graph, [1])]))
            order.append(probe)
        if not parts:
            return None
        return self._typed(self._add(graph, "Concat", parts, axis=0), len(order)), order

    def _lead_out(
        self, graph: ir.Graph, node: ir.Node, inner: list[tuple[ir.Graph, tuple[ir.Value, list[Probe]] | None]]
    ) -> tuple[ir.Value, list[Probe]]:
        order = [probe for _, found in inner for probe in (found[1] if found else [])]
        for index, (body, found) in enumerate(inner):
            # Each branch of an If gives all elements; those of the other one are minus infinity.
            parts = []
            for other, (_, theirs) in enumerate(inner):
                if other == index and found:
                    parts.append(found[0])
                elif theirs:
                    parts.append(self._floats(body, np.full(len(theirs[1]), -np.inf, np.float32)))
            body.outputs.append(self._typed(self._add(body, "Concat", parts, axis=0), len(order)))
        node.resize_outputs(len(node.outputs) + 1)
        result = node.outputs[-1]
        result.name = self._name()
        result.type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "If":
            return result, order
        for name in ("scan_output_axes", "scan_output_directions"):
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].as_ints(), 0])
        return self._reduce(graph, "ReduceMax", result, (0,), keepdims=0), order

    def _scalar(self, graph: ir.Graph, probe: Probe, value: ir.Value) -> ir.Value:
        if self.finite:
            infinite = self._add(graph, "IsInf", [value])
            value = self._add(graph, "Where", [infinite, self._floats(graph, np.zeros(1, np.float32)), value])
        if probe.kind == "max":
            return self._reduce(graph, "ReduceMax", value, None, keepdims=0)
        if probe.kind == "centred":
            mean = self._reduce(graph, "ReduceMean", value, probe.axes, keepdims=1)
            value = self._add(graph, "Sub", [value, mean])
        elif probe.kind == "sum":
            value = self._reduce(graph, "ReduceSum", value, probe.axes, keepdims=1)
        elif probe.kind == "norm":
            value = self._reduce(graph, "ReduceL2", value, (-1,), keepdims=1)
        # Both ends: less than half the time of Abs and one maximum, which write a tensor in between.
        lowest = self._add(graph, "Neg", [self._reduce(graph, "ReduceMin", value, None, keepdims=0)])
        return self._add(graph, "Max", [self._reduce(graph, "ReduceMax", value, None, keepdims=0), lowest])

    def _reduce(
        self, graph: ir.Graph, op: str, value: ir.Value, axes: tuple[int, ...] | None, *, keepdims: int
    ) -> ir.Value:
        if axes is None:
            return self._add(graph, op, [value], keepdims=keepdims)
        # Axes became an input of ReduceSum at opset 13, of the others at 18.
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self._add(graph, op, [value, self._ints(graph, list(axes))], keepdims=keepdims)
        return self._add(graph, op, [value], keepdims=keepdims, axes=list(axes))

    def _ints(self, graph: ir.Graph, values: list[int]) -> ir.Value:
        return self._add(graph, "Constant", [], value=ir.tensor(np.array(values, np.int64)))

    def _floats(self, graph: ir.Graph, values: np.ndarray[Any, np.dtype[np.float32]]) -> ir.Value:
        return self._add(graph, "Constant", [], value=ir.tensor(values))

    def _add(self, graph: ir.Graph, op: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        name = self._name()
        node = ir.node(op, inputs, attributes or None, name=name, metadata_props={META_ORIGIN: "probe"})
        node.outputs[0].name = name
        graph.append(node)
        return node.outputs[0]

    def _typed(self, value: ir.Value, size: int) -> ir.Value:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([size])
        return value

    def _name(self) -> str:
        self.count += 1
        return f"trtforge.probe.{self.count}"
