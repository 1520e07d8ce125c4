"""scikit-learn graphs: each operator against onnxruntime's own kernel, then whole pipelines as skl2onnx writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from onnx_ir.passes.common import ShapeInferencePass

import trtforge
from trtforge.converter.onnx_ml import ML_DOMAIN, rewrite_ml
from trtforge.converter.onnx_ml_outputs import plain_outputs
from trtforge.runtime.errors import ExportError

OPSETS = [9, 13, 20]
NAN = float("nan")


def graph(nodes: list[onnx.NodeProto], x: Any, outputs: list[str], opset: int, **weights: Any) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, [None, *x.shape[1:]])],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )  # fmt: skip
    for value in made.output:
        value.ClearField("type")
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(ML_DOMAIN, 2)]
    return helper.make_model(made, opset_imports=imports, ir_version=8)


def node(op: str, outputs: list[str], *, inputs: tuple[str, ...] = ("x",), **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, domain=ML_DOMAIN, **attributes)


def run(proto: onnx.ModelProto, x: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def check(proto: onnx.ModelProto, x: Any) -> None:
    model = ir.from_proto(proto)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    rewrite_ml(model)
    assert all(node.domain == "" for node in model.graph)
    for found, wanted in zip(run(ir.to_proto(model), x), run(proto, x), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


# Rows of both signs, one of zeros, one whose greatest value is 0.
TABLE = np.array([[1, -2, 3], [-1, -2, -5], [0, 0, 0], [-1, 0, -2], [0.5, 0.25, 0.125]], np.float32)
HOLES = np.array([[1, NAN, 3], [NAN, NAN, 0]], np.float32)
COUNTS = np.array([[1, 2, 7], [3, 1, 1], [9, -4, 2]])
WEIGHTS = [0.5, -0.25, 1.5, 2.0, 0.125, -1.0, 0.25, -1.5, 0.75]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(
    ("x", "op", "attributes"),
    [
        (TABLE, "Scaler", {"offset": [1.0, 2.0, -3.0], "scale": [2.0, 0.5, 4.0]}),
        (TABLE, "Scaler", {"offset": [1.0], "scale": [0.5]}),
        (COUNTS, "Scaler", {"offset": [1.0], "scale": [0.5]}),
        *((TABLE, "Normalizer", {"norm": norm}) for norm in ("MAX", "L1", "L2")),
        (TABLE[:, None], "Binarizer", {"threshold": 0.25}),
        (HOLES, "Imputer", {"imputed_value_floats": [7.0, 8.0, 9.0], "replaced_value_float": NAN}),
        (TABLE, "Imputer", {"imputed_value_floats": [7.0], "replaced_value_float": -2.0}),
        (COUNTS, "OneHotEncoder", {"cats_int64s": [1, 2, 9], "zeros": 1}),
        (COUNTS, "LabelEncoder", {"keys_int64s": [1, 2, 9], "values_int64s": [2**40, 5, 6], "default_int64": -3}),
        (COUNTS, "LabelEncoder", {"keys_int64s": [1, 2, 9], "values_floats": [0.5, 5.0, 6.0], "default_float": -3.5}),
    ],
)  # fmt: skip
def test_one_output(x: Any, op: str, attributes: dict[str, Any], opset: int) -> None:
    check(graph([node(op, ["y"], **attributes)], x, ["y"], opset), x)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("transform", ["NONE", "LOGISTIC", "SOFTMAX"])
@pytest.mark.parametrize("labels", [None, [0, 1, 2], [7, 3, -1]])
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_linear_models(targets: int, labels: list[int] | None, transform: str, opset: int) -> None:
    attributes = {"coefficients": WEIGHTS[: 3 * targets], "post_transform": transform}
    intercepts = {"intercepts": [0.125, -0.5, 0.25][:targets]}
    if labels is None:
        for more in ({}, intercepts):
            regressor = node("LinearRegressor", ["y"], targets=targets, **attributes, **more)
            check(graph([regressor], TABLE, ["y"], opset), TABLE)
        return
    labels = labels[: max(targets, 2)]
    classifier = node("LinearClassifier", ["label", "score"], classlabels_ints=labels, **attributes, **intercepts)
    check(graph([classifier], TABLE, ["label", "score"], opset), TABLE)


@pytest.mark.parametrize("opset", OPSETS)
def test_features_picked(opset: int) -> None:
    picker = node("ArrayFeatureExtractor", ["y"], inputs=("x", "which"))
    check(graph([picker], TABLE, ["y"], opset, which=np.array([[2, 0]])), TABLE)
    # How skl2onnx turns the index of the best class into its label.
    lookup = node("ArrayFeatureExtractor", ["y"], inputs=("labels", "best"))
    best = helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0)
    check(graph([best, lookup], TABLE, ["y"], opset, labels=np.array([5, 7, 9])), TABLE)
    joined = node("FeatureVectorizer", ["y"], inputs=("x", "x"), inputdimensions=[3, 3])
    check(graph([joined], TABLE, ["y"], opset), TABLE)


def test_all_that_cannot_be_is_in_one_list(tmp_path: Path) -> None:
    tree = node("TreeEnsembleRegressor", ["t"], nodes_nodeids=[0], nodes_modes=["LEAF"], nodes_treeids=[0])
    machine = node("SVMRegressor", ["s"], coefficients=[1.0], rho=[0.0], kernel_type="RBF", kernel_params=[1.0, 0, 0])
    odd = node("LinearRegressor", ["r"], targets=2, coefficients=WEIGHTS[:6], post_transform="SOFTMAX_ZERO")
    fine = node("Scaler", ["f"], offset=[1.0], scale=[1.0])
    model = ir.from_proto(graph([tree, machine, odd, fine], TABLE, ["t", "s", "r", "f"], 13))
    with pytest.raises(ExportError, match="3 operators of ai") as caught:
        rewrite_ml(model)
    assert caught.value.exit_code == 3
    for text in ("LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor"):
        assert text in caught.value.what
    assert "Scaler" not in caught.value.what
    assert "FIL backend" in caught.value.fix
    assert "LinearSVC" in caught.value.fix


def test_an_output_that_is_text(tmp_path: Path) -> None:
    proto = graph([helper.make_node("Cast", ["x"], ["y"], to=8)], TABLE, ["y"], 13)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [None, 3]))
    with pytest.raises(ExportError, match="output 'y' is text"):
        plain_outputs(proto)


def test_a_map_of_float64_scores_becomes_float32() -> None:
    """skl2onnx writes it where a model is given float64, and onnxruntime does not take its own ZipMap then."""
    x = TABLE.astype(np.float64)
    proto = graph([node("ZipMap", ["y"], classlabels_int64s=[4, 5, 6])], x, ["y"], 13)
    (note,) = plain_outputs(proto)
    assert note == "output 'y' is a tensor, with a column for each of [4, 5, 6], and no map"
    (found,) = run(proto, x)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x)


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Any]:
    data = pytest.importorskip("sklearn.datasets")
    x, y = data.load_digits(return_X_y=True)
    return x[:400].astype(np.float32), y[:400]


def pipelines() -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    return {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression()),
        "text": make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=1000, random_state=0)),
        "ridge": make_pipeline(Normalizer(), Ridge()),
    }


@pytest.mark.parametrize("name", ["logistic", "text", "ridge"])
def test_a_pipeline_becomes_an_engine(name: str, digits: tuple[Any, Any], tmp_path: Path) -> None:
    skl2onnx = pytest.importorskip("skl2onnx")
    x, y = digits
    y = np.array(["no", "yes"])[y % 2] if name == "text" else y
    model = pipelines()[name].fit(x, y)
    onnx.save(skl2onnx.to_onnx(model, x[:1]), tmp_path / "model.onnx")
    notes: list[str] = []
    artifact = trtforge.convert(
        tmp_path / "model.onnx",
        None,
        tmp_path / name,
        dims={"batch": (1, 8, 64)},
        inputs={"X": ("batch", 64)},
        validation=[{"X": x[:64]}],
        on_event=lambda event: notes.append(event.text) if event.kind == "note" else None,
    )
    assert artifact.status in ("portable", "built", "validated")
    found = run_artifact(artifact, x)
    if name == "ridge":
        np.testing.assert_allclose(found["variable"][:, 0], model.predict(x), atol=1e-3)
        return
    labels = found["output_label"] if name == "logistic" else model.classes_[found["output_label"]]
    np.testing.assert_array_equal(labels, model.predict(x))
    np.testing.assert_allclose(found["output_probability"], model.predict_proba(x), atol=1e-4)
    assert any("'output_probability' is a tensor" in note for note in notes)
    assert any("'output_label' is the position of the label in [no, yes]" in note for note in notes) == (name == "text")
    assert not list(artifact.path.glob(".*"))


def run_artifact(artifact: Any, x: Any) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(artifact.model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"X": x}), strict=True))
