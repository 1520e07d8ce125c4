"""Which element type each node of a graph gets under a precision plan, and why; `casts` carries it out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtforge.converter.dataflow import find_masks, find_positions, is_limit
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
    # Variances of dead channels vanish in fp16. RTX builds the mixture; TensorRT folds all of it into a scale.
    "BatchNormalization": frozenset({"T1", "T2", "U"}),
    "LayerNormalization": frozenset({"U"}),  # Mean and InvStdDev are of the type that `stash_type` names
}

# Each alone, parsed and built by RTX 1.7 at opset 23: refused by the parser, or (ConvTranspose) by the builder.
_REFUSED: Mapping[ir.DataType, frozenset[str]] = {
    ir.DataType.FLOAT16: frozenset({"MeanVarianceNormalization"}),
    ir.DataType.BFLOAT16: frozenset({
        "ConvTranspose", "GRU", "HardSwish", "LpNormalization", "LpPool", "MeanVarianceNormalization", "Mish",
        "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Shrink",
    }),
}  # fmt: skip

_SMALLEST_NORMAL = 2.0**-14
_VANISHING = 2.0**-22
"""Four times fp16's smallest number: a constant below it would become 0 or lose more than an eighth of itself."""

_EXACT = {ir.DataType.FLOAT16: 2048, ir.DataType.BFLOAT16: 256}
"""Up to here a type holds every integer."""


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
        clamps: Input slots whose constant is cut to the finite range of `clamp_type`: a mask's "lowest float", or a
            limit, that lies beyond it.
        clamp_type: The low type whose range that is.
    """

    id: str
    op: str
    precision: Precision
    origin: Origin | None
    reason: str
    dtype: ir.DataType
    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    clamps: frozenset[int] = frozenset()
    clamp_type: ir.DataType = ir.DataType.FLOAT


def assign(
    model: ir.Model, plan: PrecisionPlan, *, graph: str | None = None, no_half: Collection[str] = ()
) -> dict[ir.Node, Decision]:
    """What the plan comes to for every node that has float32 tensors.

    A node stays in fp32 in spite of its plan where its operator does not take the type, in ONNX at the graph's opset
    or in TensorRT's parser (origin "type"); where it computes positions, unless a rule of the plan names it (origin
    "type"); where a constant of it lies beyond the type's range, unless that only means "masked" (origin "overflow").

    Args:
        model: A float graph; every value's element type is known (`types.infer_types`).
        plan: The plan.
        graph: Hash of the graph, checked where the plan selects by id.
        no_half: Ids of nodes that get fp32 where the plan says fp16: quantized products, for a backend that sums their
            codes in float16.

    Raises:
        ConfigError: as `PrecisionPlan.resolve`.
    """
    resolved = plan.resolve(node_refs(model), graph=graph)
    wishes: dict[ir.Node, tuple[Assignment, Precision]] = {}
    for node in _own_nodes(model):
        if any(float_slots(node)):
            wish = resolved[node.name or ""]
            precision = plan.float_default if wish.precision in QUANTIZED else wish.precision
            wishes[node] = wish, "fp32" if node.name in no_half and precision == "fp16" else precision
    if all(FLOAT_TYPES[precision] == ir.DataType.FLOAT for _, precision in wishes.values()):
        return {node: _keep(node, precision, wish.origin, wish.reason) for node, (wish, precision) in wishes.items()}
    rules = _Rules(model.graph.opset_imports, find_positions(model), find_masks(model), FLOAT_TYPES[plan.float_default])
    return {node: rules.decide(node, wish, precision) for node, (wish, precision) in wishes.items()}


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


def _keep(node: ir.Node, precision: Precision, origin: Origin | None, reason: str) -> Decision:
    return Decision(node.name or "", node.op_type, precision, origin, reason, ir.DataType.FLOAT)


@dataclass(frozen=True, slots=True)
class _Rules:
    """What decides whether a node can run in a low precision; `default` is the plan's own float type."""

    opsets: Mapping[str, int]
    positions: set[ir.Node]
    masks: set[ir.Value]
    default: ir.DataType

    def decide(self, node: ir.Node, wish: Assignment, precision: Precision) -> Decision:
        dtype = FLOAT_TYPES[precision]
        if dtype == ir.DataType.FLOAT:
            return self._clamped(_keep(node, precision, wish.origin, wish.reason), node)
        types = node_types(node, self.opsets)
        refusal = _refusal(node, dtype, types, self.opsets)
        if refusal or types is None:
            return self._clamped(_keep(node, "fp32", "type", refusal), node)
        if node in self.positions and wish.rule is None:
            reason = f"it computes positions from integers, which {precision} holds exactly up to {_EXACT[dtype]} only"
            return self._clamped(_keep(node, "fp32", "type", reason), node)
        inputs, outputs = _convertible(node, dtype, types)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes and node.outputs[0] not in self.masks:
            worst = largest_magnitude(node.attributes["value"].as_tensor())
            if worst > largest_value(dtype):
                return _keep(node, "fp32", "overflow", _too_large("its value", worst, precision))
        if precision == "fp16" and (reason := _meets_zero(node)):
            return self._clamped(_keep(node, "fp32", "overflow", reason), node)
        clamps = []
        for slot in sorted(inputs):
            reason = _unfit(node, slot, precision)
            if reason and self._beyond(node, slot, dtype) and self._may_clamp(node, slot, dtype):
                clamps.append(slot)
            elif reason:
                return self._clamped(_keep(node, "fp32", "overflow", reason), node)
        return Decision(
            node.name or "", node.op_type, precision, wish.origin, wish.reason, dtype,
            inputs, outputs, frozenset(clamps), dtype,
        )  # fmt: skip

    def _clamped(self, decision: Decision, node: ir.Node) -> Decision:
        """A mask made in float32 and used in half would become infinite at the cast: it is cut where it is made."""
        if self.default == ir.DataType.FLOAT:
            return decision
        clamps = frozenset(
            slot for slot in float_slots(node)[0]
            if not is_limit(node, slot)
            and self._beyond(node, slot, self.default)
            and self._may_clamp(node, slot, self.default)
        )  # fmt: skip
        return replace(decision, clamps=clamps, clamp_type=self.default)

    def _beyond(self, node: ir.Node, slot: int, dtype: ir.DataType) -> bool:
        tensor = constant_tensor(node.inputs[slot])
        return tensor is not None and largest_magnitude(tensor) > largest_value(dtype)

    def _may_clamp(self, node: ir.Node, slot: int, dtype: ir.DataType) -> bool:
        if is_limit(node, slot):
            return True
        value, tensor = node.inputs[slot], constant_tensor(node.inputs[slot])
        masked = value in self.masks or (
            node.op_type == "Mul" and node.domain == "" and all(output in self.masks for output in node.outputs)
        )
        return masked and tensor is not None and bool((tensor.numpy() <= largest_value(dtype)).all())


def _unfit(node: ir.Node, slot: int, precision: Precision) -> str:
    """Why the constant at `slot`, if it is one, cannot be held in `precision`; "" where it can."""
    value, tensor = node.inputs[slot], constant_tensor(node.inputs[slot])
    if value is None or tensor is None:
        return ""
    worst = largest_magnitude(tensor)
    if worst > largest_value(FLOAT_TYPES[precision]):
        return _too_large(f"its constant {value.name}", worst, precision)
    if precision != "fp16":
        return ""  # bfloat16 reaches as far down as float32
    if 0 < worst < _VANISHING and not _is_bias(node, slot):
        return f"its constant {value.name} is at most {worst:.6g}, fp16 has no digits below {_VANISHING:.3g}"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and slot == 1:
        smallest = float(np.abs(tensor.numpy()).min(initial=np.inf))
        if smallest < _SMALLEST_NORMAL:
            return f"its scale {value.name} goes down to {smallest:.6g}, fp16 loses digits below {_SMALLEST_NORMAL:.3g}"
    return ""


_BIASED = frozenset({"BatchNormalization", "Conv", "ConvTranspose", "Gemm", "GroupNormalization", "LayerNormalization"})


def _is_bias(node: ir.Node, slot: int) -> bool:
    """Whether the input is added to sums of products, whose results in fp16 are no finer than what it loses there.

    Convolutions that a BatchNorm was folded into have such ones: 1e-8, where training left a mean of nothing. Other
    constants that are added stay, since they keep divisors off zero. Results that all vanish are found by measuring.
    """
    if node.domain:
        return False
    if node.op_type == "Add":
        other = node.inputs[1 - slot]
        producer = None if other is None else other.producer()
        return producer is not None and not producer.domain and producer.op_type == "MatMul"
    return slot == 2 and node.op_type in _BIASED


_CARRYING = frozenset({"Expand", "Identity", "Reshape", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"})


def _meets_zero(node: ir.Node) -> str:
    """Why a division or a logarithm, or what leads to it, needs float32: what keeps it off zero would become zero.

    As in `normalize(x)` = x / max(|x|, 1e-12): for the zero rows of padded windows (Swin V2) that is 0 / 0 in fp16. Or
    in `log(power + 1e-10)` of a spectrum, which is -inf in silence.
    """
    if node.domain or node.op_type not in ("Div", "Log", "Reciprocal", *_CARRYING):
        return ""
    value = node.inputs[0 if node.op_type in _CARRYING else -1]
    while value is not None and (producer := value.producer()) is not None and not producer.domain:
        if producer.op_type in ("Clip", "Max", "Add"):
            tensors = (constant_tensor(guard) for guard in producer.inputs)
            sizes = [largest_magnitude(tensor) for tensor in tensors if tensor is not None]
            guard = next((size for size in sizes if 0 < size < _VANISHING), None)
            return "" if guard is None else f"{guard:.6g} keeps what it takes off zero, and fp16 takes that for 0"
        if producer.op_type not in _CARRYING:
            return ""
        value = producer.inputs[0]
    return ""


def _too_large(what: str, worst: float, precision: Precision) -> str:
    return f"{what} reaches {worst:.6g}, {precision} ends at {largest_value(FLOAT_TYPES[precision]):.6g}"


def _convertible(node: ir.Node, dtype: ir.DataType, types: NodeTypes) -> tuple[frozenset[int], frozenset[int]]:
    kept = _KEPT.get(node.op_type, frozenset())

    def those(slots: frozenset[int], variables: tuple[str, ...]) -> frozenset[int]:
        return frozenset(
            slot for slot in slots
            if slot < len(variables) and variables[slot] not in kept and types.takes(variables[slot], dtype)
        )  # fmt: skip

    inputs, outputs = float_slots(node)
    return those(inputs, types.inputs), those(outputs, types.outputs)


def _refusal(node: ir.Node, dtype: ir.DataType, types: NodeTypes | None, opsets: Mapping[str, int]) -> str:
    """Why the node's operator cannot run in `dtype`; "" where it can."""
    if types is None:
        return f"onnx knows no types of the operator {node.domain or 'ai.onnx'}.{node.op_type}"
    if node.domain == "" and node.op_type in _REFUSED.get(dtype, frozenset()):
        return f"TensorRT does not take {node.op_type} in {dtype.name.lower()}"
    inputs, outputs = _convertible(node, dtype, types)
    if not inputs and not outputs:
        return f"{node.op_type} does not take {dtype.name.lower()} at opset {opsets.get(node.domain, 0)}"
    return ""


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
    if "value_ints" in producer.attributes:
        return ir.tensor(np.array(producer.attributes["value_ints"].as_ints(), np.int64))
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
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
