"""ONNX graphs on disk and in memory: reading, writing, node identity, and the hash that names a graph.

A node's id is its `name`, `<module path>/<OpType>#k`, unique across subgraphs; the identity pass of the converter sets
it and later passes never rename. What a later pass inserts has `META_ORIGIN` (the pass that made it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from trtforge.runtime.precision import NodeRef
from trtforge.runtime.specs import TensorSpec

__all__ = [
    "META_LINE",
    "META_MODULE",
    "META_ORIGIN",
    "OnnxModel",
    "all_graphs",
    "describe_model",
    "dtype_name",
    "fresh_name",
    "graph_hash",
    "load_graph",
    "node_module",
    "node_refs",
    "save_graph",
    "tensor_specs",
]

META_MODULE = "trtforge.module"
"""Dotted path of the module that a node came from."""
META_LINE = "trtforge.line"
"""`file.py:42` in the user's code, relative to where the export ran."""
META_ORIGIN = "trtforge.origin"
"""The pass that inserted a node ("precision", "quantize", …); absent on the model's own nodes."""

_SINGLE_FILE_LIMIT = 1_800_000_000  # protobuf refuses 2 GiB; names and shapes need some of it


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """An ONNX file and what the rest of the chain needs to know of it.

    Attributes:
        path: The `.onnx` file; past 1.8 GB its weights are in `<name>.onnx.data` beside it.
        hash: `graph_hash` of it.
        inputs: Graph inputs in order.
        outputs: Graph outputs in order.
        opset: Version of the default operator set.
    """

    path: Path
    hash: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int

    @property
    def files(self) -> tuple[Path, ...]:
        """The `.onnx` file, and its external data where there is some."""
        data = self.path.with_name(self.path.name + ".data")
        return (self.path, data) if data.exists() else (self.path,)


def load_graph(path: Path) -> ir.Model:
    """Reads a model; external weights stay on disk until they are used."""
    return ir.load(path)


def save_graph(model: ir.Model, path: Path) -> OnnxModel:
    """Writes a model (weights beside it, in `<name>.onnx.data`, past 1.8 GB) and describes it."""
    size: int = sum(
        int(value.const_value.nbytes)
        for graph in all_graphs(model)
        if isinstance(graph, ir.Graph)
        for value in graph.initializers.values()
        if value.const_value is not None
    )
    described = describe_model(model, path)  # before saving: writing over the file that holds the weights drops them
    if size > _SINGLE_FILE_LIMIT:
        ir.save(model, path, external_data=path.name + ".data")
    else:
        ir.external_data.load_to_model(model)
        ir.save(model, path)
    return described


def describe_model(model: ir.Model, path: Path) -> OnnxModel:
    """What the chain needs to know of `model`, which is stored at `path`."""
    return OnnxModel(
        path,
        graph_hash(model),
        tensor_specs(model.graph.inputs),
        tensor_specs(model.graph.outputs),
        model.graph.opset_imports.get("", 0),
    )


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, every If/Loop/Scan body in it, and local functions with theirs; outer before inner."""
    stack: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while stack:
        graph = stack.pop(0)
        yield graph
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPH:
                    stack.append(attribute.as_graph())
                elif isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.GRAPHS:
                    stack.extend(attribute.as_graphs())


def dtype_name(dtype: ir.DataType | None) -> str:
    """The dtype's name as `TensorSpec` has it ("float32", "bfloat16", …)."""
    if dtype is None:
        return "undefined"
    known = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64", ir.DataType.STRING: "string"}
    return known.get(dtype, dtype.name.lower())


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes; a dimension without a name or size is called "?"."""
    specs = []
    for value in values:
        shape = tuple(
            dim if isinstance(dim, int) else (str(dim.value) if dim.value is not None else "?")
            for dim in value.shape or ()
        )
        specs.append(TensorSpec(value.name or "", dtype_name(value.dtype), shape))
    return tuple(specs)


def fresh_name(base: str, taken: set[str]) -> str:
    """`base`, or `base_2`, `base_3`, …: a name that is not taken, and is from here on."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def node_module(node: ir.Node) -> str:
    """Dotted path of the module that a node came from; "" where it is not known."""
    return node.metadata_props.get(META_MODULE, "")


def node_refs(model: ir.Model) -> list[NodeRef]:
    """Every node of the model and its subgraphs as precision rules see it, without what passes inserted."""
    return [
        NodeRef(node.name or "", node.op_type, node_module(node))
        for graph in all_graphs(model)
        for node in graph
        if META_ORIGIN not in node.metadata_props
    ]


def graph_hash(model: ir.Model, *, weights: bool = True) -> str:
    """SHA-256 of operators, attributes, weights and edges; never of names or metadata, so a comment cannot change it.

    Input and output names, dtypes and dimensions do count: they are what callers see.

    Args:
        model: The graph.
        weights: False leaves out the values of floating tensors, not their dtypes and shapes: the graph's structure.
            Integer and boolean ones (axes, shapes) belong to it.
    """
    digest = hashlib.sha256()
    for domain, version in sorted(model.graph.opset_imports.items()):
        digest.update(f"opset {domain} {version}\n".encode())
    numbers: dict[ir.Value, int] = {}
    _hash_graph(model.graph, digest, numbers, main=True, weights=weights)
    for identifier, function in sorted(model.functions.items(), key=lambda item: str(item[0])):
        digest.update(f"function {identifier}\n".encode())
        _hash_graph(function, digest, numbers, main=False, weights=weights)
    return digest.hexdigest()


def _hash_graph(
    graph: ir.Graph | ir.Function, digest: hashlib._Hash, numbers: dict[ir.Value, int], *, main: bool, weights: bool
) -> None:
    def number(value: ir.Value | None) -> int:
        if value is None:
            return -1
        if value not in numbers:
            numbers[value] = len(numbers)
            if value.const_value is not None and value.is_initializer():
                _hash_tensor(value.const_value, digest, weights=weights)
        return numbers[value]

    for value in graph.inputs:
        name = f" {value.name}" if main else ""
        digest.update(f"in{name} {value.dtype} {value.shape} {number(value)}\n".encode())
    for node in graph:
        digest.update(f"{node.domain}:{node.op_type}({','.join(str(number(v)) for v in node.inputs)})".encode())
        digest.update(f"->{','.join(str(number(v)) for v in node.outputs)}\n".encode())
        for name, attribute in sorted(node.attributes.items()):
            digest.update(f"@{name}".encode())
            _hash_attribute(attribute, digest, numbers, weights=weights)
    for value in graph.outputs:
        name = f" {value.name}" if main else ""
        digest.update(f"out{name} {value.dtype} {value.shape} {number(value)}\n".encode())


def _hash_attribute(attribute: ir.Attr, digest: hashlib._Hash, numbers: dict[ir.Value, int], *, weights: bool) -> None:
    if attribute.is_ref():
        digest.update(f"ref {attribute.ref_attr_name}\n".encode())
    elif attribute.type == ir.AttributeType.GRAPH:
        _hash_graph(attribute.as_graph(), digest, numbers, main=False, weights=weights)
    elif attribute.type == ir.AttributeType.GRAPHS:
        for graph in attribute.as_graphs():
            _hash_graph(graph, digest, numbers, main=False, weights=weights)
    elif attribute.type == ir.AttributeType.TENSOR:
        _hash_tensor(attribute.as_tensor(), digest, weights=weights)
    elif attribute.type == ir.AttributeType.TENSORS:
        for tensor in attribute.as_tensors():
            _hash_tensor(tensor, digest, weights=weights)
    else:
        digest.update(f"={attribute.type} {_stored(attribute)!r}\n".encode())


def _stored(attribute: ir.Attr) -> object:
    """The value as a file holds it: a float attribute is a double in memory until it has been saved and read."""
    if attribute.type == ir.AttributeType.FLOAT:
        return float(np.float32(attribute.as_float()))
    if attribute.type == ir.AttributeType.FLOATS:
        return tuple(float(np.float32(value)) for value in attribute.as_floats())
    return attribute.value


def _hash_tensor(tensor: ir.TensorProtocol, digest: hashlib._Hash, *, weights: bool) -> None:
    digest.update(f"tensor {tensor.dtype} {tensor.shape}\n".encode())
    if not weights and tensor.dtype.is_floating_point():
        return
    if tensor.dtype == ir.DataType.STRING:
        digest.update(repr(tensor.numpy().tolist()).encode())
    else:
        digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
