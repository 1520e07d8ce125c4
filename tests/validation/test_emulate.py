from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx_corpus import CORPUS, Case

from trtforge.runtime.graph import META_ORIGIN, all_graphs, save_graph
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner, run_onnx
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.validation.emulate import emulate, needs_emulation

TYPES: dict[str, tuple[int, Any]] = {"float16": (10, np.float16), "bfloat16": (16, ml_dtypes.bfloat16)}


def model_of(text: str, opset: int = 23) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, feeds: dict[str, Any], *, optimize: bool = True) -> dict[str, Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return OnnxRuntimeRunner(proto.SerializeToString(), optimize=optimize, threads=1).run(feeds)


def low_values(model: ir.Model) -> list[str | None]:
    low = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return [v.name for g in all_graphs(model) for node in g if META_ORIGIN not in node.metadata_props
            for v in node.outputs if v.dtype in low]  # fmt: skip


CHAIN = """g (float[n] x) => (float[n] y) {{
    h = Cast<to = {to}>(x) s = Mul(h, h) r = Sqrt(s) e = Add(r, r) y = Cast<to = 1>(e) }}"""


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=60, deadline=None)
@given(x=hnp.arrays(np.float32, 8, elements=st.floats(width=32, min_value=-1e6, max_value=1e6)))
def test_every_node_rounds_once_whatever_onnxruntime_optimizes(x: Any, dtype: str, optimize: bool) -> None:
    number, kind = TYPES[dtype]

    def rounded(array: Any) -> Any:
        with np.errstate(over="ignore"):
            return array.astype(kind).astype(np.float32)

    h = rounded(x)
    with np.errstate(over="ignore"):
        e = rounded(np.float32(2) * rounded(np.sqrt(rounded(h * h))))
    y = run(emulate(model_of(CHAIN.format(to=number))), {"x": x}, optimize=optimize)["y"]
    np.testing.assert_array_equal(y, e)


def test_overflow_becomes_infinite_where_onnxruntime_alone_hides_it() -> None:
    """The reason for this module: the fp16 graph itself gives 70000 back, as if there were no fp16 in it."""
    model = model_of(
        "g (float[n] x) => (float[n] y) { h = Cast<to = 10>(x) a = Abs(h) s = Sqrt(a) y = Cast<to = 1>(s) }"
    )
    x = np.array([70000, 3.3], np.float32)
    native = run(model, {"x": x})["y"]
    assert native[0] == pytest.approx(np.sqrt(70000.0)), "onnxruntime rounds fp16 now: emulation may be needless"
    emulated = run(emulate(model), {"x": x})["y"]
    assert emulated[0] == np.inf
    assert emulated[1] == np.float16(np.sqrt(np.float32(np.float16(3.3))))


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_inputs_and_outputs_in_half(dtype: str) -> None:
    _, kind = TYPES[dtype]
    text = f"""g ({dtype}[2,3] x) => ({dtype}[2,2] y, {dtype}[2,3] same, {dtype}[2,2] raw) {{
        y = MatMul(x, w) same = Identity(x) raw = Relu(y) }}"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    w = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2).astype(kind)
    model = ir.from_proto(proto)
    value = ir.Value(name="w", const_value=ir.tensor(w, name="w"))
    model.graph.register_initializer(value)
    (matmul, *_) = model.graph
    matmul.replace_input_with(1, value)
    emulated = emulate(model)
    assert low_values(emulated) == []
    assert [v.dtype for v in emulated.graph.outputs] == [v.dtype for v in model.graph.outputs]
    assert [v.name for v in emulated.graph.outputs] == ["y", "same", "raw"]
    assert matmul.outputs[0].dtype != ir.DataType.FLOAT, "the model itself is left alone"
    assert value.const_value is not None
    assert value.const_value.dtype == matmul.outputs[0].dtype
    x = np.array([[1, 2, 3], [0.1, 0.2, 0.3]], np.float32).astype(kind)
    got = run(emulated, {"x": x})
    expected = (x.astype(np.float32) @ w.astype(np.float32)).astype(kind)
    assert {name: array.dtype for name, array in got.items()} == dict.fromkeys(("y", "same", "raw"), np.dtype(kind))
    np.testing.assert_array_equal(got["y"].astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(got["same"].astype(np.float32), x.astype(np.float32))
    np.testing.assert_array_equal(got["raw"].astype(np.float32), np.maximum(expected.astype(np.float32), 0))


def test_rounded_tensors_keep_their_names() -> None:
    model = model_of(CHAIN.format(to=10))
    proto = ir.to_proto(emulate(model))
    x = np.array([0.1], np.float32)
    runner = OnnxRuntimeRunner(proto.SerializeToString(), extra_outputs=["h", "s", "r"])
    got = runner.run({"x": x})
    assert got["h"] == np.float32(np.float16(0.1))
    assert got["s"] == np.float32(np.float16(got["h"] ** 2))


def test_named_types_follow() -> None:
    text = """g (float[2,3] x) => (float[2,3] y) {
        h = Cast<to = 10>(x) k = Constant<value = float16 {16384}>() s = Shape(h)
        c = ConstantOfShape<value = float16[1] {15360}>(s) l = CastLike(x, h) e = EyeLike<dtype = 10>(h)
        q = QuantizeLinear(h, scale, zero) d = DequantizeLinear(q, scale, zero)
        n = LayerNormalization(h, ones) a = Sum(c, l, d, n, e) y = Cast<to = 1>(a) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    for name, array in {"scale": np.float16(0.1), "zero": np.int8(0), "ones": np.ones(3, np.float16)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    emulated = emulate(model)
    assert low_values(emulated) == []
    y = run(emulated, {"x": np.full((2, 3), 0.5, np.float32)})["y"]
    np.testing.assert_allclose(y, 1 + 0.5 + 0.5 + np.eye(2, 3), atol=0.01)


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_float32_models_are_unchanged(case: Case) -> None:
    model = case.ir()
    assert not needs_emulation(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert ir.to_proto(emulate(model)).SerializeToString(deterministic=True) == before


def test_bodies_are_emulated_too() -> None:
    text = """g (bfloat16[n] x, bool c) => (bfloat16[n] y) {
        trips = Constant<value = int64 {3}>()
        y = Loop(trips, , x)<body = l (int64 i, bool k, bfloat16[n] a) => (bool o, bfloat16[n] b) {
            o = Identity(k)
            b = If(c)<then_branch = t () => (bfloat16[n] d) { d = Mul(a, x) },
                      else_branch = e () => (bfloat16[n] f) { f = Neg(a) }> }> }"""
    model = model_of(text)
    assert needs_emulation(model)
    emulated = emulate(model)
    assert low_values(emulated) == []
    x = np.array([1.1, 3, 1e20], np.float32).astype(ml_dtypes.bfloat16)
    expected = x
    with np.errstate(over="ignore"):
        for _ in range(3):
            expected = (expected.astype(np.float32) * x.astype(np.float32)).astype(ml_dtypes.bfloat16)
    got = run(emulated, {"x": x, "c": np.array(True)})["y"]
    np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32))


def test_it_runs_in_a_child_what_onnxruntime_has_no_kernels_for(tmp_path: Path) -> None:
    model = model_of("g (bfloat16[1,1,3,3] x, bfloat16[1,1,1,1] w) => (bfloat16[1,1,3,3] y) { y = Conv(x, w) }")
    saved = save_graph(emulate(model), tmp_path / "m.onnx")
    x, w = np.full((1, 1, 3, 3), 1.5, ml_dtypes.bfloat16), np.full((1, 1, 1, 1), 2, ml_dtypes.bfloat16)
    save_tensors(tmp_path / "feeds.safetensors", {"0/x": x, "0/w": w})
    run_onnx(saved.path, tmp_path / "feeds.safetensors", tmp_path / "out.safetensors", threads=1)
    y = load_tensors(tmp_path / "out.safetensors")[0]["0/y"]
    assert y.dtype == ml_dtypes.bfloat16
    assert (y.astype(np.float32) == 3).all()
