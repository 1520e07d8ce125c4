from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_corpus import CORPUS, Case, run_model

from trtforge.converter.casts import apply_plan
from trtforge.converter.cleanup import clean
from trtforge.converter.identity import identify
from trtforge.converter.overflow import MARGIN, overflow_rules
from trtforge.converter.probes import Probe, measure
from trtforge.runtime.graph import all_graphs, load_graph, save_graph
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.validation.emulate import emulate

FP16 = PrecisionPlan("fp16")


def model_of(text: str, *, opset: int = 23, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for graph in all_graphs(model):
        for node in graph:
            node.name = f"{node.op_type}/{node.outputs[0].name}"
    return model


def kept(model: ir.Model, x: Any, **more: Any) -> dict[str, str]:
    rules = overflow_rules(model, [{"x": np.asarray(x, np.float32), **more}], FP16)
    assert {(rule.precision, rule.origin) for rule in rules} <= {("fp32", "overflow")}
    return {str(rule.id): rule.reason for rule in rules}


def test_a_large_activation_keeps_its_producer_and_its_consumers() -> None:
    text = "g (float[n] x) => (float[n] y) { a = Relu(x) b = Mul(a, k) c = Neg(b) d = Mul(c, s) y = Exp(d) }"
    model = model_of(text, k=np.float32(1000), s=np.float32(1e-6))
    found = kept(model, [1, 200])
    assert found == {
        "Mul/b": "its output b reaches 200000 on the samples, fp16 ends at 65504",
        "Neg/c": "its input b reaches 200000 on the samples, fp16 ends at 65504",
        "Mul/d": "its input c reaches 200000 on the samples, fp16 ends at 65504",
    }
    assert kept(model, [1, 20]) == {}


def test_tensors_that_vanish_are_kept_too() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { a = Mul(x, k) y = Mul(a, big) }", k=np.float32(1e-5),
                     big=np.float32(1e4))  # fmt: skip
    assert kept(model, [1]) == {
        "Mul/a": "its output a is at most 1e-05 on the samples, fp16 loses digits below 6.1e-05",
        "Mul/y": "its input a is at most 1e-05 on the samples, fp16 loses digits below 6.1e-05",
    }
    assert kept(model, [100]) == kept(model, [0]) == {}
    # A layer scale that has not been trained: the sum does not miss it.
    residual = model_of("g (float[n] x) => (float[n] y) { a = Mul(x, k) y = Add(a, x) }", k=np.float32(1e-6))
    assert kept(residual, [1]) == {}


def test_the_margin_is_for_inputs_that_were_not_sampled() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    feeds = [{"x": np.array([40000], np.float32)}]
    assert MARGIN == 2
    assert len(overflow_rules(model, feeds, FP16)) == 1
    assert overflow_rules(model, feeds, FP16, margin=1.0) == ()


def test_the_first_and_last_of_each_shape_count_with_few_rows() -> None:
    def found(*samples: Any, text: str = "g (float[n,k] x) => (float[n,k] y) { y = Neg(x) }") -> int:
        feeds = [{"x": np.array(sample, np.float32)} for sample in samples]
        return len(overflow_rules(model_of(text), feeds, FP16))

    assert found([[1]], [[1e6]]) == found([[1e6]], [[1]], [[1]]) == 1
    assert found([[1]], [[1e6, 1]], [[1]]) == 1  # a shape of its own
    assert found([[1]], [[1e6], [1]]) == 1
    assert found([[1]], [[1], [1e6]]) == 0  # the second row of a batch
    assert found([[1]], [[1], [1e6]], text="g (float[?,k] x) => (float[?,k] y) { y = Neg(x) }") == 1


def test_a_leading_dimension_that_is_no_batch_is_left_whole() -> None:
    """Rows that refer to each other: cut to the smallest sample's, the second sample would point outside."""
    model = model_of("g (float[n] x, int64[n] to) => (float[n] y) { y = Gather(x, to) }")
    samples = [{"x": np.ones(size, np.float32), "to": np.arange(size)[::-1].copy()} for size in (2, 4)]
    samples[1]["x"][2] = 1e6
    assert [rule.id for rule in overflow_rules(model, samples, FP16)] == ["Gather/y"]


def test_nothing_is_measured_where_nothing_runs_in_fp16() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    feeds = [{"wrong": np.array([40000], np.float32)}]  # onnxruntime would refuse it
    for plan in (PrecisionPlan("fp32"), PrecisionPlan("bf16"), PrecisionPlan("fp16", (Rule("bf16", op="Neg"),))):
        assert overflow_rules(model, feeds, plan) == ()
    assert len(overflow_rules(model, [{"x": np.array([1e6], np.float32)}], PrecisionPlan("int8"))) == 1  # base: fp16


LAYER_NORM = "g (float[n,8] x) => (float[n,8] y) { y = LayerNormalization(x, w) }"
RAMP = np.linspace(-1, 1, 8)[None]


@pytest.mark.parametrize(
    ("text", "small", "large", "reason"),
    [
        (LAYER_NORM, 100 * RAMP, 300 * RAMP, "the square of its centred input reaches 90000"),
        (LAYER_NORM, 100 * RAMP + 5000, 300 * RAMP + 5000, "the square of its centred input reaches 90000"),
        ("g (float[n,8] x) => (float[n,8] y) { y = RMSNormalization(x, w) }", 100 * RAMP, 300 * RAMP,
         "the square of its input reaches 90000"),
        ("g (float[n,1,2,4] x) => (float[n,1,2,4] y) { y = InstanceNormalization(x, one, one) }",
         100 * RAMP.reshape(1, 1, 2, 4), 300 * RAMP.reshape(1, 1, 2, 4), "centred input reaches 90000"),
        ("g (float[n,8,1] x) => (float[n,8,1] y) { y = GroupNormalization<num_groups = 2>(x, w, w) }",
         100 * RAMP.reshape(1, 8, 1), 300 * RAMP.reshape(1, 8, 1), "the square of its input reaches 90000"),
        ("g (float[n,8] x) => (float[n,1] y) { y = ReduceL2(x, last) }", np.full((1, 8), 50), np.full((1, 8), 100),
         "the sum of squares of its input reaches 80000"),
        ("g (float[n,8] x) => (float[n,8] y) { y = LpNormalization(x) }", np.full((1, 8), 50), np.full((1, 8), 100),
         "the sum of squares of its input reaches 80000"),
        ("g (float[n,8] x) => (float[n,1] y) { y = ReduceSumSquare(x, last) }", np.full((1, 8), 50),
         np.full((1, 8), 100), "its output y reaches 80000"),
        ("g (float[n,8] x) => (float[n,1] y) { y = ReduceMean(x, last) }", np.full((1, 8), 1000),
         np.full((1, 8), 10000), "the sum of its input reaches 80000"),
        ("g (float[n,1,2,4] x) => (float[n,1,1,1] y) { y = GlobalAveragePool(x) }", np.full((1, 1, 2, 4), 1000),
         np.full((1, 1, 2, 4), 10000), "the sum of its input reaches 80000"),
        ("g (float[n,8] x) => (float[n,1] y) { y = ReduceLogSumExp(x, last) }", np.full((1, 8), 5.0),
         np.full((1, 8), 10.0), "the sum of its exponentials"),
        ("g (float[n,8] x) => (float[n,8] y) { y = LogSoftmax(x) }", 3 * RAMP, 10 * RAMP,
         "one over its smallest probability"),
        ("g (float[n,8] x) => (float[n,8] y) { two = Constant<value_float = 2.0>() y = Pow(x, two) }", 100 * RAMP,
         300 * RAMP, "its output y reaches 90000"),
        ("""g (float[n,1,2,4] x) => (float[n,1,2,4] y) { k = Neg(x) y = Attention(x, k, k) }""",
         np.full((1, 1, 2, 4), 10), np.full((1, 1, 2, 4), 200), "a bound on its scores reaches 80000"),
    ],
)  # fmt: skip
def test_what_overflows_inside_an_operator(text: str, small: Any, large: Any, reason: str) -> None:
    weights = {"w": np.ones(8, np.float32), "one": np.ones(1, np.float32), "last": np.array([-1], np.int64)}
    model = model_of(text, **{name: array for name, array in weights.items() if name in text})
    assert kept(model, small) == {}
    (found,) = [why for why in kept(model, large).values() if reason in why]
    assert "fp16 ends at" in found


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_old_operator_sets(opset: int) -> None:
    model = model_of("g (float[n,8] x) => (float[n,1] y) { y = ReduceMean<axes = [1]>(x) }", opset=opset)
    assert kept(model, np.full((1, 8), 1000)) == {}
    assert list(kept(model, np.full((1, 8), 10000))) == ["ReduceMean/y"]


def test_masked_scores_and_infinities_do_not_count() -> None:
    text = """g (float[n,4] x, bool[n,4] m) => (float[n,4] y) {
        c = Where(m, zero, low) a = Add(x, c) y = Softmax(a) }"""
    m = np.array([[True, True, False, False]])
    for low in (np.finfo(np.float32).min, -np.inf, -1e9):
        model = model_of(text, zero=np.float32(0), low=np.float32(low))
        assert kept(model, np.ones((1, 4)), m=m) == {}
    model = model_of(text.replace("Softmax", "Relu"), zero=np.float32(0), low=np.float32(-1e9))
    assert list(kept(model, np.ones((1, 4)), m=m)) == ["Add/a", "Relu/y"]


def test_finite_values_beside_infinite_ones_count() -> None:
    text = "g (float[n] x) => (float[n] y) { a = Where(c, x, low) y = Neg(a) }"
    model = model_of(text, c=np.array([True, False]), low=np.float32(-np.inf))
    assert kept(model, [1, 1]) == {}
    assert "reaches 70000" in kept(model, [70000, 1])["Neg/y"]


BODIES = """g (float[n] x, bool c, int64 trips) => (float[n] y) {
    y = Loop(trips, , x)<body = l (int64 i, bool k, float[n] a) => (bool o, float[n] b) {
        o = Identity(k)
        b = If(c)<then_branch = t () => (float[n] d) { big = Mul(a, ten) d = Neg(big) },
                  else_branch = e () => (float[n] f) { f = Abs(a) }> }> }"""


def test_bodies_are_measured() -> None:
    model = model_of(BODIES, ten=np.float32(10))
    yes, no, trips = np.array(True), np.array(False), np.array(3)
    assert kept(model, [10], c=yes, trips=trips) == {}
    found = kept(model, [100], c=yes, trips=trips)  # 100, 1000, 10000 come in; 100000 comes out
    assert {"Mul/big", "Neg/d"} <= set(found)
    assert found["Mul/big"] == "its output big reaches 100000 on the samples, fp16 ends at 65504"
    assert kept(model, [100], c=no, trips=trips) == {}
    assert kept(model, [100], c=yes, trips=np.array(0)) == {}


def test_scan_bodies_are_measured() -> None:
    text = """g (float[n] x, float[5,n] s) => (float[n] y, float[5,n] o) {
        y, o = Scan<num_scan_inputs = 1, body = b (float[n] a, float[n] e) => (float[n] d, float[n] f) {
            d = Add(a, e) f = Mul(d, k) }>(x, s) }"""
    model = model_of(text, k=np.float32(1000))
    assert kept(model, [1], s=np.ones((5, 1), np.float32)) == {}
    found = kept(model, [1], s=np.full((5, 1), 20, np.float32))
    assert found["Mul/f"] == "its output f reaches 101000 on the samples, fp16 ends at 65504"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_probes_see_what_numpy_sees(rows: list[list[float]]) -> None:
    model = model_of("g (float[n,3] x) => (float[n,3] y) { y = Neg(x) }")
    value = model.graph.inputs[0]
    probes = [Probe(value), Probe(value, "max"), Probe(value, "centred", (1,)), Probe(value, "sum", (0,))]
    probes.append(Probe(value, "norm"))
    samples = [{"x": np.array([row], np.float32)} for row in rows]
    seen = measure(model, [*probes, probes[0]], samples)
    x = np.array(rows, np.float64)
    centred = np.abs(x - x.mean(1, keepdims=True)).max()
    expected = [np.abs(x).max(), x.max(), centred, np.abs(x).max(), np.linalg.norm(x, axis=1).max()]
    np.testing.assert_allclose([seen[probe] for probe in probes], expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_measuring_leaves_the_model_as_it_is(case: Case) -> None:
    model = case.ir()
    clean(model)
    identify(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    overflow_rules(model, [case.feeds(2), case.feeds(3)], FP16)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_guard_saves_a_layer_norm_in_parts(tmp_path: Path) -> None:
    case = next(case for case in CORPUS if case.name == "layer_norm")
    model = case.ir()
    clean(model)
    identify(model)
    reference = save_graph(model, tmp_path / "reference.onnx")
    feeds = case.feeds(2)
    expected = case.expected(2)["y"]

    def error(plan: PrecisionPlan) -> float:
        graph = load_graph(reference.path)
        apply_plan(graph, plan, graph=reference.hash)
        return float(np.abs(run_model(emulate(graph), feeds)["y"] - expected).max())

    rules = overflow_rules(reference, [feeds], FP16)
    assert error(FP16) > 0.5  # everything divided by infinity
    assert error(FP16.with_rules(rules, graph=reference.hash)) < 0.005
    assert {node.name for node in model.graph if node.op_type == "Pow"} <= {rule.id for rule in rules}


def test_external_weights_are_found(tmp_path: Path) -> None:
    model = model_of("g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }", w=np.full((4, 4), 1e4, np.float32))
    path = tmp_path / "m.onnx"
    ir.save(model, path, external_data="m.onnx.data", size_threshold_bytes=0)
    external = load_graph(path)
    assert isinstance(external.graph.initializers["w"].const_value, ir.ExternalTensor)
    from trtforge.runtime.graph import describe_model

    rules = overflow_rules(describe_model(external, path), [{"x": np.full((1, 4), 10, np.float32)}], FP16)
    assert [rule.reason for rule in rules] == ["its output y reaches 400000 on the samples, fp16 ends at 65504"]
