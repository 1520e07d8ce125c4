"""What scikit-learn graphs give that no tensor is: maps of class to probability, and labels that are text.

The change is made before anything else, and the changed graph is then the truth that all is proved against: its
operators are still those of `ai.onnx.ml`, run by onnxruntime's own kernels.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from trtforge.converter.onnx_ml import ML_DOMAIN
from trtforge.runtime.errors import ExportError

__all__ = ["plain_outputs"]

_SHOWN = 8


def plain_outputs(proto: onnx.ModelProto) -> tuple[str, ...]:
    """Gives maps as the tensor that they were made from, and text labels as positions in the list of classes, in place.

    Returns:
        What was changed, for the user; nothing where nothing was.

    Raises:
        ExportError: an output is text or no tensor for another reason.
    """
    notes = [*_drop_maps(proto.graph), *_number_labels(proto.graph)]
    for value in proto.graph.output:
        if not value.type.HasField("tensor_type"):
            raise ExportError(
                f"output {value.name!r} is no tensor but a {value.type.WhichOneof('value')}",
                why="an engine gives tensors alone",
                fix="with skl2onnx `options={'zipmap': False}`, else return its tensors one by one",
            )
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            raise ExportError(
                f"output {value.name!r} is text", fix="return a number, and look the text up after the engine"
            )
    return tuple(notes)


def _drop_maps(graph: onnx.GraphProto) -> list[str]:
    outputs = {value.name: value for value in graph.output}
    notes = []
    for node in graph.node:
        if node.domain != ML_DOMAIN or node.op_type != "ZipMap":
            continue
        classes = next((list(a.strings or a.ints) for a in node.attribute if a.name.startswith("classlabels")), [])
        node.domain, node.op_type = "", "Cast"  # skl2onnx leaves float64 scores float64; a map holds float32
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("to", onnx.TensorProto.FLOAT))
        if (value := outputs.get(node.output[0])) is not None:
            size = len(classes) or None
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, [None, size]))
            notes.append(f"output {value.name!r} is a tensor, with a column for each of {_shown(classes)}, and no map")
    return notes


def _number_labels(graph: onnx.GraphProto) -> list[str]:
    positions = _number_classifiers(graph) | _number_tables(graph)
    for node in graph.node:  # in topological order
        if node.op_type in ("Identity", "Reshape") and node.input[0] in positions:
            positions[node.output[0]] = positions[node.input[0]]
    for value in (*graph.value_info, *graph.output):
        if value.name in positions:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT64
    return [
        f"output {value.name!r} is the position of the label in {_shown(positions[value.name])}"
        for value in graph.output
        if value.name in positions
    ]


def _number_classifiers(graph: onnx.GraphProto) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for node in graph.node:
        if node.domain != ML_DOMAIN or node.op_type != "LinearClassifier":
            continue
        for attribute in node.attribute:
            if attribute.name == "classlabels_strings" and attribute.strings:
                found[node.output[0]] = list(attribute.strings)
                numbers = range(len(attribute.strings))
                attribute.CopyFrom(onnx.helper.make_attribute("classlabels_ints", numbers))
    return found


def _number_tables(graph: onnx.GraphProto) -> dict[str, list[object]]:
    """Labels picked from a list of text by ArrayFeatureExtractor."""
    found: dict[str, list[object]] = {}
    for tensor in graph.initializer:
        users = [node for node in graph.node if tensor.name in node.input]
        picked = all(node.op_type == "ArrayFeatureExtractor" and node.input[0] == tensor.name for node in users)
        if tensor.data_type != onnx.TensorProto.STRING or not picked:
            continue
        labels = list(tensor.string_data)
        numbers = np.arange(len(labels), dtype=np.int64).reshape(tuple(tensor.dims))
        tensor.CopyFrom(numpy_helper.from_array(numbers, tensor.name))
        found |= {node.output[0]: labels for node in users}
    return found


def _shown(classes: list[object]) -> str:
    texts = [item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in classes]
    more = f", … ({len(texts)})" if len(texts) > _SHOWN else ""
    return "[" + ", ".join(texts[:_SHOWN]) + more + "]"
