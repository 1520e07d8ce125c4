"""A look at the ONNX file before TensorRT sees it: what its parser would swallow, and where nodes come from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import BuildError

__all__ = ["OnnxScan", "scan_onnx"]

# What trtforge.runtime.graph writes (META_LINE); importing it here would load onnx_ir before every build.
_META_LINE = "trtforge.line"


@dataclass(frozen=True, slots=True)
class OnnxScan:
    """What error messages want to know of a graph.

    Attributes:
        lines: The user's Python line of each node that has one, by node name.
        operators: Node names by operator type, subgraphs and functions included.
        suspects: Constructs that are known to crash some release natively.
    """

    lines: Mapping[str, str]
    operators: Mapping[str, tuple[str, ...]]
    suspects: tuple[str, ...]


def scan_onnx(path: Path) -> OnnxScan:
    """Reads the graph, without the external weights.

    Raises:
        BuildError: unreadable; float64 tensors; an input of unknown rank; external data that is missing or cut short.
    """
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise BuildError(
            f"cannot read {path}: {error.strerror}", fix="check the path, or export the model again"
        ) from error
    except Exception as error:  # protobuf's DecodeError moves between its modules
        raise BuildError(f"{path} is not an ONNX file: {error}", fix="export the model again") from error
    if not model.graph.output:
        raise BuildError(f"{path} is not an ONNX file: it holds no graph with outputs", fix="export the model again")
    nodes = list(_nodes(model))
    _check_inputs(model)
    _check_float64(model, nodes)
    _check_external_data(model, nodes, path.parent)
    operators: dict[str, list[str]] = {}
    lines = {}
    for node in nodes:
        operators.setdefault(node.op_type, []).append(node.name)
        for entry in node.metadata_props:
            if entry.key == _META_LINE:
                lines[node.name] = entry.value
    return OnnxScan(lines, {op: tuple(names) for op, names in operators.items()}, tuple(_suspects(nodes)))


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(model: Any) -> Iterator[Any]:
    for graph in _graphs(model.graph):
        yield from graph.node
    for function in model.functions:
        for graph in _graphs(function):
            yield from graph.node


def _check_inputs(model: Any) -> None:
    initialized = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in initialized:
            continue
        if not value.type.HasField("tensor_type"):
            raise BuildError(
                f"input {value.name!r} is no tensor but a {value.type.WhichOneof('value')}",
                fix="pass its tensors as inputs of their own",
            )
        if not value.type.tensor_type.HasField("shape"):
            raise BuildError(
                f"input {value.name!r} has no rank",
                why="TensorRT's parser takes it for a scalar without a word",
                fix="export it with a shape; dimensions may be symbolic",
            )


def _check_float64(model: Any, nodes: list[Any]) -> None:
    import onnx

    double = onnx.TensorProto.DOUBLE
    # A float64 constant that is only ever cast down is rounded either way.
    elsewhere = {name for node in nodes if node.op_type != "Cast" for name in node.input}
    elsewhere |= {value.name for graph in _graphs(model.graph) for value in graph.output}
    found = [f"input {v.name!r}" for v in model.graph.input if v.type.tensor_type.elem_type == double]
    found += [f"output {v.name!r}" for v in model.graph.output if v.type.tensor_type.elem_type == double]
    for graph in _graphs(model.graph):
        found += [
            f"weight {tensor.name!r}"
            for tensor in graph.initializer
            if tensor.data_type == double and tensor.name in elsewhere
        ]
    for node in nodes:
        made = any(a.name in ("to", "dtype") and a.i == double for a in node.attribute)
        constant = any(a.HasField("t") and a.t.data_type == double for a in node.attribute)
        if made or (constant and not elsewhere.isdisjoint(node.output)):
            found.append(f"node {node.name or node.op_type!r} ({node.op_type})")
    if found:
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise BuildError(
            f"the graph computes in float64: {shown}",
            why="TensorRT has no float64 and would compute in float32 without a word",
            fix="compute in float32: `.float()` on the tensors, dtype=torch.float32 where they are made",
        )


def _check_external_data(model: Any, nodes: list[Any], folder: Path) -> None:
    for tensor in _stored_tensors(model, nodes):
        if not tensor.external_data:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        path = folder / entry.get("location", "")
        have = -1
        with contextlib.suppress(OSError):
            have = path.stat().st_size
        need = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        # RTX 1.6 builds from a file that was cut short, with whatever stands in memory behind it.
        if have < need:
            raise BuildError(
                f"the weight {tensor.name!r} lies in {path}, which "
                + ("is missing" if have < 0 else f"has {have} bytes; {need} are needed"),
                fix="copy the ONNX file together with its data file, whole, or export the model again",
            )


def _stored_tensors(model: Any, nodes: list[Any]) -> Iterator[Any]:
    for graph in _graphs(model.graph):
        yield from graph.initializer
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _suspects(nodes: list[Any]) -> Iterator[str]:
    for node in nodes:
        # RTX 1.7 crashes in its compiler (SIGSEGV); 1.6 does not.
        if node.op_type == "Attention" and len(set(node.input[:3])) == 1:
            yield f"{node.name or 'an unnamed node'} (Attention): query, key and value are one tensor"
