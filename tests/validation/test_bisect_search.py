"""Bisection on graphs with one planted error each: the node is found, in a logarithm of runs, and its kind is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.converter.pieces import open_onnx, run_with
from trtforge.runtime.graph import META_ORIGIN
from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.bisect import Bisection, Piece, Side, noise_of
from trtforge.validation.differences import find_differences
from trtforge.validation.symptoms import find_symptom

RUN = run_with(open_onnx)
RNG = np.random.default_rng(0)


def model_of(text: str, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = f"{node.op_type}/{node.outputs[0].name}"
    return model


def chain(count: int, weights: Sequence[Array]) -> ir.Model:
    steps = " ".join(f"t{i} = MatMul({'x' if i == 0 else f't{i - 1}'}, w{i})" for i in range(count))
    text = f"g (float[n,4] x) => (float[n,4] y) {{ {steps} y = Relu(t{count - 1}) }}"
    return model_of(text, **{f"w{i}": w for i, w in enumerate(weights)})


def rotations(count: int) -> list[Array]:
    """Orthogonal matrices: an error keeps its size on its way."""
    rng = np.random.default_rng(1)
    return [np.linalg.qr(rng.standard_normal((4, 4)))[0].astype(np.float32) for _ in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.data())
def test_the_planted_node_is_found(count: int, data: st.DataObject) -> None:
    guilty = data.draw(st.integers(0, count - 1))
    weights = rotations(count)
    wrong = [w * (2 if i == guilty else 1) for i, w in enumerate(weights)]
    samples = [{"x": RNG.standard_normal((3, 4)).astype(np.float32)}]
    reference, candidate = chain(count, weights), chain(count, wrong)
    search = Bisection(Side(reference, RUN), Side(candidate, RUN), samples)
    location = search.locate()
    assert location is not None
    assert location.nodes == (f"MatMul/t{guilty}",)
    assert location.share == pytest.approx(1, abs=1e-3)
    assert search.runs["candidate"] <= 2 + np.log2(count + 1) / 3 + 1
    piece = search.isolate(location)
    assert search.explains(location, piece)
    assert piece.own == pytest.approx(1, rel=1e-4)  # twice the signal is an error as large as the signal
    (sentence,) = find_differences(reference, piece, location.nodes, lambda graph: RUN(graph, [{}])[0])
    assert sentence.startswith(f"its constant w{guilty} is another one: ")


def test_equal_graphs_have_no_location() -> None:
    model = chain(3, rotations(3))
    samples = [{"x": np.ones((1, 4), np.float32)}]
    assert Bisection(Side(model, RUN), Side(model, RUN), samples).locate() is None


def test_of_two_equal_faults_the_first_is_named() -> None:
    weights = rotations(12)
    lost = [np.zeros_like(w) if i in (3, 8) else w for i, w in enumerate(weights)]
    samples = [{"x": RNG.standard_normal((3, 4)).astype(np.float32)}]
    search = Bisection(Side(chain(12, weights), RUN), Side(chain(12, lost), RUN), samples)
    location = search.locate()
    assert location is not None
    assert location.nodes == ("MatMul/t3",)


def test_a_tensor_that_the_candidate_lacks_widens_the_location() -> None:
    reference = model_of("g (float[n] x) => (float[n] y) { a = Relu(x) b = Neg(a) y = Exp(b) }")
    candidate = model_of("g (float[n] x) => (float[n] y) { b = Neg(x) y = Exp(b) }")
    samples = [{"x": np.array([-1, 1], np.float32)}]
    search = Bisection(Side(reference, RUN), Side(candidate, RUN), samples)
    location = search.locate()
    assert location is not None
    assert location.nodes == ("Relu/a", "Neg/b")
    piece = search.isolate(location)
    differences = find_differences(reference, piece, location.nodes, lambda graph: RUN(graph, [{}])[0])
    assert differences == ["Relu/a is missing", "its input 0 is x, the reference has a"]


def test_what_was_added_and_what_was_swapped_are_named() -> None:
    reference = model_of("g (float[n,n] x) => (float[n,n] y) { a = Exp(x) y = Sub(a, x) }")
    candidate = model_of("g (float[n,n] x) => (float[n,n] y) { a = Exp(x) t = Transpose(a) y = Sub(x, t) }")
    samples = [{"x": RNG.standard_normal((3, 3)).astype(np.float32)}]
    search = Bisection(Side(reference, RUN), Side(candidate, RUN), samples)
    location = search.locate()
    assert location is not None
    assert location.nodes == ("Sub/y",)
    piece = search.isolate(location)
    differences = find_differences(reference, piece, location.nodes, lambda graph: RUN(graph, [{}])[0])
    assert differences == [
        "Transpose/t (Transpose) was added",
        "its input 0 is x, the reference has a",
        "its input 1 is t, the reference has x",
    ]


def test_noise_is_a_ratio_of_squares() -> None:
    a, b = np.array([3, 4], np.float32), np.array([3, 5], np.float32)
    assert noise_of([{"a": a}], [{"a": b}]) == pytest.approx(1 / 25)
    assert noise_of([{"a": a}, {"a": a}], [{"a": a}, {"a": b}]) == pytest.approx(1 / 50)
    assert noise_of([{"a": a}], [{"a": np.array([3, np.nan], np.float32)}]) == np.inf
    infinite = np.array([3, np.inf], np.float32)
    assert noise_of([{"a": infinite}], [{"a": infinite}]) == 0
    whole = np.array([1, 2, 3, 4])
    assert noise_of([{"a": whole}], [{"a": np.array([1, 2, 0, 4])}]) == 0.25


QUANTIZED = """g (float[n,4] x) => (float[n,4] y) {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(c, u, z) y = MatMul(d, v) }"""


def quantized_piece(x: Array, scale: float, codes: Array, unit: float, weight: Array) -> Piece:
    model = model_of(QUANTIZED, s=np.float32(scale), z=np.int8(0), c=codes.astype(np.int8), u=np.float32(unit))
    for node in model.graph:
        if node.op_type != "MatMul":
            node.metadata_props[META_ORIGIN] = "quantize"
    inputs: list[Tensors] = [{"x": x.astype(np.float32)}]
    expected = [{"y": (x @ weight).astype(np.float32)}]
    got = RUN(model, inputs)
    return Piece(model, inputs, expected, got, noise_of(expected, got))


def test_weights_clipping_and_steps_are_told_apart() -> None:
    x = RNG.standard_normal((64, 4))
    weight = np.rint(RNG.uniform(-100, 100, (4, 4)))
    fine = x.max() / 127 * 1.5
    narrow = quantized_piece(x, 0.5 / 127, weight, 1, weight)
    found = find_symptom(narrow, RUN)
    assert found.kind == "clipping"
    assert "its input x is clipped at 0.5: values reach" in found.reason
    coarse = quantized_piece(x, 1.0, weight, 1, weight)
    found = find_symptom(coarse, RUN)
    assert found.kind == "rounding"
    assert "of its non-zero values become 0" in found.reason
    weights = quantized_piece(x, fine, np.rint(weight / 40), 40, weight)
    found = find_symptom(weights, RUN)
    assert found.kind == "rounding"
    assert found.reason.startswith("its weights are to blame")
