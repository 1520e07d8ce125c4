"""Carries out a precision plan on a float graph: Cast nodes where precision changes, weights converted, types right."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from trtforge.converter.assign import FLOAT_TYPES, NATURAL, Decision, assign, constant_tensor, largest_value
from trtforge.converter.types import body_graphs, infer_types, node_types
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.graph import META_LINE, META_MODULE, META_ORIGIN, all_graphs, fresh_name
from trtforge.runtime.precision import PrecisionPlan

__all__ = ["ORIGIN", "apply_plan"]

ORIGIN = "precision"
"""What nodes inserted here carry in `META_ORIGIN`."""

_SHORT = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def apply_plan(
    model: ir.Model, plan: PrecisionPlan, *, graph: str | None = None, no_half: Collection[str] = ()
) -> list[Decision]:
    """Makes every node run in its precision, in place.

    Only float32 tensors change: integers, float64 and what the model itself holds in float16 or bfloat16 stay. A node
    that the plan quantizes runs in `plan.float_default` here; calibration inserts the rest. Weights are converted once
    per type and keep their name where every use is of one type; activations are cast once per type, right after
    their producer. Applying the same plan again changes nothing.

    Args:
        model: The reference graph, with node ids.
        plan: Where `keep_io`, graph inputs and outputs keep float32 and casts stand inside; otherwise they take
            `plan.float_default`.
        graph: Hash of the reference graph, checked where the plan selects by id.
        no_half: As `assign` takes it.

    Returns:
        The decision for every node that has float32 tensors, in order of execution, outer graphs first.

    Raises:
        ConfigError: as `PrecisionPlan.resolve`; where inputs and outputs would be bfloat16 below opset 13.
    """
    infer_types(model)
    opset = model.graph.opset_imports.get("", 0)
    if not plan.keep_io and plan.float_default == "bf16" and opset < 13:
        raise ConfigError(
            f"inputs and outputs cannot be bfloat16 at opset {opset}",
            why="ONNX's Cast takes bfloat16 from opset 13 on",
            fix="export at a higher opset, or leave out `keep_io: false`",
        )
    decisions = assign(model, plan, graph=graph, no_half=no_half)
    if any(decision.dtype != ir.DataType.FLOAT for decision in decisions.values()) or not plan.keep_io:
        caster = _Caster(model, decisions)
        if not plan.keep_io:
            for value in model.graph.inputs:
                if value in caster.floats:
                    value.type = ir.TensorType(FLOAT_TYPES[plan.float_default])
        caster.rewire(model.graph)
        caster.finish_io(model.graph, None if plan.keep_io else FLOAT_TYPES[plan.float_default])
        caster.fold_constants()
    return list(decisions.values())


class _Caster:
    """The rewiring of one model; holds what must be shared over the whole of it: casts and converted constants."""

    def __init__(self, model: ir.Model, decisions: dict[ir.Node, Decision]) -> None:
        self.decisions = decisions
        self.opsets = model.graph.opset_imports
        self.floats: set[ir.Value] = set()  # what was float32 before the first change
        self.names: set[str] = set()
        self.cast_values: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.copies: dict[ir.Value, dict[tuple[ir.DataType, float], ir.Value]] = {}
        for graph in all_graphs(model):
            if isinstance(graph, ir.Graph):
                self._survey(graph)

    def _survey(self, graph: ir.Graph) -> None:
        self._note([*graph.inputs, *graph.initializers.values()])
        for node in graph:
            self.names.add(node.name or "")
            self._note(node.outputs)

    def _note(self, values: Iterable[ir.Value]) -> None:
        for value in values:
            self.names.add(value.name or "")
            if value.dtype == ir.DataType.FLOAT and isinstance(value.type, ir.TensorType):
                self.floats.add(value)

    def rewire(self, graph: ir.Graph) -> None:
        for node in list(graph):
            decision = self.decisions.get(node)
            self._inputs(node, decision)
            if node.domain == "" and node.op_type in ("If", "Loop", "Scan"):
                self._control_flow(node, decision)
            if decision is not None:
                for index in decision.outputs:
                    _retype_output(node, index, decision.dtype)

    def _inputs(self, node: ir.Node, decision: Decision | None) -> None:
        natural = NATURAL.get(node.op_type, frozenset()) if node.domain == "" else frozenset()
        for index, value in enumerate(node.inputs):
            if value is None or value not in self.floats or value.dtype is None:
                continue
            if decision is not None and index in decision.inputs:
                wanted = decision.dtype
            elif index in natural or META_ORIGIN in node.metadata_props:
                types = node_types(node, self.opsets)
                takes = types is None or types.takes(types.inputs[index], value.dtype)
                wanted = value.dtype if takes else ir.DataType.FLOAT
            else:
                wanted = ir.DataType.FLOAT
            if decision is not None and index in decision.clamps:
                node.replace_input_with(index, self._copy(value, wanted, largest_value(decision.clamp_type)))
            elif wanted != value.dtype:
                node.replace_input_with(index, self.as_type(value, wanted))

    def _control_flow(self, node: ir.Node, decision: Decision | None) -> None:
        low = decision.dtype if decision is not None else ir.DataType.FLOAT
        # Loop: inputs are (trip count, condition, carried…), body inputs (iteration, condition, carried…), body
        # outputs (condition, carried…, scanned…). Scan: states and scanned values on both sides. If: outputs only.
        first_input = 2 if node.op_type == "Loop" else 0
        first_result = 1 if node.op_type == "Loop" else 0
        for body in body_graphs(node):
            for value in body.inputs[first_input:]:
                if value in self.floats:
                    value.type = ir.TensorType(low)
            self.rewire(body)
            for index, outer in enumerate(node.outputs):
                place = index + first_result
                result = body.outputs[place]
                if outer in self.floats and result.dtype != low:
                    body.outputs[place] = self.as_type(result, low)

    def finish_io(self, graph: ir.Graph, io_type: ir.DataType | None) -> None:
        """Gives graph outputs float32 (or `io_type`) under their own names; the inner tensor is renamed instead."""
        for index, value in enumerate(graph.outputs):
            wanted = io_type or ir.DataType.FLOAT
            if value not in self.floats or value.dtype is None or value.dtype == wanted:
                continue
            name = value.name or ""
            replacement = self._cast(value, wanted)
            value.name, replacement.name = fresh_name(f"{name}_{_SHORT[value.dtype]}", self.names), name
            graph.outputs[index] = replacement

    def as_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in another element type: a converted constant, the source of an exact upcast, or a shared Cast."""
        if constant_tensor(value) is not None:
            return self._copy(value, dtype)
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast" and value.dtype == ir.DataType.FLOAT:
            source = producer.inputs[0]
            if source is not None and source.dtype == dtype:  # up to float32 and back is exact
                return source
        return self._cast(value, dtype)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) in self.cast_values:
            return self.cast_values[value, dtype]
        producer = value.producer()
        metadata = {META_ORIGIN: ORIGIN}
        if producer is not None:
            metadata |= {key: producer.metadata_props[key] for key in (META_MODULE, META_LINE)
                         if key in producer.metadata_props}  # fmt: skip
        name = fresh_name(f"{value.name}_{_SHORT[dtype]}", self.names)
        out = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        node = ir.node(
            "Cast",
            [value],
            {"to": int(dtype)},
            outputs=[out],
            name=fresh_name(f"{value.name}/Cast_{_SHORT[dtype]}", self.names),
            metadata_props=metadata,
        )
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        else:
            owner = value.graph
            assert owner is not None
            if len(owner):
                owner.insert_before(owner[0], node)
            else:
                owner.append(node)
        self.cast_values[value, dtype] = out
        return out

    def _copy(self, value: ir.Value, dtype: ir.DataType, clamp: float = np.inf) -> ir.Value:
        """The constant `value` in another type, and finite elements within ±`clamp`."""
        copies = self.copies.setdefault(value, {})
        if (dtype, clamp) not in copies:
            tensor = constant_tensor(value)
            assert tensor is not None
            name = fresh_name(f"{value.name}_{_SHORT[dtype]}", self.names)
            converted = _convert(tensor, dtype, name, clamp)
            copy = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(converted.numpy().shape), const_value=converted
            )
            copy.metadata_props.update(value.metadata_props)
            producer = value.producer()
            if producer is None:
                assert value.graph is not None
                value.graph.register_initializer(copy)
            else:
                metadata = {**producer.metadata_props, META_ORIGIN: ORIGIN}
                node = ir.node(
                    "Constant",
                    [],
                    {"value": converted},
                    outputs=[copy],
                    name=fresh_name(f"{producer.name}_{_SHORT[dtype]}", self.names),
                    metadata_props=metadata,
                )
                assert producer.graph is not None
                producer.graph.insert_after(producer, node)
            copies[dtype, clamp] = copy
        return copies[dtype, clamp]

    def fold_constants(self) -> None:
        """A constant that is used in one converted type only keeps its place and name; unused originals go."""
        for value, copies in self.copies.items():
            if value.uses() or value.is_graph_output():
                continue
            producer = value.producer()
            if len(copies) > 1:
                if producer is None and value.graph is not None:
                    del value.graph.initializers[value.name or ""]
                continue
            (((dtype, _), copy),) = copies.items()
            tensor = copy.const_value
            assert tensor is not None
            value.type = ir.TensorType(dtype)
            copy.replace_all_uses_with(value, replace_graph_outputs=True)
            if producer is None:
                assert copy.graph is not None
                del copy.graph.initializers[copy.name or ""]
                value.const_value = ir.tensor(tensor.numpy(), dtype=dtype, name=value.name)
            else:
                _set_constant(producer, tensor)
                made = copy.producer()
                assert made is not None
                assert made.graph is not None
                made.graph.remove(made, safe=True)


def _convert(
    tensor: ir.TensorProtocol, dtype: ir.DataType, name: str | None, clamp: float = np.inf
) -> ir.TensorProtocol:
    array = tensor.numpy()
    if clamp != np.inf:
        array = np.where(np.isfinite(array), np.clip(array, -clamp, clamp), array).astype(array.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # what may overflow was decided in `assign`
        return ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)


def _set_constant(node: ir.Node, tensor: ir.TensorProtocol) -> None:
    for key in ("value", "value_float", "value_floats"):
        node.attributes.pop(key, None)
    node.attributes["value"] = ir.AttrTensor("value", tensor)


def _retype_output(node: ir.Node, index: int, dtype: ir.DataType) -> None:
    # A type object of its own, here as elsewhere: `Value.dtype = …` would change every value that shares the object, as
    # values of a clone do with the original's.
    node.outputs[index].type = ir.TensorType(dtype)
    if index or node.domain:
        return
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    elif node.op_type == "ConstantOfShape":
        value = (
            node.attributes["value"].as_tensor() if "value" in node.attributes else ir.tensor(np.zeros(1, np.float32))
        )
        # What lies beyond the range is a mask here; anything else `assign` has left in float32.
        node.attributes["value"] = ir.AttrTensor("value", _convert(value, dtype, value.name, largest_value(dtype)))
    elif node.op_type in _DTYPE_ATTRIBUTE:
        node.attributes["dtype"] = ir.AttrInt64("dtype", int(dtype))


_DTYPE_ATTRIBUTE = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike"}
)
