"""Element types of a graph by the operators' schemas: what an operator takes, what it gives, and where a graph errs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import onnx
import onnx.defs
import onnx_ir as ir

from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import META_LINE

__all__ = [
    "NodeTypes",
    "attribute_type",
    "body_graphs",
    "check_types",
    "infer_types",
    "node_types",
    "type_text",
]

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class NodeTypes:
    """The type variables of one node's slots, as its operator's schema names them.

    Attributes:
        inputs: For each input slot the variable ("T"), or a fixed type ("tensor(float)"). Slots of a heterogeneous
            variadic input (Loop's carried values) get a variable each ("V@2").
        outputs: The same for outputs.
        allowed: Types that each variable may be, as ONNX writes them.
        since: The operator set version that brought this form of the operator.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: Mapping[str, frozenset[str]]
    since: int

    def takes(self, variable: str, dtype: ir.DataType) -> bool:
        """Whether a slot with this variable may have this element type."""
        return type_text(dtype) in self.allowed[variable]


def type_text(dtype: ir.DataType) -> str:
    """`tensor(float16)` and its like, as schemas write types."""
    return f"tensor({dtype.name.lower()})"


def node_types(node: ir.Node, opsets: Mapping[str, int]) -> NodeTypes | None:
    """The node's type variables at the graph's operator sets; None where onnx knows no such operator."""
    return _node_types(node.domain, node.op_type, opsets.get(node.domain, 0), len(node.inputs), len(node.outputs))


@lru_cache(maxsize=4096)
def _node_types(domain: str, op: str, version: int, inputs: int, outputs: int) -> NodeTypes | None:
    if not onnx.defs.has(op, version, domain):  # a version of 0 is never known
        return None
    schema = onnx.defs.get_schema(op, version, domain)
    constraints = {item.type_param_str: frozenset(item.allowed_type_strs) for item in schema.type_constraints}
    allowed: dict[str, frozenset[str]] = {}

    def variables(formal: list[onnx.defs.OpSchema.FormalParameter], count: int) -> tuple[str, ...]:
        out = []
        for index in range(min(count, len(formal)) if not _variadic(formal) else count):
            parameter = formal[min(index, len(formal) - 1)]
            kind = parameter.type_str
            types = constraints.get(kind, frozenset({kind}))
            name = kind if parameter.is_homogeneous else f"{kind}@{index}"
            allowed[name] = types
            out.append(name)
        return tuple(out)

    return NodeTypes(
        variables(list(schema.inputs), inputs),
        variables(list(schema.outputs), outputs),
        allowed,
        schema.since_version,
    )


def _variadic(formal: list[onnx.defs.OpSchema.FormalParameter]) -> bool:
    return bool(formal) and formal[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic


def body_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs inside a node (If, Loop, Scan), in the order of its attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def attribute_type(node: ir.Node) -> ir.DataType | None:
    """The element type of output 0 where an attribute decides it (Cast, Constant, …); None where none does."""
    name = _TYPE_ATTRIBUTES.get(node.op_type) if node.domain == "" else None
    if name is None:
        return None
    if name in node.attributes:
        attribute = node.attributes[name]
        if attribute.type == ir.AttributeType.TENSOR:
            return attribute.as_tensor().dtype
        return ir.DataType(attribute.as_int()) if attribute.as_int() else None
    if node.op_type == "Constant":
        return next((kind for key, kind in _CONSTANTS.items() if key in node.attributes), None)
    return ir.DataType.FLOAT if node.op_type in _FLOAT_UNLESS_SAID else None


_TYPE_ATTRIBUTES = {
    "Cast": "to", "Constant": "value", "ConstantOfShape": "value", "RandomNormal": "dtype", "RandomUniform": "dtype",
    "RandomNormalLike": "dtype", "RandomUniformLike": "dtype", "Bernoulli": "dtype", "EyeLike": "dtype",
    "Multinomial": "dtype", "QuantizeLinear": "output_dtype", "DequantizeLinear": "output_dtype",
    "BlackmanWindow": "output_datatype", "HannWindow": "output_datatype", "HammingWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
}  # fmt: skip
_FLOAT_UNLESS_SAID = frozenset(
    {"ConstantOfShape", "RandomNormal", "RandomUniform", "BlackmanWindow", "HannWindow", "HammingWindow"}
) | {"MelWeightMatrix"}
_CONSTANTS = {
    "value_float": ir.DataType.FLOAT, "value_floats": ir.DataType.FLOAT, "value_int": ir.DataType.INT64,
    "value_ints": ir.DataType.INT64, "value_string": ir.DataType.STRING, "value_strings": ir.DataType.STRING,
    "sparse_value": ir.DataType.FLOAT,
}  # fmt: skip
_SAME_AS_INPUT = frozenset({"RandomNormalLike", "RandomUniformLike", "Bernoulli", "EyeLike"})


def infer_types(model: ir.Model) -> None:
    """Gives every value whose element type is missing the one that its operator produces, in bodies too.

    Types that are annotated stay; `check_types` tells where they are wrong.
    """
    _Walk(model, fill=True).graph(model.graph)


def check_types(model: ir.Model, *, strict: bool = True) -> None:
    """Finds mixed float/half edges and every other type error before TensorRT's parser sees them.

    Args:
        model: Any graph; local functions and operators that onnx does not know are passed over.
        strict: Run onnx's checker and strict shape inference as well.

    Raises:
        ExportError: with node id, operator and types of each place that is wrong (the first eight of them).
    """
    walk = _Walk(model, fill=False)
    walk.graph(model.graph)
    if walk.problems:
        shown = "\n".join(f"  {problem}" for problem in walk.problems[:_SHOWN])
        more = len(walk.problems) - _SHOWN
        raise ExportError(
            f"{len(walk.problems)} node(s) have inconsistent types:\n{shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            why="TensorRT's strongly typed networks convert nothing by themselves",
            fix="put a Cast there; where a precision plan made it, that is trtforge's mistake: please report it",
        )
    if strict:
        _check_onnx(model)


def _check_onnx(model: ir.Model) -> None:
    from onnx_ir.passes.common import CheckerPass

    try:
        # On a copy: while onnx looks, large initializers stand among the inputs, and come back in another order.
        CheckerPass(full_check=True)(model.clone())
    except Exception as error:  # onnx raises its own kinds and RuntimeError, onnx_ir wraps them all
        deepest: BaseException = error
        while deepest.__cause__ is not None:
            deepest = deepest.__cause__
        raise ExportError("onnx's checker refuses the graph", why=str(deepest)) from error


class _Walk:
    """One pass over a model in order of execution, from known input types to computed output types."""

    def __init__(self, model: ir.Model, *, fill: bool) -> None:
        self.opsets = model.graph.opset_imports
        self.fill = fill
        self.problems: list[str] = []

    def graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if value.dtype is None:
                value.type = ir.TensorType(tensor.dtype)
            elif value.dtype != tensor.dtype:
                self.problems.append(f"initializer {value.name!r} is {tensor.dtype.name}, declared {value.dtype.name}")
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        types = node_types(node, self.opsets)
        bound = self._bind(node, types) if types else {}
        if self.fill and node.op_type == "Loop" and node.domain == "":
            _fill_loop_inputs(node)
        for body in body_graphs(node):
            self.graph(body)
        expected = self._outputs(node, types, bound)
        for index, value in enumerate(node.outputs):
            self._output(node, types, index, value, expected.get(index))

    def _bind(self, node: ir.Node, types: NodeTypes) -> dict[str, ir.DataType]:
        bound: dict[str, ir.DataType] = {}
        for variable, value in zip(types.inputs, node.inputs, strict=False):
            if value is None or not _is_tensor(value) or value.dtype is None:
                continue
            first = bound.setdefault(variable, value.dtype)
            if first != value.dtype:
                self._say(node, f"inputs of one type {variable.partition('@')[0]}: {_input_types(node)}")
                break
            if not types.takes(variable, value.dtype):
                self._say(node, f"input {value.name!r} is {value.dtype.name}, which it does not take here")
                break
        return bound

    def _outputs(
        self, node: ir.Node, types: NodeTypes | None, bound: Mapping[str, ir.DataType]
    ) -> dict[int, ir.DataType]:
        if node.domain == "" and node.op_type in _BODY_OUTPUTS:
            return self._body_outputs(node)
        if types is None:
            return {}
        expected = {}
        for index, variable in enumerate(types.outputs[: len(node.outputs)]):
            only = _ONLY.get(types.allowed[variable])
            dtype = bound.get(variable, only)
            if dtype is not None:
                expected[index] = dtype
        first = _first_output_type(node)
        if first is not None:
            expected[0] = first
        if node.op_type == "LayerNormalization":
            expected.update(dict.fromkeys(range(1, len(node.outputs)), ir.DataType(_int(node, "stash_type", 1))))
        return expected

    def _body_outputs(self, node: ir.Node) -> dict[int, ir.DataType]:
        expected: dict[int, ir.DataType] = {}
        for body in body_graphs(node):
            results = body.outputs[1:] if node.op_type == "Loop" else body.outputs
            for index, result in enumerate(results):
                if result.dtype is None or not _is_tensor(result):
                    continue
                first = expected.setdefault(index, result.dtype)
                if first != result.dtype:
                    self._say(node, f"branches give output {index} as {first.name} and {result.dtype.name}")
            if node.op_type != "If":
                self._carried(node, body)
        return expected

    def _carried(self, node: ir.Node, body: ir.Graph) -> None:
        """A body's inputs against what the node feeds them, and a carried value's input against its output."""
        skipped_outputs = 1 if node.op_type == "Loop" else 0
        states = len(node.inputs) - (2 if node.op_type == "Loop" else _int(node, "num_scan_inputs", 0))
        fed = list(node.inputs)[2:] if node.op_type == "Loop" else list(node.inputs)
        taken = body.inputs[2:] if node.op_type == "Loop" else body.inputs
        for index, (outer, inner) in enumerate(zip(fed, taken, strict=False)):
            given = [outer, inner]
            if index < states and index + skipped_outputs < len(body.outputs):
                given.append(body.outputs[index + skipped_outputs])
            kinds = [value.dtype.name for value in given if value is not None and value.dtype and _is_tensor(value)]
            if len(set(kinds)) > 1:
                self._say(node, f"carried value {index} ({inner.name!r}) is {', then '.join(kinds)}")

    def _output(
        self, node: ir.Node, types: NodeTypes | None, index: int, value: ir.Value, expected: ir.DataType | None
    ) -> None:
        if not _is_tensor(value):
            return
        if value.dtype is None:
            if self.fill and expected is not None:
                value.type = ir.TensorType(expected)
            return
        if self.fill:
            return
        if expected is not None and expected != value.dtype:
            self._say(node, f"gives {expected.name} at output {value.name!r}, declared {value.dtype.name}")
        elif types and index < len(types.outputs) and not types.takes(types.outputs[index], value.dtype):
            self._say(node, f"output {value.name!r} is {value.dtype.name}, which it does not give")

    def _say(self, node: ir.Node, what: str) -> None:
        line = node.metadata_props.get(META_LINE)
        problem = f"{node.name} ({node.op_type}{f', {line}' if line else ''}): {what}"
        if not self.fill and problem not in self.problems:
            self.problems.append(problem)


_ONLY = {frozenset({type_text(dtype)}): dtype for dtype in ir.DataType}
_BODY_OUTPUTS = frozenset({"If", "Loop", "Scan"})


def _first_output_type(node: ir.Node) -> ir.DataType | None:
    """Type of output 0 where the schema's variables do not tell it."""
    if node.domain:
        return None
    said = attribute_type(node)
    if said is not None:
        return said
    inputs = [value.dtype if value is not None else None for value in node.inputs]
    if node.op_type == "QuantizeLinear":
        return inputs[2] if len(inputs) > 2 and inputs[2] is not None else ir.DataType.UINT8
    if node.op_type == "DequantizeLinear":
        return inputs[1]
    return inputs[0] if node.op_type in _SAME_AS_INPUT else None


def _fill_loop_inputs(node: ir.Node) -> None:
    for body in body_graphs(node):
        for outer, inner in zip(list(node.inputs)[2:], body.inputs[2:], strict=False):
            if inner.dtype is None and outer is not None and outer.dtype is not None and _is_tensor(outer):
                inner.type = ir.TensorType(outer.dtype)


def _is_tensor(value: ir.Value) -> bool:
    return value.type is None or isinstance(value.type, ir.TensorType)


def _input_types(node: ir.Node) -> str:
    kinds = (
        f"{value.name} {value.dtype.name if value.dtype else 'unknown'}" for value in node.inputs if value is not None
    )
    return ", ".join(kinds)


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
