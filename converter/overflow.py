"""Finds what float16 cannot hold: measures the float graph and keeps the nodes concerned in fp32, with the value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from trtforge.converter.assign import Decision, assign, constant_tensor, largest_value
from trtforge.converter.dataflow import find_masks
from trtforge.converter.probes import Kind, Probe, measure
from trtforge.converter.types import infer_types
from trtforge.runtime.errors import ParityError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.runtime.runner import Tensors

__all__ = ["MARGIN", "overflow_rules"]

MARGIN = 2.0
"""A node stays in fp32 from 1/MARGIN of fp16's range on: real inputs reach farther than the samples do."""

_LIMIT = largest_value(ir.DataType.FLOAT16)
_SMALLEST_NORMAL = 2.0**-14

# Nothing comes out that is larger than what went in at these slots: their outputs need no probe of their own.
_BOUNDED_BY: dict[str, tuple[int, ...] | None] = {
    "Concat": None, "DepthToSpace": (0,), "Expand": (0,), "Flatten": (0,), "Gather": (0,), "GatherElements": (0,),
    "GatherND": (0,), "Identity": (0,), "MaxPool": (0,), "Pad": (0, 2), "Relu": (0,), "Reshape": (0,),
    "ScatterElements": (0, 2), "ScatterND": (0, 2), "Slice": (0,), "SpaceToDepth": (0,), "Split": (0,), "Squeeze": (0,),
    "Tile": (0,), "Transpose": (0,), "Unsqueeze": (0,), "Where": (1, 2),
}  # fmt: skip
# What comes out is at most 1.
_BOUNDED = frozenset({"Cos", "Erf", "HardSigmoid", "Sigmoid", "Sign", "Sin", "Softmax", "Softsign", "Tanh"})


@dataclass(frozen=True)
class _Check:
    """One thing that can overflow in a node: measured numbers, the size they imply, how large it may be, and a name.

    `floor` is how small it may be: 0 where that does not matter.
    """

    node: ir.Node
    probes: tuple[Probe, ...]
    size: Callable[[list[float]], float]
    what: str
    limit: float = _LIMIT
    floor: float = 0.0

    def judge(self, numbers: list[float], margin: float) -> str:
        """What is wrong with the measured numbers; "" where nothing is."""
        size = self.size(numbers)
        if size * margin > self.limit:
            return f"{self.what} reaches {size:.6g} on the samples, fp16 ends at {self.limit:.6g}"
        if 0 < size < self.floor:
            return f"{self.what} is at most {size:.6g} on the samples, fp16 loses digits below {self.floor:.3g}"
        return ""


def overflow_rules(
    model: OnnxModel | ir.Model, feeds: Iterable[Tensors], plan: PrecisionPlan, *, margin: float = MARGIN
) -> tuple[Rule, ...]:
    """Rules that keep in fp32 every fp16 node which would overflow, or come near it, on these samples.

    Looked at are each node's inputs and outputs, and what it forms inside: the squares of LayerNormalization,
    InstanceNormalization, GroupNormalization and RMSNormalization, the sums of ReduceL2, ReduceMean, LpNormalization,
    GlobalAveragePool and ReduceLogSumExp, the probabilities of LogSoftmax (which vanish), and a bound on the scores of
    Attention (the product of the largest row norms of Q and K). Very negative values that only mean "masked" don't
    count, nor do infinities: float16 has those. A node that computes with, or gives, a tensor without any element in
    fp16's normal range (from 2^-14 on) is kept in fp32 as well, unless it is a mere term of a sum. Weights beyond the
    range need no samples: `assign` keeps their nodes.

    Two samples of each shape are run, and where all inputs lead with one named dimension, a batch, no more rows than
    the smallest sample has: time goes into the spread of values and lengths, not into more of the same.

    Args:
        model: The float reference.
        feeds: Inputs by name, one mapping a sample.
        plan: The plan; nothing is measured where no node runs in fp16, or where its `overflow_guard` is off.
        margin: By how much real inputs may exceed the samples.

    Returns:
        One rule by id per node, in order of execution, origin "overflow", the measured value in its reason.

    Raises:
        ConfigError: as `PrecisionPlan.resolve`, or where a sample does not fit the graph's inputs.
    """
    if not plan.overflow_guard:
        return ()
    graph = load_graph(model.path) if isinstance(model, OnnxModel) else model.clone()
    infer_types(graph)
    decisions = assign(graph, plan, graph=model.hash if isinstance(model, OnnxModel) else None)
    masks = find_masks(graph)
    checks = [check for node, decision in decisions.items() for check in _checks(node, decision, masks)]
    samples = list(feeds)
    if not checks or not samples:
        return ()
    seen = _measure(graph, [probe for check in checks for probe in check.probes], samples)
    reasons: dict[ir.Node, str] = {}
    for check in checks:
        numbers = [seen[probe] for probe in check.probes if math.isfinite(seen.get(probe, math.inf))]
        if check.node in reasons or not numbers or (check.size is not max and len(numbers) < len(check.probes)):
            continue
        if reason := check.judge(numbers, margin):
            reasons[check.node] = reason
    return tuple(Rule("fp32", id=node.name or "", origin="overflow", reason=reason) for node, reason in reasons.items())


def _measure(graph: ir.Model, probes: list[Probe], samples: list[Tensors]) -> dict[Probe, float]:
    few = _few(_short(graph, samples))
    try:
        seen = measure(graph, probes, few)
    except ParityError:  # the leading dimension was no batch after all: its rows need each other
        few = _few(samples)
        seen = measure(graph, probes, few)
    infinite = [probe for probe, number in seen.items() if number == math.inf]
    if infinite:
        seen |= measure(graph, infinite, few, finite=True)
    return seen


def _short(graph: ir.Model, samples: list[Tensors]) -> list[Tensors]:
    """The samples cut to the smallest batch among them, where all inputs lead with one and the same named dimension."""
    leading = {str(value.shape[0]) for value in graph.graph.inputs if value.shape}
    named = all(value.shape and isinstance(value.shape[0], ir.SymbolicDim) for value in graph.graph.inputs)
    if len(leading) != 1 or not named or "None" in leading:
        return samples
    rows = min(len(array) for sample in samples for array in sample.values())
    return [{name: array[:rows] for name, array in sample.items()} for sample in samples]


def _few(samples: list[Tensors]) -> list[Tensors]:
    """The first and the last sample of each combination of shapes: ranges hardly change within one."""
    groups: dict[tuple[tuple[str, tuple[int, ...]], ...], list[Tensors]] = {}
    for sample in samples:
        key = tuple(sorted((name, array.shape) for name, array in sample.items()))
        groups.setdefault(key, []).append(sample)
    return [sample for group in groups.values() for sample in (group if len(group) < 3 else (group[0], group[-1]))]


def _checks(node: ir.Node, decision: Decision, masks: set[ir.Value]) -> Iterator[_Check]:
    if decision.dtype != ir.DataType.FLOAT16:
        return
    slots = [("input", node.inputs[slot]) for slot in sorted(decision.inputs)]
    if node.op_type not in _BOUNDED:
        # An optional result that is left out has no name (the first of an LSTM, often).
        slots += [("output", node.outputs[slot]) for slot in sorted(decision.outputs) if node.outputs[slot].name]
    for side, value in slots:
        probes = tuple(_magnitude(value, masks)) if value is not None else ()
        if value is not None and probes:
            # To a sum it does not matter that a term vanishes beside the others.
            users = [node] if side == "input" else [user for user, _ in value.uses()]
            added = bool(users) and all(user.op_type in ("Add", "Sub", "Sum") for user in users)
            floor = 0.0 if added or value in masks or node.op_type in _BOUNDED_BY else _SMALLEST_NORMAL
            yield _Check(node, probes, max, f"its {side} {value.name}", floor=floor)
    if node.domain == "":
        yield from _inside(node)


def _magnitude(value: ir.Value, masks: set[ir.Value]) -> Iterator[Probe]:
    """What bounds a tensor's elements; nothing for constants, whose size `assign` looks at."""
    kind: Kind = "max" if value in masks else "abs"
    stack, seen = [value], {value}
    while stack:
        value = stack.pop()
        producer = value.producer()
        if constant_tensor(value) is not None or (producer is not None and producer.op_type == "ConstantOfShape"):
            continue
        if producer is None or producer.domain or producer.op_type not in _BOUNDED_BY:
            yield Probe(value, kind)
            continue
        slots = _BOUNDED_BY[producer.op_type]
        for slot, source in enumerate(producer.inputs):
            if source is not None and source not in seen and (slots is None or slot in slots):
                seen.add(source)
                stack.append(source)


def _square(numbers: list[float]) -> float:
    return numbers[0] ** 2


def _exponential(numbers: list[float]) -> float:
    return math.exp(min(numbers[0], 700.0))


def _inside(node: ir.Node) -> Iterator[_Check]:
    """What the node forms between its inputs and its outputs, as TensorRT's parser takes it apart."""
    source = node.inputs[0] if node.inputs else None
    if source is None or constant_tensor(source) is not None:
        return
    rank = len(source.shape) if source.shape is not None else 0
    match node.op_type:
        case "LayerNormalization" if rank:
            first = _int(node, "axis", -1) % rank
            centred = Probe(source, "centred", tuple(range(first, rank)))
            yield _Check(node, (centred,), _square, "the square of its centred input")
        case "InstanceNormalization" if rank > 2:
            yield _Check(
                node, (Probe(source, "centred", tuple(range(2, rank))),), _square, "the square of its centred input"
            )
        case "GroupNormalization" | "RMSNormalization" | "LayerNormalization" | "InstanceNormalization":
            yield _Check(node, (Probe(source),), _square, "the square of its input")
        case "LpNormalization":
            yield _Check(node, (Probe(source, "norm"),), _square, "the sum of squares of its input")
        case "ReduceL2":
            yield _Check(node, (Probe(node.outputs[0]),), _square, "the sum of squares of its input")
        case "ReduceLogSumExp":
            yield _Check(node, (Probe(node.outputs[0]),), _exponential, "the sum of its exponentials, or one over it,")
        case "LogSoftmax":
            # A probability below fp16's smallest normal number loses its digits, then becomes 0 and its logarithm -inf.
            smallest = Probe(node.outputs[0])
            yield _Check(node, (smallest,), _exponential, "one over its smallest probability", 1 / _SMALLEST_NORMAL)
        case "GlobalAveragePool" if rank > 2:
            yield _Check(node, (Probe(source, "sum", tuple(range(2, rank))),), max, "the sum of its input")
        case "ReduceMean" if axes := _reduced_axes(node, rank):
            yield _Check(node, (Probe(source, "sum", axes),), max, "the sum of its input")
        case "Attention":
            yield from _scores(node)


def _scores(node: ir.Node) -> Iterator[_Check]:
    query, key = node.inputs[0], node.inputs[1]
    if query is None or key is None or constant_tensor(query) is not None or constant_tensor(key) is not None:
        return
    size = query.shape[-1] if query.shape is not None else 1
    heads = _int(node, "q_num_heads", 1)
    scale = (heads / size) ** 0.5 if isinstance(size, int) else 1.0
    if "scale" in node.attributes:
        scale = node.attributes["scale"].as_float()

    def bound(norms: list[float]) -> float:
        return norms[0] * norms[1] * scale

    yield _Check(node, (Probe(query, "norm"), Probe(key, "norm")), bound, "a bound on its scores")


def _reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    if "axes" in node.attributes:
        return tuple(node.attributes["axes"].as_ints())
    tensor = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    if tensor is not None:
        return tuple(int(axis) for axis in tensor.numpy().reshape(-1))
    return tuple(range(rank)) if len(node.inputs) < 2 or node.inputs[1] is None else ()


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
