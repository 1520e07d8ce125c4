from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_corpus import CORPUS, Case, run_model

from trtforge.converter.assign import Decision
from trtforge.converter.casts import apply_plan
from trtforge.converter.cleanup import clean
from trtforge.converter.identity import identify
from trtforge.converter.overflow import overflow_rules
from trtforge.converter.types import check_types
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.graph import META_ORIGIN, all_graphs, graph_hash, node_refs, tensor_specs
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.validation.emulate import emulate

F32, F16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
# Largest error over the largest value: the types' spacing (2^-11 and 2^-8) through a few operators.
CLOSE = {"fp32": 0.0, "tf32": 0.0, "fp16": 0.01, "bf16": 0.08, "int8": 0.01, "fp8": 0.01}


def reference(case: Case) -> ir.Model:
    model = case.ir()
    clean(model)
    identify(model)
    return model


def model_of(text: str, *, opset: int = 23, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}#{index}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def nodes(model: ir.Model, op: str | None = None) -> list[ir.Node]:
    return [node for graph in all_graphs(model) for node in graph if op in (None, node.op_type)]


def inserted(model: ir.Model) -> list[ir.Node]:
    return [node for node in nodes(model) if META_ORIGIN in node.metadata_props]


def by_op(decisions: list[Decision]) -> dict[str, Decision]:
    return {decision.op: decision for decision in decisions}


def bytes_of(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def assert_close(got: Mapping[str, Any], expected: Mapping[str, Any], share: float) -> None:
    assert list(got) == list(expected)
    for name, want in expected.items():
        have = got[name].astype(np.float64)
        assert got[name].shape == want.shape
        assert np.isfinite(have).all()
        scale = max(np.abs(want.astype(np.float64)).max(initial=0), 1e-6)
        assert np.abs(have - want.astype(np.float64)).max(initial=0) <= share * scale, name


def assert_sound(case: Case, plan: PrecisionPlan, share: float) -> None:
    """The property of every plan: valid, consistent types, ids and interface kept, idempotent, results close."""
    model = reference(case)
    ids, interface = [node.id for node in node_refs(model)], tensor_specs([*model.graph.inputs, *model.graph.outputs])
    feeds = case.feeds(2)
    expected = run_model(model, feeds)
    guarded = plan.with_rules(overflow_rules(model, [feeds], plan))
    decisions = apply_plan(model, guarded)
    check_types(model)
    assert [node.id for node in node_refs(model)] == ids
    assert tensor_specs([*model.graph.inputs, *model.graph.outputs]) == interface
    assert {decision.id for decision in decisions} <= set(ids)
    names = [node.name for node in nodes(model)]
    assert len(names) == len(set(names))
    emulated = emulate(model)
    check_types(emulated)
    assert_close(run_model(emulated, feeds), expected, share)
    once = bytes_of(model)
    apply_plan(model, guarded)
    assert bytes_of(model) == once


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_a_plan_of_one_precision_is_sound_on_the_corpus(case: Case, precision: Any) -> None:
    assert_sound(case, PrecisionPlan(precision), CLOSE[precision])


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_a_float32_plan_changes_nothing(case: Case, precision: Any) -> None:
    model = reference(case)
    apply_plan(model, PrecisionPlan())  # the same, but for missing types that are filled in
    before = bytes_of(model)
    decisions = apply_plan(model, PrecisionPlan(precision))
    assert bytes_of(model) == before
    assert {decision.precision for decision in decisions} <= {precision}


@st.composite
def plans(draw: st.DrawFn) -> tuple[Case, PrecisionPlan]:
    case = draw(st.sampled_from(CORPUS))
    refs = node_refs(reference(case))
    precision = st.sampled_from(["fp32", "tf32", "fp16", "bf16", "int8"])
    by_id = st.builds(lambda ref, p: Rule(p, id=ref.id), st.sampled_from(refs), precision)
    by_type = st.builds(lambda ref, p: Rule(p, op=ref.op), st.sampled_from(refs), precision)
    rules = tuple(draw(st.lists(st.one_of(by_id, by_type), max_size=6)))
    return case, PrecisionPlan(draw(precision), rules, base=draw(st.sampled_from(["fp32", "fp16", "bf16"])))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_any_plan_is_sound_on_the_corpus(choice: tuple[Case, PrecisionPlan]) -> None:
    case, plan = choice
    assert_sound(case, plan, 0.1)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_inputs_and_outputs_take_the_plan_s_type_where_asked(case: Case, precision: Any) -> None:
    model = reference(case)
    kinds = [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)]
    plan = PrecisionPlan(precision, keep_io=False)
    if precision == "bf16" and model.graph.opset_imports[""] < 13:
        with pytest.raises(ConfigError, match="at opset 11"):
            apply_plan(model, plan)
        return
    apply_plan(model, plan)
    check_types(model)
    low = {"fp16": F16, "bf16": BF16}[precision]
    assert [value.dtype for value in (*model.graph.inputs, *model.graph.outputs)] == [
        low if kind == F32 else kind for kind in kinds
    ]


def test_casts_stand_at_boundaries_only_and_are_shared() -> None:
    model = model_of(
        "g (float[n,4] x) => (float[n,4] y) { a = Relu(x) b = Exp(a) c = Tanh(a) d = Add(b, c) y = Softmax(d) }"
    )
    apply_plan(model, PrecisionPlan("fp16", (Rule("fp32", op="Exp"), Rule("fp32", op="Tanh"))))
    casts = inserted(model)
    # x to fp16; a to fp32 once for both; b and c to fp16; y back.
    assert sorted(cast.inputs[0].name for cast in casts) == ["a", "b", "c", "x", "y_fp16"]
    assert [cast.metadata_props[META_ORIGIN] for cast in casts] == ["precision"] * 5
    assert [cast.name for cast in casts] == ["x/Cast_fp16", "a/Cast_fp32", "b/Cast_fp16", "c/Cast_fp16", "y/Cast_fp32"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_a_weight_is_converted_once_and_keeps_its_name() -> None:
    w = np.eye(4, dtype=np.float32)
    model = model_of("g (float[n,4] x) => (float[n,4] y) { a = MatMul(x, w) y = MatMul(a, w) }", w=w)
    apply_plan(model, PrecisionPlan("fp16"))
    assert [(value.name, value.dtype) for value in model.graph.initializers.values()] == [("w", F16)]
    mixed = model_of("g (float[n,4] x) => (float[n,4] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }", w=w)
    apply_plan(mixed, PrecisionPlan("fp16", (Rule("fp32", id="MatMul#0"),)))
    assert {value.name: value.dtype for value in mixed.graph.initializers.values()} == {"w": F32, "w_fp16": F16}
    halves = model_of("g (float[n,4] x) => (float[n,4] y) { a = MatMul(x, w) y = MatMul(a, w) }", w=w)
    apply_plan(halves, PrecisionPlan("fp16", (Rule("bf16", id="MatMul#0"),)))
    assert {value.name: value.dtype for value in halves.graph.initializers.values()} == {"w_bf16": BF16, "w_fp16": F16}


def test_a_weight_that_callers_may_override_is_cast_instead() -> None:
    case = next(case for case in CORPUS if case.name == "initializers_in_inputs")
    model = case.ir()
    apply_plan(model, PrecisionPlan("fp16"))
    assert model.graph.initializers["w"].dtype == F32
    check_types(model)


def test_a_weight_beyond_the_range_keeps_its_node() -> None:
    big = np.array([[1e5, 1], [1, 1]], np.float32)
    text = "g (float[n,2] x) => (float[n,2] y) { a = MatMul(x, w) y = Relu(a) }"
    model = model_of(text, w=big)
    decisions = by_op(apply_plan(model, PrecisionPlan("fp16")))
    assert (decisions["MatMul"].precision, decisions["MatMul"].origin) == ("fp32", "overflow")
    assert decisions["MatMul"].reason == "its constant w reaches 100000, fp16 ends at 65504"
    assert decisions["Relu"].precision == "fp16"
    assert model.graph.initializers["w"].dtype == F32
    assert by_op(apply_plan(model_of(text, w=big), PrecisionPlan("bf16")))["MatMul"].precision == "bf16"
    infinite = np.array([[-np.inf, 1], [1, np.nan]], np.float32)
    assert by_op(apply_plan(model_of(text, w=infinite), PrecisionPlan("fp16")))["MatMul"].precision == "fp16"


def test_a_constant_that_would_vanish_keeps_its_node() -> None:
    text = "g (float[n] x) => (float[n] y) { a = Add(x, eps) y = Sqrt(a) }"
    decisions = by_op(apply_plan(model_of(text, eps=np.float32(1e-12)), PrecisionPlan("fp16")))
    assert decisions["Add"].reason == "its constant eps is at most 1e-12, fp16 has no digits below 2.38e-07"
    for eps, precision in ((1e-6, "fp16"), (0.0, "fp16"), (1e-12, "bf16")):
        plan = PrecisionPlan(precision)  # type: ignore[arg-type]
        assert by_op(apply_plan(model_of(text, eps=np.float32(eps)), plan))["Add"].precision == precision


@pytest.mark.parametrize(
    ("text", "op"),
    [
        ("y = Gemm(x, w, b)", "Gemm"),
        ("m = MatMul(x, w) y = Add(m, b)", "Add"),
        ("m = MatMul(x, w) y = Add(b, m)", "Add"),
    ],
)
def test_a_bias_that_vanishes_does_not(text: str, op: str) -> None:
    weight, bias = np.eye(2, dtype=np.float32), np.full(2, 1e-8, np.float32)
    model = model_of(f"g (float[n,2] x) => (float[n,2] y) {{ {text} }}", w=weight, b=bias)
    assert by_op(apply_plan(model, PrecisionPlan("fp16")))[op].precision == "fp16"
    x = np.array([[1, 6e-8]], np.float32)  # half precision's smallest number is no coarser
    np.testing.assert_allclose(run_model(model, {"x": x})["y"], x + bias, atol=6e-8)


def test_a_division_that_only_a_vanishing_constant_saves_keeps_to_float32() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { r = ReduceL2(x, axes) c = Clip(r, eps) s = Shape(x) e = Expand(c, s) y = Div(x, e) }"  # noqa: E501
    for eps, precision in ((1e-12, "fp32"), (1e-3, "fp16")):
        model = model_of(text, axes=np.array([1]), eps=np.float32(eps))
        decisions = by_op(apply_plan(model, PrecisionPlan("fp16")))
        assert {decisions[op].precision for op in ("Clip", "Expand", "Div")} == {precision}
        assert decisions["ReduceL2"].precision == "fp16"
        check_types(model)
        zero = run_model(model, {"x": np.zeros((1, 4), np.float32)})["y"]
        assert (zero == 0).all()  # in half precision with 1e-12 it was 0 / 0


def test_a_logarithm_that_only_a_vanishing_constant_saves_keeps_to_float32() -> None:
    text = "g (float[n] x) => (float[n] y) { p = Mul(x, x) a = Add(p, eps) y = Log(a) }"
    for eps, precision in ((1e-10, "fp32"), (1e-3, "fp16")):
        model = model_of(text, eps=np.float32(eps))
        decisions = by_op(apply_plan(model, PrecisionPlan("fp16")))
        assert {decisions[op].precision for op in ("Add", "Log")} == {precision}
        silence = run_model(model, {"x": np.zeros(1, np.float32)})["y"]
        np.testing.assert_allclose(silence, np.log(eps), rtol=1e-3)  # in half precision with 1e-10 it was -inf


def test_scales_below_the_normal_range_keep_their_node() -> None:
    text = "g (int8[n,2] x) => (float[n,2] y) { y = DequantizeLinear<axis = 1>(x, s) }"
    for smallest, precision in ((1e-5, "fp32"), (1e-4, "fp16")):
        model = model_of(text, s=np.array([0.1, smallest], np.float32))
        assert by_op(apply_plan(model, PrecisionPlan("fp16")))["DequantizeLinear"].precision == precision
        check_types(model)


def test_batch_norm_statistics_stay_in_float32() -> None:
    ones = np.ones(3, np.float32)
    text = "g (float[n,3,4] x) => (float[n,3,4] y) { y = BatchNormalization(x, s, b, m, v) }"
    model = model_of(text, s=ones, b=ones, m=ones, v=ones * 1e-9)
    assert by_op(apply_plan(model, PrecisionPlan("fp16")))["BatchNormalization"].precision == "fp16"
    (norm,) = nodes(model, "BatchNormalization")
    assert [value.dtype for value in norm.inputs if value is not None] == [F16, F32, F32, F32, F32]
    check_types(model)


def test_a_filler_beyond_the_range_keeps_its_node() -> None:
    text = (
        "g (float[n,2] x) => (float[n,2] y) { s = Shape(x) c = ConstantOfShape<value=float[1]{1e6}>(s) y = Add(x, c) }"
    )
    decisions = by_op(apply_plan(model_of(text), PrecisionPlan("fp16")))
    assert decisions["ConstantOfShape"].reason == "its value reaches 1e+06, fp16 ends at 65504"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_mask_of_the_lowest_float_is_cut_and_stays_finite(precision: Any) -> None:
    low = np.float32(np.finfo(np.float32).min)
    text = """g (float[n,4] s, bool[n,4] m) => (float[n,4] y) {
        c = Where(m, zero, low) a = Add(s, c) y = Softmax(a) }"""
    model = model_of(text, zero=np.float32(0), low=low)
    decisions = apply_plan(model, PrecisionPlan(precision))
    assert {decision.precision for decision in decisions} == {precision}
    cut = model.graph.initializers["low"].const_value
    assert cut is not None
    assert np.isfinite(cut.numpy().astype(np.float32))
    feeds = {"s": np.zeros((2, 4), np.float32), "m": np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)}
    y = run_model(emulate(model), feeds)["y"]
    np.testing.assert_allclose(y, [[0.5, 0.5, 0, 0], [0.25] * 4], rtol=1e-2)


def test_a_mask_made_of_integers_is_cut_where_it_is_made() -> None:
    """`(1 - mask) * lowest` is computed in float32, as positions are, and must not become infinite at the cast."""
    low = np.float32(np.finfo(np.float32).min)
    text = """g (float[n,4] s, int64[n,4] m) => (float[n,4] y) {
        f = Cast<to = 1>(m) o = Sub(one, f) c = Mul(o, low) a = Add(s, c) y = Softmax(a) }"""
    model = model_of(text, one=np.float32(1), low=low)
    decisions = by_op(apply_plan(model, PrecisionPlan("fp16")))
    assert decisions["Mul"].precision == "fp32"
    assert decisions["Add"].precision == "fp16"
    feeds = {"s": np.zeros((2, 4), np.float32), "m": np.array([[1, 1, 0, 0], [0, 0, 0, 0]])}
    np.testing.assert_allclose(run_model(emulate(model), feeds)["y"], [[0.5, 0.5, 0, 0], [0.25] * 4], rtol=1e-3)


def test_limits_are_cut_to_the_range() -> None:
    text = "g (float[n] x) => (float[n] y) { a = Clip(x, lo, hi) y = Max(a, lo) }"
    model = model_of(text, lo=np.float32(-1e30), hi=np.float32(1e9))
    assert {decision.precision for decision in apply_plan(model, PrecisionPlan("fp16"))} == {"fp16"}
    x = np.array([-7, 0, 60000], np.float32)
    assert run_model(emulate(model), {"x": x})["y"].tolist() == x.tolist()


def test_positions_stay_in_float32_up_to_the_data() -> None:
    text = """g (int64[n] p, float[n,4] x) => (float[n,4] y) {
        f = Cast<to = 1>(p) u = Unsqueeze(f, one) a = MatMul(u, freq) s = Sin(a) y = Mul(x, s) }"""
    weights = {"one": np.array([1], np.int64), "freq": np.array([[1, 0.1, 0.01, 0.001]], np.float32)}
    model = model_of(text, **weights)
    expected = model_of(text, **weights)
    decisions = by_op(apply_plan(model, PrecisionPlan("fp16")))
    assert {op for op, decision in decisions.items() if decision.precision == "fp32"} == {
        "Cast", "Unsqueeze", "MatMul", "Sin",
    }  # fmt: skip
    assert decisions["Sin"].origin == "type"
    assert "2048" in decisions["Sin"].reason
    feeds = {"p": np.array([5, 4097, 100001]), "x": np.ones((3, 4), np.float32)}
    assert_close(run_model(emulate(model), feeds), run_model(expected, feeds), 0.002)
    asked = by_op(apply_plan(model_of(text, **weights), PrecisionPlan("fp32", (Rule("fp16", op="Sin"),))))
    assert asked["Sin"].precision == "fp16"


def test_integers_float64_and_the_model_s_own_half_stay() -> None:
    text = """g (double[n] d, float16[n] h, float[n] x) => (double[n] e, float16[n] k, float[n] y, int64[1] s) {
        e = Neg(d) k = Neg(h) y = Neg(x) s = Shape(x) }"""
    model = model_of(text)
    apply_plan(model, PrecisionPlan("bf16"))
    kinds = [node.outputs[0].dtype.name for node in nodes(model, "Neg")]
    assert kinds == ["DOUBLE", "FLOAT16", "BFLOAT16"]
    (shape,) = nodes(model, "Shape")
    assert shape.inputs[0].dtype == F32  # takes what is there: no cast for it
    check_types(model)


def test_casts_of_the_model_are_retargeted_and_no_pair_is_left() -> None:
    text = "g (float16[n] h, bool[n] b) => (float[n] y) { f = Cast<to=1>(h) g = Cast<to=1>(b) y = Mul(f, g) }"
    model = model_of(text)
    apply_plan(model, PrecisionPlan("bf16"))
    assert [node.attributes["to"].as_int() for node in nodes(model, "Cast")] == [16, 16, 1]
    kept = model_of(text)
    apply_plan(kept, PrecisionPlan("fp16", (Rule("fp32", id="Cast#0"),)))
    (mul,) = nodes(kept, "Mul")
    assert mul.inputs[0].name == "h"  # up to float32 and down again would be the same tensor
    check_types(kept)


def test_slots_that_must_be_float32_stay_so() -> None:
    text = """g (float[1,1,4,4] x) => (float[1,1,8,8] y) {
        scales = Constant<value_floats = [1.0, 1.0, 2.0, 2.0]>() y = Resize<mode = "linear">(x, , scales) }"""
    model = model_of(text)
    assert by_op(apply_plan(model, PrecisionPlan("fp16")))["Resize"].precision == "fp16"
    (resize,) = nodes(model, "Resize")
    assert [value.dtype for value in resize.inputs if value is not None] == [F16, F32]
    check_types(model)


def test_attributes_follow() -> None:
    text = """g (float[n,2] x, int64[n] i) => (float[n,2] y) {
        s = Shape(x) c = ConstantOfShape(s) r = RandomNormalLike(x) l = CastLike(i, x) u = Unsqueeze(l, one)
        e = EyeLike<dtype = 1>(x) a = Sum(c, r, u, e) k = Constant<value_float = 2.0>() y = Mul(a, k) }"""
    model = model_of(text, one=np.array([1], np.int64))
    apply_plan(model, PrecisionPlan("fp16"))
    check_types(model)
    (like,), (eye,) = nodes(model, "RandomNormalLike"), nodes(model, "EyeLike")
    assert (like.attributes["dtype"].as_int(), eye.attributes["dtype"].as_int()) == (10, 10)


def test_types_that_an_operator_does_not_take_keep_it_in_fp32() -> None:
    text = "g (float[n,1,4,4] x) => (float[n,1,4,4] y) { a = Conv(x, w) b = HardSwish(a) y = Relu(b) }"
    w = np.ones((1, 1, 1, 1), np.float32)
    old = by_op(apply_plan(model_of(text, opset=20, w=w), PrecisionPlan("bf16")))
    assert (old["Conv"].origin, old["Conv"].reason) == ("type", "Conv does not take bfloat16 at opset 20")
    new = by_op(apply_plan(model_of(text, opset=23, w=w), PrecisionPlan("bf16")))
    assert new["Conv"].precision == "bf16"
    assert new["HardSwish"].reason == "TensorRT does not take HardSwish in bfloat16"
    assert by_op(apply_plan(model_of(text, opset=20, w=w), PrecisionPlan("fp16")))["HardSwish"].precision == "fp16"


def test_rules_reach_into_bodies() -> None:
    case = next(case for case in CORPUS if case.name == "nested_bodies")
    model = reference(case)
    apply_plan(model, PrecisionPlan("fp16", (Rule("fp32", op="Loop"),)))
    check_types(model)
    (loop,) = nodes(model, "Loop")
    assert loop.outputs[0].dtype == F32
    assert {node.outputs[0].dtype for node in nodes(model, "MatMul")} == {F16}


def test_ids_hold_for_the_plan_s_graph_only() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    plan = PrecisionPlan("fp32", (Rule("fp16", id="Relu#0"),), graph="a" * 64)
    with pytest.raises(ConfigError, match="belong to graph aaaaaaaaaaaa"):
        apply_plan(model, plan, graph=graph_hash(model))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_what_builds_in_fp32_builds_in_half(case: Case, precision: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds without a GPU")
    from trtforge.runtime.errors import BuildError
    from trtforge.runtime.trt.build import BuildRequest, build_engine

    def build(model: ir.Model) -> int:
        ir.save(model, tmp_path / "m.onnx")
        shapes = {name: array.shape for name, array in case.feeds(2).items()}
        overridable = [value.name for value in model.graph.inputs if value.is_initializer()]
        profile = {name: (shape, shape, shape) for name, shape in shapes.items() if name not in overridable}
        request = BuildRequest(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt-rtx", (profile,), tf32=False)
        return build_engine(request).size_bytes

    try:
        build(reference(case))
    except BuildError as error:
        pytest.skip(f"not in fp32 either: {error.what}")
    model = reference(case)
    apply_plan(model, PrecisionPlan(precision))
    assert build(model) > 0
