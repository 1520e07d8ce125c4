"""Which element type each node of a graph gets under a precision plan, and why; `casts` carries it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtforge.converter.types import NodeTypes, node_types
from trtforge.runtime.graph import META_ORIGIN, all_graphs, node_refs
from trtforge.runtime.precision import QUANTIZED, Assignment, Origin, Precision, PrecisionPlan

__all__ = ["FLOAT_TYPES", "Decision", "assign", "constant_tensor", "float_slots", "largest_magnitude", "largest_value"]

FLOAT_TYPES: Mapping[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT, "tf32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16,
}  # fmt: skip

NATURAL: Mapping[str, frozenset[int]] = {
    "Shape": frozenset({0}), "Size": frozenset({0}), "Cast": frozenset({0}), "CastLike": frozenset({0}),
    "EyeLike": frozenset({0}), "RandomNormalLike": frozenset({0}), "RandomUniformLike": frozenset({0}),
}  # fmt: skip
"""Input slots whose values don't depend on their type, or that are converted anyway: they take whatever comes."""

_KEPT: Mapping[str, frozenset[str]] = {
    "Resize": frozenset({"T2"}),  # the region of interest: coordinates
    "OneHot": frozenset({"T1", "T2"}),  # float indices and depth: past 2048 not exact in fp16
    "Dropout": frozenset({"T1", "T2"}),  # the ratio, unused at inference; bfloat16 from opset 22 only
    "LayerNormalization": frozenset({"U"}),  # Mean and InvStdDev are of the type that `stash_type` names
}


@dataclass(frozen=True, slots=True)
class Decision:
    """The precision that one node with float32 tensors runs in, who decided it and why.

    Attributes:
        id: The node's id.
        op: Its operator.
        precision: "fp32", "tf32", "fp16" or "bf16"; the float precision around it where the plan quantizes it.
        origin: Who decided; None where it is the plan's default.
        reason: Why, for people.
        dtype: The element type of its converted slots.
        inputs: Input slots that are converted to `dtype`; its other float32 slots stay float32.
        outputs: Output slots that are.
    """

    id: str
    op: str
    precision: Precision
    origin: Origin | None
    reason: str
    dtype: ir.DataType
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


def assign(model: ir.Model, plan: PrecisionPlan, *, graph: str | None = None) -> dict[ir.Node, Decision]:
    """What the plan comes to for every node that has float32 tensors.

    A node stays in fp32 in spite of its plan where its operator does not take the type at the graph's opset (origin
    "type"), or where a weight of it lies beyond the type's range (origin "overflow").

    Args:
        model: A float graph; every value's element type is known (`types.infer_types`).
        plan: The plan.
        graph: Hash of the graph, checked where the plan selects by id.

    Raises:
        ConfigError: as `PrecisionPlan.resolve`.
    """
    resolved = plan.resolve(node_refs(model), graph=graph)
    opsets = model.graph.opset_imports
    out: dict[ir.Node, Decision] = {}
    for node in _own_nodes(model):
        inputs, outputs = float_slots(node)
        if not inputs and not outputs:
            continue
        wish = resolved[node.name or ""]
        precision = plan.float_default if wish.precision in QUANTIZED else wish.precision
        out[node] = _decide(node, wish, precision, inputs, outputs, node_types(node, opsets), opsets)
    return out


def _own_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in all_graphs(model):
        if isinstance(graph, ir.Graph):  # bodies of local functions have no types of their own and stay as they are
            yield from (node for node in graph if META_ORIGIN not in node.metadata_props)


def float_slots(node: ir.Node) -> tuple[frozenset[int], frozenset[int]]:
    """Input and output slots that hold float32 tensors and whose type the node's precision decides."""
    if node.domain == "" and node.op_type == "Constant":
        return frozenset(), frozenset()  # a constant has the types that its consumers want
    natural = NATURAL.get(node.op_type, frozenset()) if node.domain == "" else frozenset()
    return (
        frozenset(i for i, value in enumerate(node.inputs) if _is_float(value) and i not in natural),
        frozenset(i for i, value in enumerate(node.outputs) if _is_float(value)),
    )


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT and isinstance(value.type, ir.TensorType)


def _decide(
    node: ir.Node,
    wish: Assignment,
    precision: Precision,
    inputs: frozenset[int],
    outputs: frozenset[int],
    types: NodeTypes | None,
    opsets: Mapping[str, int],
) -> Decision:
    name = node.name or ""
    dtype = FLOAT_TYPES[precision]
    if dtype == ir.DataType.FLOAT:
        return Decision(name, node.op_type, precision, wish.origin, wish.reason, dtype)

    def stays(origin: Origin, reason: str) -> Decision:
        return Decision(name, node.op_type, "fp32", origin, reason, ir.DataType.FLOAT)

    if types is None:
        return stays("type", f"{node.domain}.{node.op_type} is no operator that onnx knows")
    kept = _KEPT.get(node.op_type, frozenset())

    def convertible(slots: frozenset[int], variables: tuple[str, ...]) -> frozenset[int]:
        return frozenset(
            i for i in slots
            if i < len(variables) and variables[i] not in kept and types.takes(variables[i], dtype)
        )  # fmt: skip

    low_inputs, low_outputs = convertible(inputs, types.inputs), convertible(outputs, types.outputs)
    if not low_inputs and not low_outputs:
        return stays("type", f"{node.op_type} does not take {dtype.name.lower()} at opset {opsets[node.domain]}")
    for index in sorted(low_inputs):
        tensor = constant_tensor(node.inputs[index])
        if tensor is not None and (worst := largest_magnitude(tensor)) > largest_value(dtype):
            shown = f"{node.inputs[index].name} reaches {worst:.6g}"  # type: ignore[union-attr]
            return stays("overflow", f"{shown}, {precision} ends at {largest_value(dtype):.6g}")
    return Decision(name, node.op_type, precision, wish.origin, wish.reason, dtype, low_inputs, low_outputs)


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer (one that callers cannot override) or a Constant node; None for the rest."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain:
        return None
    if "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    if "value_float" in producer.attributes:
        return ir.tensor(np.float32(producer.attributes["value_float"].as_float()))
    if "value_floats" in producer.attributes:
        return ir.tensor(np.array(producer.attributes["value_floats"].as_floats(), np.float32))
    return None


def largest_magnitude(tensor: ir.TensorProtocol) -> float:
    """The largest finite |x|; 0 for an empty tensor. Infinities and NaN exist in every float type."""
    array = tensor.numpy()
    if array.size == 0:
        return 0.0
    low, high = float(array.min()), float(array.max())
    if np.isfinite(low) and np.isfinite(high):
        return max(abs(low), abs(high))
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def largest_value(dtype: ir.DataType) -> float:
    """The largest finite value of a float type: 65504 for float16, 3.3895e38 for bfloat16."""
    return float(ml_dtypes.finfo(dtype.numpy()).max)
