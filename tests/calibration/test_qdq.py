from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_corpus import CORPUS, Case

from trtforge.calibration.placement import quantizable_tensors
from trtforge.calibration.qdq import ORIGIN, insert_qdq
from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.calibration.weights import constant_array, fit_scale, is_constant, quantize_weight
from trtforge.converter.casts import apply_plan
from trtforge.converter.identity import identify
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import META_ORIGIN, node_refs
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.runtime.trt.backend import find_backend

INT8 = PrecisionPlan(default="int8", base="fp32")
Parse = Callable[..., ir.Model]
Call = Callable[..., Any]


@dataclass(frozen=True)
class Graph:
    """A graph, how many pairs and stored weights it must get, and the least SQNR in int8 (FP8: 10 dB less)."""

    name: str
    text: str
    weights: dict[str, Any]
    pairs: int
    stored: int
    db: float = 35.0

    def __str__(self) -> str:
        return self.name


GRAPHS = [
    Graph(
        "residual_cnn",
        """(float[N,3,16,16] x) => (float[N,5] y) {
            a = Conv<pads=[1,1,1,1]>(x, w0, b)
            r = Relu(a)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
            c = Conv<pads=[1,1,1,1]>(p, w1)
            d = Relu(c)
            e = Conv<pads=[1,1,1,1]>(d, w2)
            f = Add(e, p)
            g = Relu(f)
            h = GlobalAveragePool(g)
            i = Flatten(h)
            y = Gemm<transB=1>(i, w3, b3)
        }""",
        {"w0": (8, 3, 3, 3), "b": (8,), "w1": (8, 8, 3, 3), "w2": (8, 8, 3, 3), "w3": (5, 8), "b3": (5,)},
        4,
        4,
        25.0,
    ),
    Graph("grouped", "(float[N,8,8,8] x) => (float[N,6,6,6] y) { y = Conv<group=2>(x, w) }", {"w": (6, 4, 3, 3)}, 1, 1),
    Graph(
        "depthwise_relu6",
        """(float[N,8,8,8] x) => (float[N,4,6,6] y) {
            d = Conv<group=8>(x, w)
            r = Clip(d, low, high)
            y = Conv(r, w1)
        }""",
        {"w": (8, 1, 3, 3), "w1": (4, 8, 1, 1), "low": np.array(0, np.float32), "high": np.array(6, np.float32)},
        2,
        2,
    ),
    Graph("conv_1d", "(float[N,4,16] x) => (float[N,6,14] y) { y = Conv(x, w, b) }", {"w": (6, 4, 3), "b": (6,)}, 1, 1),
    Graph("conv_3d", "(float[N,2,6,6,6] x) => (float[N,4,4,4,4] y) { y = Conv(x, w) }", {"w": (4, 2, 3, 3, 3)}, 1, 1),
    Graph(
        "conv_transpose",
        "(float[N,8,4,4] x) => (float[N,6,9,9] y) { y = ConvTranspose<strides=[2,2]>(x, w, b) }",
        {"w": (8, 6, 3, 3), "b": (6,)},
        1,
        1,
    ),
    Graph(
        "grouped_conv_transpose",
        "(float[N,8,4,4] x) => (float[N,6,9,9] y) { y = ConvTranspose<strides=[2,2], group=2>(x, w) }",
        {"w": (8, 3, 3, 3)},
        1,
        1,
    ),
    Graph(
        "depthwise_conv_transpose",
        "(float[N,8,4,4] x) => (float[N,8,9,9] y) { y = ConvTranspose<strides=[2,2], group=8>(x, w) }",
        {"w": (8, 1, 3, 3)},
        1,
        1,
    ),
    Graph(
        "gemm_both_ways",
        """(float[N,16] x) => (float[N,8] y) {
            a = Gemm<alpha=0.5, beta=2.0>(x, w, b)
            y = Gemm<transB=1>(a, v)
        }""",
        {"w": (16, 12), "b": (12,), "v": (8, 12)},
        2,
        2,
    ),
    Graph("gemm_trans_a", "(float[16,N] x) => (float[N,8] y) { y = Gemm<transA=1>(x, w) }", {"w": (16, 8)}, 1, 1),
    Graph("batched_matmul", "(float[3,N,16] x) => (float[3,N,8] y) { y = MatMul(x, w) }", {"w": (3, 16, 8)}, 1, 1),
    Graph("weight_on_the_left", "(float[N,16,7] x) => (float[N,8,7] y) { y = MatMul(w, x) }", {"w": (8, 16)}, 1, 1),
    Graph(
        "shared_weight",
        "(float[N,8,8,8] x) => (float[N,8,8,8] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, w) }",
        {"w": (8, 8, 1, 1)},
        2,
        1,
    ),
    Graph(
        "one_weight_two_axes",
        "(float[N,8] x) => (float[N,8] y) { a = Gemm(x, w) b = Relu(a) y = Gemm<transB=1>(b, w) }",
        {"w": (8, 8)},
        2,
        2,
    ),
    Graph(
        "tied_embedding",
        """(int64[N,4] ids) => (float[N,4,9] y) {
            e = Gather(table, ids)
            t = Transpose<perm=[1,0]>(table)
            y = MatMul(e, t)
        }""",
        {"table": (9, 8)},
        1,
        1,
    ),
    Graph(
        "attention",
        """(float[N,2,8,16] q, float[N,2,8,16] k, float[N,2,8,16] v) => (float[N,2,8,16] y) {
            t = Transpose<perm=[0,1,3,2]>(k)
            s = MatMul(q, t)
            m = Mul(s, scale)
            p = Softmax(m)
            y = MatMul(p, v)
        }""",
        {"scale": np.ones(1, np.float32) * np.float32(0.25)},
        4,
        0,
        30.0,
    ),
    Graph("dynamic_kernel", "(float[2,4,8,8] x, float[8,4,3,3] k) => (float[2,8,6,6] y) { y = Conv(x, k) }", {}, 2, 0),
    # tf2onnx: NHWC at the edges and between, weights stored HWIO behind a Transpose, a bias as an Add in NHWC.
    Graph(
        "tensorflow",
        """(float[N,8,8,3] x) => (float[N,6,6,5] y) {
            k = Transpose<perm=[3,2,0,1]>(w)
            a = Transpose<perm=[0,3,1,2]>(x)
            c = Conv(a, k)
            d = Transpose<perm=[0,2,3,1]>(c)
            e = Add(d, b)
            f = Relu(e)
            g = Transpose<perm=[0,3,1,2]>(f)
            i = Conv(g, k1)
            y = Transpose<perm=[0,2,3,1]>(i)
        }""",
        {"w": (3, 3, 3, 4), "b": (4,), "k1": (5, 4, 1, 1)},
        2,
        2,
    ),
    # paddle2onnx: weights as Constant nodes behind Identity, a bias reshaped at run time, BatchNormalization kept.
    Graph(
        "paddle",
        """(float[N,3,8,8] x) => (float[N,5] y) {
            w = Constant<value = float[4,3,1,1] {1.5,-0.5,0.25,0.75,1.0,-1.25,0.5,0.3,-0.7,0.9,-0.2,0.6}>()
            i = Identity(w)
            c = Conv(x, i)
            n = BatchNormalization(c, s, b, b, s)
            q = Relu(n)
            o = Reshape(q, shape)
            m = MatMul(o, v)
            y = Add(m, b1)
        }""",
        {
            "s": np.ones(4, np.float32), "b": np.zeros(4, np.float32), "shape": np.array([0, -1]), "v": (256, 5),
            "b1": (5,),
        },
        2,
        2,
    ),
]  # fmt: skip


def quantize(
    model: ir.Model, feeds: dict[str, np.ndarray], max_ranges: Call, format: str = "int8", base: str = "fp32"
) -> Any:
    """Places on the float graph, casts it to `base`, and inserts."""
    plan = PrecisionPlan(default=format, base=base)
    placement = quantizable_tensors(model, plan)
    ranges = max_ranges(model, placement.measured, feeds)
    if base != "fp32":
        apply_plan(model, plan)
    return insert_qdq(model, placement, ranges)


def sqnr(reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> float:
    noise = sum(((reference[name] - candidate[name]) ** 2).sum() for name in reference)
    return float(10 * np.log10(sum((reference[name] ** 2).sum() for name in reference) / noise))


def skip_where_rtx_cannot(format: str, graph: Graph) -> None:
    backend = find_backend("tensorrt-rtx")
    if format == "int8" and "Conv" in graph.text and not backend.capabilities.int8_conv:
        pytest.skip(f"{backend} does not build INT8 convolutions")


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_it_is_near_the_float_graph_and_rtx_builds_it(
    graph: Graph,
    format: str,
    parse_graph: Parse,
    random_feeds: Call,
    run_model: Call,
    max_ranges: Call,
    build_rtx: Call,
) -> None:
    model = parse_graph(graph.text, graph.weights)
    feeds = random_feeds(model)
    reference = run_model(model, feeds)
    ids = {ref.id for ref in node_refs(model)}
    report = quantize(model, feeds, max_ranges, format)
    assert (report.pairs, report.weights) == (graph.pairs, graph.stored)
    left = {ref.id for ref in node_refs(model)}
    assert left <= ids
    assert all(name.partition("#")[0] in ("Transpose", "Constant", "Identity") for name in ids - left)
    assert sqnr(reference, run_model(model, feeds)) > graph.db - (10 if format == "fp8" else 0)
    skip_where_rtx_cannot(format, graph)
    build_rtx(model)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_in_a_graph_of_16_bit_floats(
    graph: Graph, format: str, base: str, parse_graph: Parse, random_feeds: Call, run_model: Call, max_ranges: Call,
    build_rtx: Call,
) -> None:  # fmt: skip
    if base == "bf16" and "ConvTranspose" in graph.text:
        pytest.skip("RTX 1.7 builds no bfloat16 ConvTranspose, quantized or not")
    model = parse_graph(graph.text, graph.weights, opset=22)
    feeds = random_feeds(model)
    reference = run_model(model, feeds)
    report = quantize(model, feeds, max_ranges, format, base)
    assert (report.pairs, report.weights) == (graph.pairs, graph.stored)
    wanted = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[base]
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == wanted
            assert {node.inputs[0].dtype, node.outputs[0].dtype} & {wanted}
    if base == "fp16":  # onnxruntime's CPU provider has no bfloat16 Conv, MatMul or Gemm
        assert sqnr(reference, run_model(model, feeds)) > graph.db - (10 if format == "fp8" else 0)
    skip_where_rtx_cannot(format, graph)
    build_rtx(model)


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_corpus_stays_valid_with_its_ids_and_is_quantized_once(
    case: Case, run_model: Call, max_ranges: Call
) -> None:
    model = case.ir()
    identify(model)
    ids = {ref.id for ref in node_refs(model)}
    feeds = case.feeds(3)
    placement = quantizable_tensors(model, INT8)
    ranges = max_ranges(model, placement.measured, feeds)
    insert_qdq(model, placement, ranges)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    left = {ref.id for ref in node_refs(model)}
    assert left <= ids
    for name, expected in case.expected(3).items():
        got = run_model(model, feeds)[name]
        assert got.shape == expected.shape
        assert np.isfinite(got).all()
    before = ir.to_proto(model).SerializeToString()
    assert not quantizable_tensors(model, INT8).tensors
    again = insert_qdq(model, placement, ranges)
    assert (again.pairs, again.weights) == (0, 0)
    assert ir.to_proto(model).SerializeToString() == before


def test_float_weights_go_and_codes_take_a_quarter(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", {"w": (64, 64)})
    placement = quantizable_tensors(model, INT8)
    report = insert_qdq(model, placement, Ranges({"x": TensorRange(4.0, "max")}))
    assert "w" not in model.graph.initializers
    assert report.bytes_saved == 64 * 64 * 3 - 64 * 5
    assert {node.metadata_props.get(META_ORIGIN) for node in model.graph} == {ORIGIN, None}
    codes = model.graph.initializers["w_axis1_codes"]
    assert codes.dtype == ir.DataType.INT8
    assert np.abs(codes.const_value.numpy()).max() == 127


def test_a_bias_stays_float_and_every_zero_point_is_zero(parse_graph: Parse) -> None:
    model = parse_graph(
        "(float[N,3,4,4] x) => (float[N,4,4,4] y) { y = Conv(x, w, b) }", {"w": (4, 3, 1, 1), "b": (4,)}
    )
    insert_qdq(model, quantizable_tensors(model, INT8), Ranges({"x": TensorRange(1.27, "max")}))
    convolution = next(node for node in model.graph if node.op_type == "Conv")
    assert convolution.inputs[2].name == "b"
    for node in model.graph:
        if "Linear" in node.op_type:
            assert not constant_array(node.inputs[2]).any()
    (quantize_node,) = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert constant_array(quantize_node.inputs[1]) == np.float32(0.01)


def test_a_missing_range_is_named_or_leaves_its_layers_in_float(parse_graph: Parse) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    weights = {"a": (4, 4), "b": (4, 4)}
    model = parse_graph(text, weights)
    placement = quantizable_tensors(model, INT8)
    ranges = Ranges({"h": TensorRange(1.0, "max")})
    with pytest.raises(CalibrationError, match="1 of 2 tensors have no range: x"):
        insert_qdq(model, placement, ranges)
    report = insert_qdq(model, placement, ranges, missing="float")
    assert (report.pairs, report.weights, report.in_float) == (1, 1, ("MatMul#0",))
    assert "a" in model.graph.initializers


def test_a_placement_of_another_graph_is_refused(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) y = MatMul(h, a) }", {"a": (4, 4)})
    other = parse_graph("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, a) }", {"a": (4, 4)})
    ranges = Ranges({name: TensorRange(1.0, "max") for name in ("x", "h")})
    with pytest.raises(CalibrationError, match="MatMul#1"):
        insert_qdq(other, quantizable_tensors(model, INT8), ranges)


@pytest.mark.parametrize(("format", "base", "opset"), [("int8", "fp32", 12), ("fp8", "fp32", 18), ("int8", "fp16", 18)])
def test_an_operator_set_too_old_is_refused(format: str, base: str, opset: int, parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, a) }", {"a": (4, 4)}, opset)
    plan = PrecisionPlan(default=format, base=base)
    placement = quantizable_tensors(model, plan)
    if base != "fp32":
        apply_plan(model, plan)
    with pytest.raises(CalibrationError, match=f"the graph has {opset}"):
        insert_qdq(model, placement, Ranges({"x": TensorRange(1.0, "max")}))


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-30, 1e30])
def test_extreme_ranges_and_dead_channels_build_and_stay_finite(
    amax: float, format: str, parse_graph: Parse, run_model: Call, build_rtx: Call
) -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[:, 0] = 1e-42
    weight[:, 1] = 2.0
    model = parse_graph("(float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": weight})
    plan = PrecisionPlan(default=format, base="fp16")
    placement = quantizable_tensors(model, plan)
    apply_plan(model, plan)
    insert_qdq(model, placement, Ranges({"x": TensorRange(amax, "max")}))
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            scale = constant_array(node.inputs[1]).astype(np.float64)
            assert (scale > 0).all()
            assert np.isfinite(scale).all()
    produced = run_model(model, {"x": np.full((4, 8), 60000.0, np.float32)})["y"]
    assert not np.isnan(produced).any()
    build_rtx(model)


def test_weights_that_are_not_finite_are_named(parse_graph: Parse) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = np.inf
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, broken) }", {"broken": weight})
    with pytest.raises(CalibrationError, match="'broken' has 1 of 16"):
        insert_qdq(model, quantizable_tensors(model, INT8), Ranges({"x": TensorRange(1.0, "max")}))


def test_relu_stays_before_fp8_in_onnxruntime(parse_graph: Parse, run_model: Call) -> None:
    """onnxruntime 1.32 takes an FP8 zero point for uint8's and drops the Relu, unless that rule is switched off."""
    model = parse_graph(
        "(float[N,4] x) => (float[N,4] y) { r = Relu(x) y = MatMul(r, a) }", {"a": np.eye(4, dtype=np.float32)}
    )
    plan = PrecisionPlan(default="fp8", base="fp32")
    insert_qdq(model, quantizable_tensors(model, plan), Ranges({"r": TensorRange(4.0, "max")}))
    assert run_model(model, {"x": -np.ones((2, 4), np.float32)})["y"].max() == 0.0
    assert not run_model(model, {"x": -np.ones((2, 4), np.float32)})["y"].any()


def test_a_rule_leaves_one_layer_in_float(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { h = MatMul(x, a) y = MatMul(h, a) }", {"a": (4, 4)})
    plan = INT8.with_rules([Rule("fp32", id="MatMul#0")])
    placement = quantizable_tensors(model, plan)
    assert placement.nodes == ("MatMul#1",)
    insert_qdq(model, placement, Ranges({"h": TensorRange(1.0, "max")}))
    first = next(node for node in model.graph if node.name == "MatMul#0")
    assert [value.name for value in first.inputs] == ["x", "a"]


_FLOATS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@given(st.lists(st.lists(_FLOATS, min_size=3, max_size=3), min_size=1, max_size=5), st.sampled_from([None, 0, 1]))
def test_codes_are_within_half_a_step_of_every_weight(rows: list[list[float]], axis: int | None) -> None:
    weight = np.array(rows, np.float32)
    for dtype in (ir.DataType.FLOAT, ir.DataType.BFLOAT16):
        codes, scales = quantize_weight("w", weight, axis, "int8", dtype)
        assert codes.dtype == np.int8
        assert codes.min() >= -127
        assert scales.shape == (() if axis is None else (weight.shape[axis],))
        shape = [-1 if i == axis else 1 for i in range(2)]
        steps = (scales.reshape(shape) if axis is not None else scales).astype(np.float64)
        # A bfloat16 scale may be 2^-9 too small, so that the largest weight lies half a code beyond the last one.
        slack = 0.5 + (127 * 2**-8 if dtype == ir.DataType.BFLOAT16 else 1e-4)
        assert (np.abs(codes * steps - weight) <= slack * steps).all()


@given(st.floats(min_value=2.0**-126, max_value=2.0**120, width=32), st.sampled_from(["int8", "fp8"]))
def test_scales_fit_their_type(scale: float, format: str) -> None:
    for dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        fitted = fit_scale(scale, format, dtype)
        assert np.array(fitted).astype(dtype.numpy()).astype(np.float64) == fitted
        assert 0 < fitted < np.inf
        if dtype == ir.DataType.FLOAT16:
            assert np.isfinite(np.float16(fitted) * np.float16(127 if format == "int8" else 448))
    assert fit_scale(scale, format, ir.DataType.FLOAT) == scale


def test_constants_are_folded_through_layout_changes(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,6] x) => (float[N,4] y) {
            a = Unsqueeze(w, one)
            b = Reshape(a, shape)
            c = Transpose(b)
            d = Flatten<axis=1>(c)
            e = Squeeze(f)
            g = Cast<to=1>(d)
            h = MatMul(x, g)
            y = Add(h, e)
        }""",
        {
            "w": np.arange(24, dtype=np.float16).reshape(4, 6), "one": np.array([1]), "shape": np.array([0, -1]),
            "f": np.ones((1, 4), np.float32),
        },
    )  # fmt: skip
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert is_constant(product.inputs[1])
    assert not is_constant(product.inputs[0])
    folded = constant_array(product.inputs[1])
    assert folded.dtype == np.float32
    assert np.array_equal(folded, np.arange(24, dtype=np.float32).reshape(4, 6).T)
