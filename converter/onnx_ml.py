"""Operators of scikit-learn graphs (domain `ai.onnx.ml`), expressed through those of ONNX itself, in the graph.

Requires: default opset 9 or later, types inferred where they can be; no maps and no text (see `onnx_ml_outputs`).
Ensures: the results that onnxruntime's kernels of these operators have, which differ from the text of the standard in
places: L1 sums absolute values, a row of zeros stays one, a regression of one target is never transformed. A graph that
holds an operator with no such form is refused with all of them in one list.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from trtforge.converter.node_writer import NodeWriter, int_attribute, string_attribute
from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import all_graphs
from trtforge.runtime.runner import Array

__all__ = ["ML_DOMAIN", "rewrite_ml"]

ML_DOMAIN = "ai.onnx.ml"

_LEAST_OPSET = 9
_SHOWN = 12

Values = tuple[ir.Value, ...]


def rewrite_ml(model: ir.Model) -> None:
    """Rewrites every node of the domain, in place.

    Raises:
        ExportError: nodes that cannot be rewritten, with what to do about each kind; an opset below 9.
    """
    opset = model.graph.opset_imports.setdefault("", _LEAST_OPSET)
    nodes = [node for graph in all_graphs(model) for node in graph if node.domain == ML_DOMAIN]
    if nodes and opset < _LEAST_OPSET:
        raise ExportError(
            f"operators of {ML_DOMAIN} in a graph of opset {opset}", fix="export it with `target_opset` 13 or later"
        )
    refused = [node for node in nodes if not _rewrite(node, opset)]
    if refused:
        raise _refusal(refused)


def _rewrite(node: ir.Node, opset: int) -> bool:
    writer = NodeWriter(node, opset)
    results = _REWRITTEN[node.op_type](writer, node) if node.op_type in _REWRITTEN else None
    if results is not None:
        writer.replace(*results)
    return results is not None


def _scaler(writer: NodeWriter, node: ir.Node) -> Values:
    value, offset, scale = _as_float(writer, node.inputs[0]), _floats(node, "offset"), _floats(node, "scale")
    value = value if offset is None else writer.add("Sub", value, offset)
    return (writer.add("Mul", value, np.ones(1, np.float32) if scale is None else scale),)


def _normalizer(writer: NodeWriter, node: ir.Node) -> Values | None:
    value = _as_float(writer, node.inputs[0])
    norm = string_attribute(node, "norm", "MAX")
    axis = _rank(node) - 1
    if norm == "MAX":
        size = writer.reduce("ReduceMax", value, axis, keep=True)
    elif norm == "L1":
        size = writer.reduce("ReduceSum", writer.add("Abs", value), axis, keep=True)
    elif norm == "L2":
        size = writer.add("Sqrt", writer.reduce("ReduceSum", writer.add("Mul", value, value), axis, keep=True))
    else:
        return None
    # Where the size is 0 it becomes 1.
    zero = writer.add("Not", writer.add("Cast", size, to=ir.DataType.BOOL.value))
    return (writer.add("Div", value, writer.add("Add", size, _cast_float(writer, zero))),)


def _linear_regressor(writer: NodeWriter, node: ir.Node) -> Values | None:
    scores = _scores(writer, node, int_attribute(node, "targets", 1))
    if scores is None or int_attribute(node, "targets", 1) == 1:
        plain = string_attribute(node, "post_transform", "NONE") != "PROBIT"
        return (scores,) if scores is not None and plain else None
    result = _transformed(writer, node, scores)
    return None if result is None else (result,)


def _linear_classifier(writer: NodeWriter, node: ir.Node) -> Values | None:
    intercepts = _floats(node, "intercepts")
    scores = None if intercepts is None else _scores(writer, node, len(intercepts))
    if intercepts is None or scores is None:
        return None
    labels = _ints(node, "classlabels_ints")
    if len(intercepts) > 1:
        if labels is None or len(labels) != len(intercepts):
            return None
        chosen, result = writer.add("ArgMax", scores, axis=1, keepdims=0), _transformed(writer, node, scores)
    else:
        positive = writer.add("Greater", scores, np.array([0], np.float32))
        flat = writer.add("Reshape", positive, np.array([-1]))
        chosen, result = writer.add("Cast", flat, to=ir.DataType.INT64.value), _two_scores(writer, node, scores, labels)
    if result is None:
        return None
    if labels is None or np.array_equal(labels, np.arange(len(labels))):
        return chosen, result
    return writer.add("Gather", labels, chosen, axis=0), result


def _two_scores(writer: NodeWriter, node: ir.Node, score: ir.Value, labels: Array | None) -> ir.Value | None:
    transform = string_attribute(node, "post_transform", "NONE")
    if transform == "PROBIT" or (labels is not None and len(labels) != 2):
        return None
    if labels is None:
        return score  # onnxruntime transforms one score only where it stands for two classes
    score = writer.add("Sigmoid", score) if transform == "LOGISTIC" else score
    return writer.add("Concat", writer.add("Sub", np.array([1], np.float32), score), score, axis=1)


def _scores(writer: NodeWriter, node: ir.Node, targets: int) -> ir.Value | None:
    coefficients, intercepts = _floats(node, "coefficients"), _floats(node, "intercepts")
    if coefficients is None or len(coefficients) % targets or _rank(node) != 2:
        return None
    weights = np.ascontiguousarray(coefficients.reshape(targets, -1).T)
    product = writer.add("MatMul", _as_float(writer, node.inputs[0]), weights)
    return product if intercepts is None else writer.add("Add", product, intercepts)


def _transformed(writer: NodeWriter, node: ir.Node, scores: ir.Value) -> ir.Value | None:
    transform = string_attribute(node, "post_transform", "NONE")
    if transform == "SOFTMAX":
        return writer.add("Softmax", scores, axis=1)
    if transform == "LOGISTIC":
        return writer.add("Sigmoid", scores)
    return scores if transform == "NONE" else None


def _array_feature_extractor(writer: NodeWriter, node: ir.Node) -> Values:
    value, index = node.inputs[0], writer.add("Reshape", node.inputs[1], np.array([-1]))
    if _rank(node) == 1:
        value = writer.add("Reshape", value, np.array([1, -1]))
        return (writer.add("Gather", value, index, axis=1),)
    return (writer.add("Gather", value, index, axis=_rank(node) - 1),)


def _binarizer(writer: NodeWriter, node: ir.Node) -> Values:
    threshold = node.attributes["threshold"].as_float() if "threshold" in node.attributes else 0.0
    above = writer.add("Greater", _as_float(writer, node.inputs[0]), np.array([threshold], np.float32))
    return (_cast_float(writer, above),)


def _imputer(writer: NodeWriter, node: ir.Node) -> Values | None:
    imputed = _floats(node, "imputed_value_floats")
    if imputed is None:
        return None
    replaced = node.attributes["replaced_value_float"].as_float() if "replaced_value_float" in node.attributes else 0.0
    value = _as_float(writer, node.inputs[0])
    if np.isnan(replaced):
        missing = writer.add("IsNaN", value)
    else:
        # Equal takes floats from opset 11 on.
        difference = writer.add("Sub", value, np.array([replaced], np.float32))
        missing = writer.add("Not", writer.add("Cast", difference, to=ir.DataType.BOOL.value))
    return (writer.add("Where", missing, imputed, value),)


def _label_encoder(writer: NodeWriter, node: ir.Node) -> Values | None:
    keys = _ints(node, "keys_int64s")
    values, default = _ints(node, "values_int64s"), np.array(int_attribute(node, "default_int64", -1))
    if values is None and (floats := _floats(node, "values_floats")) is not None:
        attribute = node.attributes.get("default_float")
        values, default = floats, np.array(0.0 if attribute is None else attribute.as_float(), np.float32)
    if keys is None or values is None:
        return None
    hits = _cast_float(writer, writer.add("Equal", _with_axis(writer, node), keys))
    found = writer.add("Gather", values, writer.add("ArgMax", hits, axis=_rank(node), keepdims=0), axis=0)
    known = writer.add("Cast", writer.reduce("ReduceMax", hits, _rank(node)), to=ir.DataType.BOOL.value)
    return (writer.add("Where", known, found, default),)


def _one_hot_encoder(writer: NodeWriter, node: ir.Node) -> Values | None:
    categories = _ints(node, "cats_int64s")
    if categories is None or not int_attribute(node, "zeros", 1):
        return None
    return (_cast_float(writer, writer.add("Equal", _with_axis(writer, node), categories)),)


def _feature_vectorizer(writer: NodeWriter, node: ir.Node) -> Values:
    return (writer.add("Concat", *(_as_float(writer, value) for value in node.inputs), axis=1),)


_REWRITTEN: dict[str, Callable[[NodeWriter, ir.Node], Values | None]] = {
    "ArrayFeatureExtractor": _array_feature_extractor,
    "Binarizer": _binarizer,
    "FeatureVectorizer": _feature_vectorizer,
    "Imputer": _imputer,
    "LabelEncoder": _label_encoder,
    "LinearClassifier": _linear_classifier,
    "LinearRegressor": _linear_regressor,
    "Normalizer": _normalizer,
    "OneHotEncoder": _one_hot_encoder,
    "Scaler": _scaler,
}

_TREES = (
    "trees are no work for TensorRT: serve them with onnxruntime or Triton's FIL backend, or let hummingbird-ml turn "
    "the estimator into a PyTorch module and convert that"
)
_KERNELS = (
    "a support vector machine with a kernel: hummingbird-ml turns it into a PyTorch module; a linear one (LinearSVC, "
    "LinearSVR) converts as it is"
)
_TEXT = "text and dictionaries are no tensors: encode them before the model, and export the estimator that follows"

_ADVICE = {
    "TreeEnsemble": _TREES,
    "TreeEnsembleClassifier": _TREES,
    "TreeEnsembleRegressor": _TREES,
    "SVMClassifier": _KERNELS,
    "SVMRegressor": _KERNELS,
    "CategoryMapper": _TEXT,
    "DictVectorizer": _TEXT,
    "LabelEncoder": _TEXT,
    "OneHotEncoder": _TEXT,
    "ZipMap": "export with `options={'zipmap': False}`",
}


def _refusal(nodes: list[ir.Node]) -> ExportError:
    kinds: dict[str, list[ir.Node]] = {}
    for node in nodes:
        kinds.setdefault(node.op_type, []).append(node)
    lines = [
        f"{kind} ({', '.join(str(node.name or 'unnamed') for node in found[:_SHOWN])}"
        + (f" and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ")")
        for kind, found in sorted(kinds.items())
    ]
    advice = dict.fromkeys(_ADVICE.get(kind, "") for kind in sorted(kinds))
    count = "1 operator" if len(nodes) == 1 else f"{len(nodes)} operators"
    return ExportError(
        f"{count} of {ML_DOMAIN} cannot be expressed in ONNX's own:\n    " + "\n    ".join(lines),
        why="TensorRT has none of that domain; linear models, scalers, normalizers and selections are rewritten, with "
        "post_transform NONE, LOGISTIC or SOFTMAX",
        fix="; ".join(text for text in advice if text)
        or "take these steps of the pipeline out, and do them before the model",
    )


def _rank(node: ir.Node) -> int:
    """Of its input; 2, a table of samples, where it is not known."""
    value = node.inputs[0]
    return 2 if value is None or value.shape is None else len(value.shape)


def _with_axis(writer: NodeWriter, node: ir.Node) -> ir.Value:
    # Unsqueeze takes its axes as an attribute or an input; Reshape is one thing in every opset, and 0 keeps an axis.
    return writer.add("Reshape", node.inputs[0], np.array([*[0] * _rank(node), 1]))


def _as_float(writer: NodeWriter, value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value if value.dtype == ir.DataType.FLOAT else _cast_float(writer, value)


def _cast_float(writer: NodeWriter, value: ir.Value) -> ir.Value:
    return writer.add("Cast", value, to=ir.DataType.FLOAT.value)


def _floats(node: ir.Node, name: str) -> Array | None:
    return np.array(node.attributes[name].as_floats(), np.float32) if name in node.attributes else None


def _ints(node: ir.Node, name: str) -> Array | None:
    return np.array(node.attributes[name].as_ints(), np.int64) if name in node.attributes else None
