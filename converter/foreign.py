"""ONNX models from elsewhere: checked, at a usable opset, with the user's dimension names, cleaned and with ids."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes.common import ShapeInferencePass

from trtforge.calibration.existing import fold_bias_codes
from trtforge.converter.branches import take_known_branches
from trtforge.converter.cleanup import clean
from trtforge.converter.foreign_inputs import complete_ranks, forget_unknown_sizes, match_inputs, specs_from_call
from trtforge.converter.identity import identify
from trtforge.converter.onnx_ml import ML_DOMAIN, rewrite_ml
from trtforge.converter.onnx_ml_outputs import plain_outputs
from trtforge.converter.unsupported import rewrite
from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import OnnxModel, all_graphs, save_graph
from trtforge.runtime.specs import InputSpec, Profile

__all__ = ["Imported", "external_files", "import_onnx"]

_LEAST_OPSET = 13
"""Explicit quantization per channel and axes as inputs begin here; older graphs are always converted."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A graph from elsewhere, made fit.

    Attributes:
        model: The cleaned graph.
        specs: One for each of its inputs.
        truth: The file that tells what the graph computes: as it came, or where that gives what is no tensor, a copy in
            the folder that gives tensors.
        notes: What the caller should know of the outputs.
    """

    model: OnnxModel
    specs: tuple[InputSpec, ...]
    truth: Path
    notes: tuple[str, ...] = ()


def import_onnx(
    path: Path,
    *,
    profiles: Sequence[Profile] = (),
    inputs: Sequence[InputSpec] = (),
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
    example: Any = None,
    opset: int | None,
    folder: Path,
    rewritten: Collection[str] = (),
) -> Imported:
    """Reads an ONNX file and writes it, fit for the rest of the chain, to `folder/reference.onnx`.

    Args:
        path: With external data beside it where it has some.
        profiles: Ranges of the dynamic dimensions.
        inputs: Names for the dimensions of inputs, by the inputs' names in the file. Inputs left out keep the names
            that the file gives their dimensions.
        shapes: In place of `inputs`, from Python: see `specs_from_call`; so `example`.
        example: One call's inputs.
        opset: Graphs below it are converted to it; None leaves those from 13 on as they are.
        folder: An existing folder.
        rewritten: Operators that are expressed through others.

    Raises:
        ExportError: the file is missing, corrupt, invalid or cannot be converted, or an axis has one size where a
            dynamic dimension was asked for.
        ConfigError: an input that the file lacks, another rank or dtype than it has, a rank or a dimension's name that
            neither side gives, or a dimension without a range.
    """
    proto = _load(path)
    forget_unknown_sizes(proto)
    inputs = (*inputs, *specs_from_call(proto, shapes or {}, example))
    _check(proto, path, inputs)
    truth, notes = path, plain_outputs(proto)
    if notes:
        truth = folder / ".truth.onnx"
        onnx.save(proto, truth)
    proto = _convert(_without_ml(proto), opset or _LEAST_OPSET)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    specs = match_inputs(model, inputs, profiles)
    clean(model)
    if take_known_branches(model):
        clean(model)
    fold_bias_codes(model)
    if any(node.op_type in rewritten for graph in all_graphs(model) for node in graph):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
        rewrite(model, rewritten)
        clean(model)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    identify(model)
    return Imported(save_graph(model, folder / "reference.onnx"), specs, truth, notes)


def _load(path: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise ExportError(f"there is no file {path}", fix="correct `source.onnx`") from None
    except (OSError, DecodeError) as error:
        raise ExportError(
            f"{path} cannot be read as an ONNX model: {error}",
            why="the file is damaged, incomplete (an interrupted download, a Git LFS pointer), or no ONNX",
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise ExportError(f"{path} holds no ONNX graph", why="the file is empty, incomplete, or no ONNX")
    _drop_repeated_opsets(proto)
    return proto


def _drop_repeated_opsets(proto: onnx.ModelProto) -> None:
    """skl2onnx imports one domain twice, and onnx's converter then raises the version of one entry only."""
    versions: dict[str, int] = {}
    for item in proto.opset_import:
        versions[item.domain] = max(item.version, versions.get(item.domain, 0))
    if len(versions) < len(proto.opset_import):
        del proto.opset_import[:]
        proto.opset_import.extend(onnx.helper.make_opsetid(*item) for item in versions.items())


def _check(proto: onnx.ModelProto, path: Path, inputs: Sequence[InputSpec]) -> None:
    _check_external_data(proto, path)
    completed = complete_ranks(proto, inputs)
    try:
        if completed:
            onnx.load_external_data_for_model(proto, str(path.parent))
        onnx.checker.check_model(proto if completed else path)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path} is not valid ONNX: {_first_line(error)}", fix="export it again") from error


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """A truncated file of weights is read by TensorRT-RTX 1.6 without a word."""
    for tensor in _tensors(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / where.get("location", "")
        if not file.is_file():
            raise ExportError(
                f"{path} keeps the weight {tensor.name!r} in {file}, which does not exist",
                fix="copy the data file to where the .onnx file is",
            )
        width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        needed = int(where.get("offset", 0)) + int(where.get("length", width * math.prod(tensor.dims)))
        if file.stat().st_size < needed:
            raise ExportError(
                f"{file} has {file.stat().st_size} bytes, the weight {tensor.name!r} ends at byte {needed}",
                why="the file is incomplete or belongs to another model",
                fix="copy it again",
            )


def external_files(proto: onnx.ModelProto, path: Path) -> list[Path]:
    """The files beside `path` in which the model keeps weights."""
    locations = {
        entry.value
        for tensor in _tensors(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / location for location in sorted(locations)]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for body in (attribute.g, *attribute.graphs):
                yield from _tensors(body)


def _without_ml(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Before any conversion, since what is written in their place is of the graph's own opset."""
    if all(item.domain != ML_DOMAIN for item in proto.opset_import):
        return proto
    model = ir.from_proto(proto)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    rewrite_ml(model)
    clean(model)
    return ir.to_proto(model)


def _convert(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """To an opset by onnx's own converter: exact in our trials, where onnxscript's is wrong without a word below 18."""
    current = next((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), 0)
    if current == 0 or current >= opset:
        return proto
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except RuntimeError as error:
        if current >= _LEAST_OPSET:
            return proto
        raise ExportError(
            f"the model's opset {current} cannot be converted to {opset}: {_first_line(error)}",
            why=f"below opset {_LEAST_OPSET} graphs are converted first",
            fix=f"export it again at opset {_LEAST_OPSET} or later",
        ) from error
    _copy_names(proto.graph, converted.graph)
    return converted


def _copy_names(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    """The converter drops the metadata of nodes, and before onnx 1.23 their names, but keeps the names of values."""
    makers = {value: node for node in old.node for value in node.output if value}
    for node in new.node:
        maker = next((makers[value] for value in node.output if value in makers), None)
        if maker is None:
            continue
        node.name = node.name or maker.name
        if not node.metadata_props:
            node.metadata_props.extend(maker.metadata_props)
        bodies = {attribute.name: attribute.g for attribute in maker.attribute}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and attribute.name in bodies:
                _copy_names(bodies[attribute.name], attribute.g)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
