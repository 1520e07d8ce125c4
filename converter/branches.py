"""`If` nodes whose condition follows from sizes that are known: the branch that is taken stands in their place.

Exporters write one for each Python `if` on a shape (`squeeze` of an axis that may be 1), and where an input's sizes are
given they are decided. The branch that is never taken may not fit these sizes, and TensorRT-RTX 1.7 fails on
conditions over shapes ("mScopedOp2Scopes.contains(childScopedOp)").

Ensures: equal results. A graph without `If`, or with none that is decided, stays as it is.
"""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from trtforge.converter.assign import constant_tensor
from trtforge.converter.types import body_graphs
from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import OnnxModel, all_graphs, fresh_name, load_graph
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array

__all__ = ["check_branches", "take_known_branches"]

_UNKNOWN = np.iinfo(np.int64).min
"""Stands for a size that is not known, in an array of sizes."""

_LARGEST = 1024
# These move sizes about: some of them may be unknown.
_MOVING = frozenset({"Concat", "Gather", "Identity", "Slice", "Squeeze", "Unsqueeze"})
_COMPUTING = frozenset({
    "Abs", "Add", "And", "Cast", "ConstantOfShape", "Div", "Equal", "Expand", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
    "ReduceSum", "Reshape", "Sub", "Tile", "Transpose", "Where",
})  # fmt: skip


def take_known_branches(model: ir.Model) -> bool:
    """Replaces what is decided, in place; whether there was any.

    Whole numbers that are known become constants on the way, since further shapes follow from them.
    """
    decided = model.clone()
    before = _count(decided)
    while _count(decided):
        _infer_anew(decided)
        if not any(_Folding(decided, graph).fold() for graph in list(all_graphs(decided))):
            break
    if _count(decided) == before:
        return False
    model.graph = decided.graph  # the functions were inlined before
    return True


def check_branches(model: OnnxModel) -> None:
    """Refuses an `If` that is left and has a branch which cannot be computed at the sizes that the inputs have.

    onnxruntime and TensorRT infer the shapes of both branches, the one never taken too; onnx itself says nothing.

    Raises:
        ExportError: with the node and what is wrong in its branch; or onnxruntime cannot load the graph at all.
    """
    if not _count(load_graph(model.path)):
        return
    try:
        OnnxRuntimeRunner(model.path, disable_quant_qdq=True)
    except ExportError as error:
        nodes = re.findall(r"Node \((.+?)\) Op \(If\)", error.why)
        if not nodes:
            raise
        raise ExportError(
            f"with these sizes a branch of the If {nodes[0]!r} cannot be computed",
            why=error.why.rpartition("Graph attribute inferencing failed: ")[2]
            + "; its condition is not decided by sizes, and onnxruntime and TensorRT want both branches to be right",
            fix="export the network that you need alone (an input may choose between networks that take other lengths, "
            "as of 16 and 8 kHz), or leave the axis dynamic that the branches differ in",
        ) from error


def _infer_anew(model: ir.Model) -> None:
    """With nothing of what was said before: where two branches have different shapes, none holds behind them."""
    ends = set(model.graph.outputs)
    for graph in all_graphs(model):
        for value in (value for node in graph for value in node.outputs if value not in ends):
            value.shape = None
    ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _count(model: ir.Model) -> int:
    return sum(node.op_type == "If" and not node.domain for graph in all_graphs(model) for node in graph)


class _Folding:
    """One pass over the nodes of one graph, in topological order."""

    def __init__(self, model: ir.Model, graph: ir.Graph | ir.Function) -> None:
        self.model = model
        self.graph = graph
        self.known: dict[ir.Value, Array] = {}
        self.names = {str(value.name) for part in all_graphs(model) for node in part for value in node.outputs}
        self.names |= set(model.graph.initializers)

    def fold(self) -> bool:
        changed = False
        for node in list(self.graph):
            if node.domain not in ("", "ai.onnx") or node.graph is not self.graph:
                continue
            if node.op_type == "If":
                condition = self._value(node.inputs[0])
                if condition is not None and (condition != _UNKNOWN).all():
                    _take(node, bool(condition.reshape(-1)[0]))
                    return True
            elif (array := self._result(node)) is not None:
                self.known[node.outputs[0]] = array
                if (array != _UNKNOWN).all():
                    changed |= self._make_constant(node.outputs[0], array)
        return changed

    def _value(self, value: ir.Value | None) -> Array | None:
        if value is None or value in self.known:
            return None if value is None else self.known[value]
        tensor = constant_tensor(value)
        if tensor is None or tensor.size > _LARGEST or tensor.dtype not in (ir.DataType.INT64, ir.DataType.BOOL):
            return None
        return tensor.numpy()

    def _result(self, node: ir.Node) -> Array | None:
        if node.op_type in ("Shape", "Size"):
            return _sizes(node)
        if len(node.outputs) != 1 or node.op_type not in _MOVING | _COMPUTING or not node.inputs:
            return None
        arrays = [self._value(value) for value in node.inputs]
        given = {value: array for value, array in zip(node.inputs, arrays, strict=True) if value is not None}
        if any(array is None for array in given.values()):
            return None
        movable = len(arrays) if node.op_type == "Concat" else 1 if node.op_type in _MOVING else 0
        if any(array is not None and (array == _UNKNOWN).any() for array in arrays[movable:]):
            return None
        return self._evaluate(node, {str(value.name): array for value, array in given.items() if array is not None})

    def _evaluate(self, node: ir.Node, feeds: dict[str, Array]) -> Array | None:
        proto = ir.to_proto(node)
        graph = onnx.helper.make_graph(
            [proto],
            "one",
            [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
             for name, array in feeds.items()],
            [onnx.helper.make_empty_tensor_value_info(proto.output[0])],
        )  # fmt: skip
        opset = onnx.helper.make_opsetid("", self.model.graph.opset_imports[""])
        model = onnx.helper.make_model(graph, opset_imports=[opset])
        result = np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, feeds)[0])  # type: ignore[index]
        return result if result.size <= _LARGEST and result.dtype in (np.int64, np.bool_) else None

    def _make_constant(self, value: ir.Value, array: Array) -> bool:
        if value.is_graph_output() or not value.uses():
            return False
        tensor = ir.tensor(np.array(array, order="C"))
        name = fresh_name(f"{value.name}_known", self.names)
        constant = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.model.graph.register_initializer(constant)
        value.replace_all_uses_with(constant)
        return True


def _sizes(node: ir.Node) -> Array | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = np.array([size if isinstance(size, int) else _UNKNOWN for size in value.shape], np.int64)
    if node.op_type == "Size":
        return None if (sizes == _UNKNOWN).any() else np.array(sizes.prod(), np.int64)
    ends = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
    return sizes[slice(*ends)]


def _take(node: ir.Node, condition: bool) -> None:
    graph = node.graph
    assert graph is not None
    branch = node.attributes["then_branch" if condition else "else_branch"].as_graph()
    results, inner = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(inner)
    graph.insert_before(node, inner)
    for old, result in zip(node.outputs, results, strict=True):
        if old.is_graph_output():
            result.name, result.shape = old.name, old.shape
        old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    _let_go(node.attributes["else_branch" if condition else "then_branch"].as_graph())


def _let_go(graph: ir.Graph) -> None:
    """Nodes that are gone would count as users of what they read outside."""
    for node in graph:
        for slot in range(len(node.inputs)):
            node.replace_input_with(slot, None)
        for body in body_graphs(node):
            _let_go(body)
