"""float16 and bfloat16 emulated in float32, so that onnxruntime's CPU kernels show what half precision does to a model.

Running the half-precision graph itself on onnxruntime's CPU provider proves nothing about its precision: the provider
lacks most fp16 kernels, wraps float32 ones in Cast nodes and then drops those between two nodes and the model's own
beside them, whatever the optimization level (70000 cast to fp16, through an fp16 Abs, came out as 70000): it is a run
in float32. It has no bfloat16 Conv, MatMul or Gemm at all, and its fp16 kernels have crashed. Pairs of Casts between
float32 nodes it does respect.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes  # noqa: F401 - gives numpy the cast from bfloat16
import numpy as np
import onnx_ir as ir

from trtforge.runtime.graph import META_ORIGIN, all_graphs, fresh_name

__all__ = ["emulate", "needs_emulation"]

_LOW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

# What moves or selects elements gives values that are already rounded.
_EXACT = frozenset({
    "Abs", "Clip", "Compress", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "Dropout", "Expand",
    "Flatten", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "Identity", "If", "Loop", "Max", "MaxPool",
    "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape", "ReverseSequence", "Scan", "Sign", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip

# Attributes that name an element type: of the output, or of what is computed inside.
_TYPE_ATTRIBUTES = (
    "to", "dtype", "output_dtype", "output_datatype", "precision", "softmax_precision", "stash_type",
)  # fmt: skip


def needs_emulation(model: ir.Model) -> bool:
    """Whether any tensor of the graph is float16 or bfloat16."""
    return any(_low_type(value) for graph in _graphs(model) for value in _values(graph))


def emulate(model: ir.Model) -> ir.Model:
    """The same model computed in float32, with every float16 and bfloat16 tensor rounded to its type after each node.

    A node computes and accumulates in float32 and its results are rounded once, to nearest even; what is too large
    becomes infinite, what is too small denormal or zero. That is how tensor cores work, while fused kernels round less
    often (between fused nodes) or more often (inside Softmax, LSTM and Attention). Graph inputs and outputs keep their
    names and types; every rounded tensor keeps its name.

    Args:
        model: Any graph whose element types are known; it is not changed.
    """
    copy = model.clone()
    low = {value: dtype for graph in _graphs(copy) for value in _values(graph) if (dtype := _low_type(value))}
    rounder = _Rounder({value.name or "" for graph in _graphs(copy) for value in _values(graph)})
    output_types = [low.get(value) for value in copy.graph.outputs]
    for graph in list(_graphs(copy)):
        for value in [*graph.initializers.values(), *graph.inputs]:
            if value in low and not (graph is copy.graph and value.is_graph_input()):
                value.type = ir.TensorType(ir.DataType.FLOAT)
                value.const_value = value.const_value and _wide(value.const_value)
        for node in list(graph):
            _widen_attributes(node)
            for value in node.outputs:
                if value in low:
                    value.type = ir.TensorType(ir.DataType.FLOAT)
                    if node.domain or node.op_type not in _EXACT:
                        rounder.round(value, node, low[value])
    rounder.widen_inputs(copy.graph)
    rounder.narrow_outputs(copy.graph, output_types)
    return copy


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    return (graph for graph in all_graphs(model) if isinstance(graph, ir.Graph))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _low_type(value: ir.Value) -> ir.DataType | None:
    """The half type of a tensor; None where it is of another type, or no tensor."""
    if value.dtype is None and value.const_value is not None:  # an initializer need not be annotated
        return value.const_value.dtype if value.const_value.dtype in _LOW else None
    return value.dtype if value.dtype in _LOW and isinstance(value.type, ir.TensorType) else None


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_attributes(node: ir.Node) -> None:
    """Makes the types that the node names itself float32: its Cast target, its constant, what it computes in."""
    if node.domain:
        return
    attributes = node.attributes
    if node.op_type in ("Constant", "ConstantOfShape") and "value" in attributes:
        tensor = attributes["value"].as_tensor()
        if tensor.dtype in _LOW:
            attributes["value"] = ir.AttrTensor("value", _wide(tensor))
    for name in _TYPE_ATTRIBUTES:
        if name in attributes and attributes[name].as_int() in _LOW:
            attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))


class _Rounder:
    """Inserts Cast nodes under names that the graph does not have yet."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def round(self, value: ir.Value, node: ir.Node, dtype: ir.DataType) -> None:
        """Puts casts to `dtype` and back behind `value`; the rounded tensor takes its name."""
        assert node.graph is not None
        rounded = _float_like(value, value.name)
        value.name = fresh_name(f"{value.name}_unrounded", self.names)
        value.replace_all_uses_with(rounded, replace_graph_outputs=True)
        down = self._cast(value, dtype)
        node.graph.insert_after(node, [down, self._cast(down.outputs[0], ir.DataType.FLOAT, rounded)])

    def widen_inputs(self, graph: ir.Graph) -> None:
        """Puts a cast to float32 behind each half input of the main graph."""
        casts = []
        for value in graph.inputs:
            uses = list(value.uses())
            if _low_type(value) and uses:
                casts.append(self._cast(value, ir.DataType.FLOAT))
                for user, index in uses:
                    user.replace_input_with(index, casts[-1].outputs[0])
        if casts and len(graph):
            graph.insert_before(graph[0], casts)
        else:
            graph.extend(casts)

    def narrow_outputs(self, graph: ir.Graph, dtypes: list[ir.DataType | None]) -> None:
        """Casts outputs of the main graph to the types that they had, under the names that they had."""
        for index, (value, dtype) in enumerate(zip(list(graph.outputs), dtypes, strict=True)):
            if dtype is not None and value.dtype != dtype:
                cast = self._cast(value, dtype)
                value.name, cast.outputs[0].name = cast.outputs[0].name, value.name
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]

    def _cast(self, value: ir.Value, dtype: ir.DataType, out: ir.Value | None = None) -> ir.Node:
        name = fresh_name(f"{value.name}_{dtype.name.lower()}", self.names)
        out = out or ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        metadata = {META_ORIGIN: "emulate"}
        return ir.node("Cast", [value], {"to": int(dtype)}, outputs=[out], name=f"{name}/Cast", metadata_props=metadata)


def _float_like(value: ir.Value, name: str | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
