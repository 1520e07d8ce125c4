"""Harmless rewrites keep the function, faults give valid models; both over the corpus that every pass must survive."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, run_model

from trtforge.converter.faults import FAULTS, Scene
from trtforge.converter.graph_edits import GraphEditor
from trtforge.converter.rewrites import REWRITES
from trtforge.runtime.graph import graph_hash

pytestmark = pytest.mark.slow  # a minute each on two busy cores

BATCH = 3
# onnxruntime refuses nodes that share a name, whatever is done to them
CASES = [case for case in CORPUS if case.name != "duplicate_names"]


def typed(case) -> ir.Model:
    """With the types and shapes that an artifact's graphs have."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(case.proto()))


def valid(model: ir.Model) -> bool:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", REWRITES)
def test_rewrite_keeps_the_function(case, kind):
    expected = case.expected(BATCH)
    for seed in range(2):
        model = typed(case)
        if REWRITES[kind](GraphEditor(model), np.random.default_rng(seed)) is None:
            return
        assert valid(model)
        found = run_model(model, case.feeds(BATCH))
        assert list(found) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-5)


def test_every_rewrite_has_a_place_in_the_corpus():
    for kind, rewrite in REWRITES.items():
        if kind != "permuted channels":  # needs two Convs in a row
            assert any(rewrite(GraphEditor(typed(case)), np.random.default_rng(0)) for case in CASES), kind


def two_convs():
    random = np.random.default_rng(0)
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2, 8, 8] x) => (float[n, 4, 2, 2] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu (a)
            c = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
            y = Conv <kernel_shape = [3, 3]> (c, w2, b2)
        }"""
    )
    for name, shape in {"w1": (6, 2, 3, 3), "b1": (6,), "w2": (4, 6, 3, 3), "b2": (4,)}.items():
        tensor = ir.tensor(random.standard_normal(shape).astype(np.float32), name=name)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value, value.type, value.shape = tensor, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        model.graph.register_initializer(value)
    return model


def test_permuted_channels_keep_the_function():
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 2, 8, 8)).astype(np.float32)}
    model = two_convs()
    before = run_model(model, feeds)["y"]
    assert REWRITES["permuted channels"](GraphEditor(model), np.random.default_rng(0))
    assert graph_hash(model) != graph_hash(two_convs())
    np.testing.assert_allclose(run_model(model, feeds)["y"], before, rtol=1e-4, atol=1e-4)


def scene_of(case) -> Scene:
    model = typed(case)
    dims = {
        str(dim.value)
        for value in model.graph.inputs
        for dim in value.shape or ()
        if isinstance(dim, ir.SymbolicDim) and dim.value
    }
    peaks = {
        str(value.name): np.array([3.0, 2.0, 1.0, 0.5]) for node in model.graph for value in node.outputs if value.name
    }
    return Scene(dict.fromkeys(dims, 2), dict.fromkeys(dims, 4), peaks)


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_gives_valid_models_that_differ(kind):
    made = different = 0
    for case in CASES:
        scene = scene_of(case)
        for seed in range(4):
            model = typed(case)
            what = FAULTS[kind](GraphEditor(model), np.random.default_rng(seed), scene)
            if what is None or not valid(model):
                continue
            made += 1
            different += graph_hash(model) != graph_hash(typed(case))
            again = typed(case)
            assert FAULTS[kind](GraphEditor(again), np.random.default_rng(seed), scene) == what
            assert graph_hash(again) == graph_hash(model)
    if kind != "wrong weights":  # no two weights of a case have one shape
        assert made >= 3
        assert different >= 3
