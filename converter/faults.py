"""Faults that an exporter, a pass or a builder might make, planted in an ONNX graph: each a valid model that computes
something else. `trtforge audit` counts which of them a proof lets through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes  # noqa: F401  # gives numpy bfloat16
import numpy as np
import onnx_ir as ir

from trtforge.converter.graph_edits import FLOATS, GraphEditor, choose
from trtforge.converter.weight_faults import (
    corrupt_weight,
    double_scale,
    lose_bias,
    swap_channels,
    transpose_weight,
    wrong_weights,
)

__all__ = ["FAULTS", "Fault", "Scene"]

Random = np.random.Generator


@dataclass(frozen=True, slots=True)
class Scene:
    """What a fault needs to know beside the graph.

    Attributes:
        opts: The opt size of every named dimension.
        maxima: The max size.
        peaks: By tensor: the greatest value of each row of the held-out set, descending; what is rare follows from it.
    """

    opts: Mapping[str, int] = field(default_factory=dict)
    maxima: Mapping[str, int] = field(default_factory=dict)
    peaks: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)


Fault = Callable[[GraphEditor, Random, Scene], str | None]
"""Edits the graph and says what it did and where; None where this graph has no place for it."""


def drop_cast(edit: GraphEditor, random: Random, scene: Scene) -> str | None:
    """A Cast is left out; where the graph has none, a tensor is left in a narrower type."""
    casts = [node for node in edit.graph if node.op_type == "Cast" and node.inputs[0] is not None]
    if casts and random.random() < 0.5:
        node = choose(random, casts)
        name, source, out = node.name, node.inputs[0], node.outputs[0]
        if out.is_graph_output():
            out.type = source.type  # the output has another dtype then, as it would
        edit.bypass(node)
        return f"without {name}"
    values = edit.activations()
    if not values:
        return None
    value = choose(random, values)
    kind = choose(random, [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN])
    name, dtype = value.name, value.dtype

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        down = edit.node("Cast", [before], edit.value_like(before, dtype=kind), to=int(kind))
        return [down, edit.node("Cast", [down.outputs[0]], after, to=int(dtype))]

    edit.splice(value, build)
    return f"{name} left in {kind.name.lower()}"


def wrong_axis(edit: GraphEditor, random: Random, _: Scene) -> str | None:
    """An `axis` is another one, or two axes of one size change places."""
    choices: list[Callable[[], str]] = []
    for node in edit.graph:
        rank = _rank(node.inputs[0] if node.inputs else None)
        if rank >= 2 and "axis" in node.attributes and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            choices.append(partial(_move_axis, node, rank, random))
    for value in edit.activations():
        sizes = [(i, d) for i, d in enumerate(value.shape or ()) if isinstance(d, int) and d > 1]
        pairs = [(i, j) for n, (i, a) in enumerate(sizes) for j, b in sizes[n + 1 :] if a == b]
        if pairs:
            choices += [partial(_transpose, edit, value, pair) for pair in pairs]
    return choose(random, choices)() if choices else None


def _move_axis(node: ir.Node, rank: int, random: Random) -> str:
    old = node.attributes["axis"].as_int()
    new = choose(random, [axis for axis in range(rank) if axis != old % rank])
    node.attributes["axis"] = ir.AttrInt64("axis", new)
    return f"{node.name}: axis {old} -> {new}"


def _transpose(edit: GraphEditor, value: ir.Value, pair: tuple[int, int]) -> str:
    name, order = value.name, list(range(len(value.shape or ())))
    order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    edit.splice(value, lambda before, after: [edit.node("Transpose", [before], after, perm=order)])
    return f"{name} transposed by {order}"


def freeze_dimension(edit: GraphEditor, random: Random, scene: Scene) -> str | None:
    """A dynamic dimension keeps the size it was exported with: by a Reshape, or rows past it read the last one."""
    found = [
        (value, axis, str(dim.value))
        for value in [*edit.graph.inputs, *edit.activations()]
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, ir.SymbolicDim) and scene.maxima.get(str(dim.value), 0) > 1
        if value.dtype in FLOATS
    ]
    if not found:
        return None
    value, axis, dim = choose(random, found)
    name, opt, most = value.name, scene.opts[dim], scene.maxima[dim]
    if random.random() < 0.3:
        sizes = [d if isinstance(d, int) else -1 for d in value.shape]
        if sizes.count(-1) == 1:
            sizes[axis] = opt
            target = edit.constant(np.array(sizes, np.int64))
            edit.splice(value, lambda before, after: [edit.node("Reshape", [before, target], after)])
            return f"{name}: {dim} frozen at {opt}"
    size = choose(random, [opt, int(random.integers(1, most)), most - 1])
    last = edit.constant(np.array(max(size, 1) - 1, np.int64))

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        zero, one = edit.constant(np.array(0, np.int64)), edit.constant(np.array(1, np.int64))
        shape = edit.node("Shape", [before])
        count = edit.node("Gather", [shape.outputs[0], edit.constant(np.array(axis, np.int64))])
        rows = edit.node("Range", [zero, count.outputs[0], one])
        kept = edit.node("Min", [rows.outputs[0], last])
        return [shape, count, rows, kept, edit.node("Gather", [before, kept.outputs[0]], after, axis=axis)]

    edit.splice(value, build)
    return f"{name}: rows of {dim} past {max(size, 1)} read the last one"


def overflow_rarely(edit: GraphEditor, random: Random, scene: Scene) -> str | None:
    """A tensor passes through a range that rare inputs exceed, and becomes infinite there."""
    chosen = _rare_threshold(edit, random, scene)
    if chosen is None:
        return None
    value, limit, share = chosen
    name, dtype = value.name, value.dtype or ir.DataType.FLOAT
    # x / limit * FLT_MAX is infinite where x > limit, and what comes back is within two roundings elsewhere.
    factors = [np.float32(limit), np.finfo(np.float32).max]

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        narrow, most = (edit.constant(np.array(factor, np.float32)) for factor in factors)
        nodes = [edit.node("Cast", [before], edit.value_like(before, dtype=ir.DataType.FLOAT), to=1)]
        for op, factor in (("Div", narrow), ("Mul", most), ("Div", most), ("Mul", narrow)):
            nodes.append(edit.node(op, [nodes[-1].outputs[0], factor]))  # each reads the one before
        return [*nodes, edit.node("Cast", [nodes[-1].outputs[0]], after, to=int(dtype))]

    edit.splice(value, build)
    return f"{name} overflows above {limit:.4g} ({share:.2%} of held-out rows)"


def saturate_rarely(edit: GraphEditor, random: Random, scene: Scene) -> str | None:
    """A tensor is clipped at a limit that rare inputs exceed."""
    chosen = _rare_threshold(edit, random, scene)
    if chosen is None:
        return None
    value, limit, share = chosen
    name, kind = value.name, value.dtype.numpy()  # type: ignore[union-attr]
    most = edit.constant(np.array(limit, kind))
    edit.splice(value, lambda before, after: [edit.node("Min", [before, most], after)])
    return f"{name} is clipped at {limit:.4g} ({share:.2%} of held-out rows)"


def _rare_threshold(edit: GraphEditor, random: Random, scene: Scene) -> tuple[ir.Value, float, float] | None:
    found = [v for v in edit.activations() if v.name in scene.peaks and scene.peaks[str(v.name)][0] > 0]
    if not found:
        return None
    value = choose(random, found)
    peaks = scene.peaks[str(value.name)]
    share = math.exp(random.uniform(math.log(1e-3), math.log(5e-2)))
    rank = max(1, min(len(peaks) - 1, round(share * len(peaks))))
    limit = float(peaks[rank])
    return (value, limit, rank / len(peaks)) if limit > 0 else None


def lose_node(edit: GraphEditor, random: Random, _: Scene) -> str | None:
    """A node that keeps shape and type is left out: an activation, a residual Add, a normalisation."""
    found = [
        node
        for node in edit.graph
        if len(node.outputs) == 1 and node.inputs and node.inputs[0] is not None and _same_form(node)
    ]
    if not found:
        return None
    node = choose(random, found)
    name = node.name
    edit.bypass(node)
    return f"without {name}"


def wrong_attribute(edit: GraphEditor, random: Random, _: Scene) -> str | None:
    """Padding on the wrong side, MaxPool and AveragePool, another activation or reduction, a moved epsilon or alpha."""
    choices: list[Callable[[], str]] = []
    for node in edit.graph:
        pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else ()
        if any(pads):
            choices.append(partial(_shift_pads, node, list(pads)))
        swap = _TWINS.get(node.op_type)
        if swap and not node.domain and len(node.outputs) == 1:
            choices.append(partial(_swap_operator, node, choose(random, swap)))
        choices += [
            partial(_scale_attribute, node, name, random)
            for name in ("epsilon", "alpha")
            if name in node.attributes and node.attributes[name].type == ir.AttributeType.FLOAT
        ]
    return choose(random, choices)() if choices else None


_TWINS: Mapping[str, tuple[str, ...]] = {
    "Relu": ("LeakyRelu", "Elu", "Softplus"),
    "Sigmoid": ("HardSigmoid", "Tanh"),
    "Tanh": ("Sigmoid", "Softsign"),
    "Gelu": ("Relu",),
    "MaxPool": ("AveragePool",),
    "AveragePool": ("MaxPool",),
    "ReduceMean": ("ReduceSum", "ReduceMax"),
    "ReduceMax": ("ReduceMin",),
    "Add": ("Sub",),
    "Sub": ("Add",),
    "Mul": ("Div",),
    "Div": ("Mul",),
    "Floor": ("Round",),
    "Max": ("Min",),
    "Min": ("Max",),
}
_KEPT = {
    "AveragePool": ("auto_pad", "ceil_mode", "kernel_shape", "pads", "strides"),
    "MaxPool": ("auto_pad", "ceil_mode", "kernel_shape", "pads", "strides"),
    "ReduceSum": ("keepdims", "noop_with_empty_axes"),
    "ReduceMax": ("keepdims", "noop_with_empty_axes"),
    "ReduceMin": ("keepdims", "noop_with_empty_axes"),
}


def _swap_operator(node: ir.Node, op: str) -> str:
    old = node.op_type
    node.op_type = op
    for name in [name for name in node.attributes if name not in _KEPT.get(op, ())]:
        del node.attributes[name]
    return f"{node.name}: {old} -> {op}"


def _shift_pads(node: ir.Node, pads: list[int]) -> str:
    half = len(pads) // 2
    moved = [0] * half + [pads[i] + pads[half + i] for i in range(half)]
    node.attributes["pads"] = ir.AttrInt64s("pads", moved)
    return f"{node.name}: pads {pads} -> {moved}"


def _scale_attribute(node: ir.Node, name: str, random: Random) -> str:
    old = node.attributes[name].as_float()
    new = old * float(choose(random, [0.5, 2.0, 100.0]))
    node.attributes[name] = ir.AttrFloat32(name, new)
    return f"{node.name}: {name} {old:g} -> {new:g}"


def mix_batch(edit: GraphEditor, random: Random, scene: Scene) -> str | None:
    """Rows of a dynamic dimension come in another order, or one row is given twice."""
    found = [
        (value, axis)
        for value in edit.activations()
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, ir.SymbolicDim) and scene.maxima.get(str(dim.value), 0) > 1
    ]
    if not found:
        return None
    value, axis = choose(random, found)
    name = value.name
    offset = int(random.integers(1, 4))

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        zero, one = edit.constant(np.array(0, np.int64)), edit.constant(np.array(1, np.int64))
        shape = edit.node("Shape", [before])
        count = edit.node("Gather", [shape.outputs[0], edit.constant(np.array(axis, np.int64))])
        rows = edit.node("Range", [zero, count.outputs[0], one])
        moved = edit.node("Add", [rows.outputs[0], edit.constant(np.array(offset, np.int64))])
        turned = edit.node("Mod", [moved.outputs[0], count.outputs[0]])
        return [shape, count, rows, moved, turned, edit.node("Gather", [before, turned.outputs[0]], after, axis=axis)]

    edit.splice(value, build)
    return f"{name}: rows moved by {offset}"


def swap_operands(edit: GraphEditor, random: Random, _: Scene) -> str | None:
    """The operands of Sub, Div, Pow or a MatMul change places, or those of a Concat."""
    found = [
        node
        for node in edit.graph
        if node.op_type in ("Sub", "Div", "Pow", "MatMul", "Concat", "Where") and len(node.inputs) >= 2
    ]
    if not found:
        return None
    node = choose(random, found)
    a, b = node.inputs[-2:]
    last = len(node.inputs) - 1
    node.replace_input_with(last - 1, b)
    node.replace_input_with(last, a)
    return f"operands of {node.name}"


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _same_form(node: ir.Node) -> bool:
    source, out = node.inputs[0], node.outputs[0]
    assert source is not None
    known = source.shape is not None and out.shape is not None and source.dtype == out.dtype and out.dtype in FLOATS
    return known and str(source.shape) == str(out.shape) and node.op_type not in ("Identity", "Cast", "Dropout")


FAULTS: Mapping[str, Fault] = {
    "dropped cast": drop_cast,
    "swapped channels": swap_channels,
    "wrong axis": wrong_axis,
    "doubled scale": double_scale,
    "frozen dimension": freeze_dimension,
    "rare overflow": overflow_rarely,
    "rare saturation": saturate_rarely,
    "transposed weight": transpose_weight,
    "lost bias": lose_bias,
    "lost node": lose_node,
    "corrupt weight": corrupt_weight,
    "wrong attribute": wrong_attribute,
    "mixed batch": mix_batch,
    "swapped operands": swap_operands,
    "wrong weights": wrong_weights,
}
"""By the name that a table shows."""
