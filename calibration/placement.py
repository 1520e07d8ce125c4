"""Which tensors of a float graph are quantized: decides, and changes nothing.

The rules are TensorRT's for explicit quantization (`../shared/FACTS.md`): every input of Conv, ConvTranspose, Gemm and
MatMul, none of their outputs (BatchNorm, activation and residual Add fuse into them), and at a residual Add the skip
branch alone, so that the Add fuses into the convolution of the other one. Nodes inside If, Loop and Scan bodies and
local functions stay in float, since no runtime lets their tensors be measured from outside; so do the insides of the
`Attention` operator.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir

from trtforge.calibration.ranges import QuantFormat
from trtforge.calibration.weights import channel_axis, constant_shape, is_constant
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.graph import node_refs
from trtforge.runtime.precision import QUANTIZED, Assignment, PrecisionPlan

__all__ = [
    "PRODUCTS",
    "QUANTIZABLE",
    "Placement",
    "QuantizedTensor",
    "QuantizedWeight",
    "Skipped",
    "Use",
    "quantizable_tensors",
]

QUANTIZABLE: tuple[str, ...] = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")
"""Operators that a plan can quantize; of Add only the skip branch beside a quantized convolution."""

PRODUCTS = frozenset(QUANTIZABLE) - {"Add"}
"""Those that sum products of codes."""

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, None})
_SAME_VALUES = frozenset(
    {"DepthToSpace", "Flatten", "Identity", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that move elements and change none: the range of their input is the range of their output."""
_BEFORE_ADD = frozenset({"BatchNormalization", "Identity", "Transpose"})
"""What may stand between a convolution and the residual Add that fuses into it."""


@dataclass(frozen=True, slots=True)
class Use:
    """One input of one node: its id, and which input."""

    node: str
    index: int


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """An activation with one Q/DQ pair and one scale.

    Attributes:
        name: The value that the uses read, in the graph that placement saw.
        measured: The value whose range it takes: `name`, or what it is a reordering or a pooling of.
        format: "int8" or "fp8".
        uses: The inputs that read the dequantized tensor; everything else goes on reading the float one.
    """

    name: str
    measured: str
    format: QuantFormat
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A constant, stored as codes behind a DequantizeLinear; `axis` None means one scale for all of it.

    A weight that is read along two axes appears twice.
    """

    name: str
    format: QuantFormat
    axis: int | None
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A node of a quantizable type, quantized by the plan, that stays in float all the same; and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Placement:
    """What to quantize, by node ids and the names of the reference graph; it holds for any graph with the same ids.

    Attributes:
        tensors: Activations, in the order of their first use.
        weights: Constants, likewise.
        skipped: Nodes left in float against the plan.
        existing: Q/DQ nodes that the model brought along (QAT, ModelOpt). Where there is one, nothing else is placed.
    """

    tensors: tuple[QuantizedTensor, ...] = ()
    weights: tuple[QuantizedWeight, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    existing: int = 0

    @property
    def measured(self) -> tuple[str, ...]:
        """The values to calibrate: each once, in order."""
        return tuple(dict.fromkeys(tensor.measured for tensor in self.tensors))

    @property
    def nodes(self) -> tuple[str, ...]:
        """Ids of the nodes that read a quantized activation or weight, in order."""
        items: tuple[QuantizedTensor | QuantizedWeight, ...] = (*self.tensors, *self.weights)
        return tuple(dict.fromkeys(use.node for item in items for use in item.uses))

    def without(self, nodes: set[str] | frozenset[str]) -> Placement:
        """This placement with the nodes of these ids back in float."""

        def kept(uses: tuple[Use, ...]) -> tuple[Use, ...]:
            return tuple(use for use in uses if use.node not in nodes)

        return Placement(
            tuple(QuantizedTensor(t.name, t.measured, t.format, kept(t.uses)) for t in self.tensors if kept(t.uses)),
            tuple(QuantizedWeight(w.name, w.format, w.axis, kept(w.uses)) for w in self.weights if kept(w.uses)),
            self.skipped,
            self.existing,
        )


def quantizable_tensors(model: ir.Model, plan: PrecisionPlan, *, attention: bool = True) -> Placement:
    """Decides which tensors are quantized.

    Args:
        model: A graph with an id for every node, in topological order, with inferred types.
        plan: Which nodes are to run in int8 or fp8.
        attention: Also quantize MatMuls of two activations.

    Returns:
        The placement; empty but for `existing` where the model carries Q/DQ already.

    Raises:
        ConfigError: as `PrecisionPlan.resolve`; a user's rule that quantizes operators of which none can be quantized.
        CalibrationError: nodes without a name, or with one name for two.
    """
    existing = sum(node.op_type == "DequantizeLinear" for node in model.graph.all_nodes())
    if existing:
        return Placement(existing=existing)
    refs = node_refs(model)
    _check_ids([ref.id for ref in refs])
    assigned = plan.resolve(refs)
    _check_rules(assigned, {ref.id: ref.op for ref in refs})
    search = _Search(model, assigned, attention=attention)
    return search.run()


def _check_ids(ids: list[str]) -> None:
    double = [name or "(no name)" for name, count in Counter(ids).items() if count > 1 or not name]
    if double:
        raise CalibrationError(
            f"{len(double)} node names are missing or not unique: {', '.join(double[:5])}",
            why="plans and placements select nodes by name",
            fix="give the model ids first: trtforge.converter does so after export",
        )


def _check_rules(assigned: dict[str, Assignment], operators: dict[str, str]) -> None:
    by_rule: dict[str, set[str]] = {}
    for node, found in assigned.items():
        if found.rule is not None and found.precision in QUANTIZED and found.origin == "user":
            by_rule.setdefault(found.rule.describe(), set()).add(operators[node])
    for rule, found_operators in by_rule.items():
        if not found_operators & set(QUANTIZABLE):
            raise ConfigError(
                f"precision rule `{rule}` quantizes nothing",
                why=f"it selects {', '.join(sorted(found_operators))}; {', '.join(QUANTIZABLE)} can be quantized",
                fix="give those nodes a float precision, or select the layers around them",
            )


class _Search:
    """One walk over the main graph, collecting uses by (value, format)."""

    def __init__(self, model: ir.Model, assigned: dict[str, Assignment], *, attention: bool) -> None:
        self.graph = model.graph
        self.assigned = assigned
        self.attention = attention
        self.tensors: dict[tuple[ir.Value, QuantFormat], list[Use]] = {}
        self.weights: dict[tuple[ir.Value, QuantFormat, int | None], list[Use]] = {}
        self.skipped: list[Skipped] = []
        self.depth = _depths(model.graph)

    def run(self) -> Placement:
        for node in self.graph:
            if node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type in PRODUCTS and self._format(node) is not None:
                self._weighted(node)
            elif node.op_type == "Add":
                self._residual(node)
        self._nested()
        quantized = {_same_values_as(value) for value, _ in self.tensors}
        tensors = [
            QuantizedTensor(_name(value), _name(_measured(value, quantized)), format, tuple(uses))
            for (value, format), uses in self.tensors.items()
        ]
        weights = [
            QuantizedWeight(_name(value), format, axis, tuple(uses))
            for (value, format, axis), uses in self.weights.items()
        ]
        return Placement(tuple(tensors), tuple(weights), tuple(self.skipped))

    def _format(self, node: ir.Node) -> QuantFormat | None:
        found = self.assigned.get(node.name or "")
        return cast("QuantFormat", found.precision) if found is not None and found.precision in QUANTIZED else None

    def _weighted(self, node: ir.Node) -> None:
        reason = self._why_not(node)
        if reason:
            self.skipped.append(Skipped(node.name or "", reason))
            return
        format = self._format(node)
        assert format is not None
        for index, value in enumerate(node.inputs[:2]):
            assert value is not None
            use = Use(node.name or "", index)
            if is_constant(value):
                axis = channel_axis(node, index, len(constant_shape(value)))
                self.weights.setdefault((value, format, axis), []).append(use)
            else:
                self.tensors.setdefault((value, format), []).append(use)

    def _why_not(self, node: ir.Node) -> str:
        pair = node.inputs[:2]
        if any(value is None or value.dtype not in _FLOATS for value in pair):
            return f"its inputs are {', '.join(str(value.dtype) for value in pair if value is not None)}, not float"
        constant = [is_constant(value) for value in pair]
        if all(constant):
            return "both of its inputs are constants"
        if not any(constant) and node.op_type == "MatMul" and not self.attention:
            return "both of its inputs are activations, and attention is left out"
        if node.op_type != "MatMul" or not any(constant):
            return ""
        index = constant.index(True)
        weight = pair[index]
        assert weight is not None
        shape = constant_shape(weight)
        if len(shape) < 2:
            return "its weight is a vector"
        if shape[-2 if index == 1 else -1] == 1:
            # Rotary embeddings are such an outer product, of positions up to 100,000: nothing to gain, all to lose.
            return "it is an outer product: it sums over one element"
        return ""

    def _residual(self, node: ir.Node) -> None:
        format = self._format(node)
        main = self._main_branch(node, format) if format is not None else None
        if format is None or main is None:
            return
        skip = node.inputs[1 - main]
        assert skip is not None
        self.tensors.setdefault((skip, format), []).append(Use(node.name or "", 1 - main))

    def _main_branch(self, node: ir.Node, format: QuantFormat) -> int | None:
        """Which input of an Add comes from the convolution that the Add fuses into; None where it is no residual Add.

        Where both come from convolutions (a strided block), the longer path is the main one: ResNet's shortcut
        convolution is the last to be written and the first that could run.
        """
        left, right = node.inputs[0], node.inputs[1]
        if left is None or right is None or left is right or left.dtype not in _FLOATS:
            return None
        if is_constant(left) or is_constant(right) or not _same_shape(left, right):
            return None
        found = []
        for index, value in enumerate((left, right)):
            convolution = self._convolution_before(value, node)
            if convolution is not None and self._format(convolution) == format and not self._why_not(convolution):
                found.append(index)
        return max(found, key=lambda index: self._depth(node.inputs[index])) if found else None

    def _convolution_before(self, value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
        while value is not None and not value.is_graph_output():
            if [node for node, _ in value.uses()] != [reader]:
                return None
            node = value.producer()
            if node is None or node.op_type in _CONVOLUTIONS:
                return node
            bias = node.op_type == "Add" and any(is_constant(item) for item in node.inputs)
            if not bias and node.op_type not in _BEFORE_ADD:
                return None
            value = next((item for item in node.inputs if not is_constant(item)), None)
            reader = node
        return None

    def _depth(self, value: ir.Value | None) -> int:
        node = value.producer() if value is not None else None
        return self.depth.get(node, 0) if node is not None else 0

    def _nested(self) -> None:
        outer = set(self.graph)
        for node in self.graph.all_nodes():
            if node not in outer and node.op_type in PRODUCTS and self._format(node) is not None:
                self.skipped.append(Skipped(node.name or "", "it is inside the body of an If, Loop or Scan"))


def _depths(graph: ir.Graph) -> dict[ir.Node, int]:
    """Nodes on the longest path from an input to each node, itself included."""
    depth: dict[ir.Node, int] = {}
    for node in graph:
        depth[node] = 1 + max((depth.get(before, 0) for before in node.predecessors()), default=0)
    return depth


def _same_values_as(value: ir.Value) -> ir.Value:
    """The first value upstream that holds the same numbers in another order."""
    while (node := value.producer()) is not None and node.op_type in _SAME_VALUES:
        before = node.inputs[0]
        if before is None or is_constant(before):
            break
        value = before
    return value


def _measured(value: ir.Value, quantized: set[ir.Value]) -> ir.Value:
    """The value whose range `value` takes.

    Max pooling commutes with quantization as long as one scale serves both sides, so that what is pooled from a tensor
    that is quantized itself takes that one's range; otherwise the pooled tensor is measured, being the smaller. Concat
    shares nothing: its largest input would cost the others their resolution.
    """
    value = _same_values_as(value)
    while (node := value.producer()) is not None and node.op_type == "MaxPool" and value.index() == 0:
        assert node.inputs[0] is not None
        pooled = _same_values_as(node.inputs[0])
        if pooled not in quantized:
            break
        value = pooled
    return value


def _same_shape(left: ir.Value, right: ir.Value) -> bool:
    """Whether nothing known of the shapes says that one is broadcast to the other."""
    if left.shape is None or right.shape is None:
        return True
    if len(left.shape) != len(right.shape):
        return False
    pairs = zip(left.shape, right.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _name(value: ir.Value) -> str:
    assert value.name
    return value.name
