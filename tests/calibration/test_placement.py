from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.placement import Placement, QuantizedWeight, Use, quantizable_tensors
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.precision import PrecisionPlan, Rule

INT8 = PrecisionPlan(default="int8")
Parse = Callable[..., ir.Model]


def uses(placement: Placement) -> dict[str, list[str]]:
    """`{tensor: ["node.index", …]}` of the activations."""
    return {tensor.name: [f"{use.node}.{use.index}" for use in tensor.uses] for tensor in placement.tensors}


def axes(placement: Placement) -> dict[str, int | None]:
    return {f"{use.node}.{use.index}": weight.axis for weight in placement.weights for use in weight.uses}


def test_inputs_of_weighted_operators_and_not_their_outputs(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,3,8,8] x) => (float[N,10] y) {
            c = Conv<pads=[1,1,1,1]>(x, w, b)
            n = BatchNormalization(c, s, b, b, s)
            r = Relu(n)
            d = ConvTranspose(r, wt)
            g = GlobalAveragePool(d)
            f = Flatten(g)
            h = Gemm<transB=1>(f, wg, bg)
            y = MatMul(h, wm)
        }""",
        {
            "w": (4, 3, 3, 3),
            "b": (4,),
            "s": np.ones(4, np.float32),
            "wt": (4, 6, 3, 3),
            "wg": (8, 6),
            "bg": (8,),
            "wm": (8, 10),
        },
    )
    placement = quantizable_tensors(model, INT8)
    assert uses(placement) == {
        "x": ["Conv#0.0"], "r": ["ConvTranspose#0.0"], "f": ["Gemm#0.0"], "h": ["MatMul#0.0"],
    }  # fmt: skip
    assert axes(placement) == {"Conv#0.1": 0, "ConvTranspose#0.1": 1, "Gemm#0.1": 0, "MatMul#0.1": 1}
    # The range of what Flatten makes is the range of what it reads.
    assert placement.measured == ("x", "r", "g", "h")


def test_one_pair_for_a_tensor_of_many_readers_and_one_for_each_format(parse_graph: Parse) -> None:
    model = parse_graph(
        "(float[N,4] x) => (float[N,4] y, float[N,4] z, float[N,4] r, float[N,4] f)"
        "{ y = MatMul(x, a) z = MatMul(x, b) r = Relu(x) f = MatMul(x, b) }",
        {"a": (4, 4), "b": (4, 4)},
    )
    plan = INT8.with_rules([Rule("fp8", id="MatMul#2")])
    placement = quantizable_tensors(model, plan)
    assert [(tensor.name, tensor.format, len(tensor.uses)) for tensor in placement.tensors] == [
        ("x", "int8", 2),
        ("x", "fp8", 1),
    ]
    assert placement.measured == ("x",)
    assert QuantizedWeight("b", "int8", 1, (Use("MatMul#1", 1),)) in placement.weights
    assert QuantizedWeight("b", "fp8", 1, (Use("MatMul#2", 1),)) in placement.weights


def test_the_skip_branch_of_a_residual_add(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,4,8,8] x) => (float[N,4,8,8] y) {
            a = Conv<pads=[1,1,1,1]>(x, w1)
            b = Relu(a)
            c = Conv<pads=[1,1,1,1]>(b, w2)
            d = Add(c, x)
            e = Relu(d)
            f = Conv<pads=[1,1,1,1]>(e, w3)
            g = Conv(e, w4)
            h = Add(g, f)
            y = Relu(h)
        }""",
        {"w1": (4, 4, 3, 3), "w2": (4, 4, 3, 3), "w3": (4, 4, 3, 3), "w4": (4, 4, 1, 1)},
    )
    found = uses(quantizable_tensors(model, INT8))
    # x feeds the first Conv and skips to the Add: one pair. Of two branches of one length the first input is the main.
    assert found == {"x": ["Conv#0.0", "Add#0.1"], "b": ["Conv#1.0"], "e": ["Conv#2.0", "Conv#3.0"], "f": ["Add#1.1"]}


def test_the_longer_branch_fuses_with_the_add(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,4,8,8] x) => (float[N,4,8,8] y) {
            s = Conv(x, w4)
            a = Conv<pads=[1,1,1,1]>(x, w1)
            b = Relu(a)
            c = Conv<pads=[1,1,1,1]>(b, w2)
            y = Add(s, c)
        }""",
        {"w1": (4, 4, 3, 3), "w2": (4, 4, 3, 3), "w4": (4, 4, 1, 1)},
    )
    assert uses(quantizable_tensors(model, INT8))["s"] == ["Add#0.0"]


@pytest.mark.parametrize(
    "add",
    [
        "r = Relu(c) y = Add(r, x)",  # not linear up to the Add
        "y = Add(c, c)",
        "p = GlobalAveragePool(x) y = Add(c, p)",  # broadcast: no residual
        "y0 = Add(c, x) y = Add(y0, c)",  # two read the convolution
        "y = Add(c, k)",  # a bias
    ],
)
def test_other_adds_stay_in_float(parse_graph: Parse, add: str) -> None:
    model = parse_graph(
        f"(float[N,4,8,8] x) => (float[N,4,8,8] y) {{ c = Conv(x, w) {add} }}", {"w": (4, 4, 1, 1), "k": (1, 4, 1, 1)}
    )
    assert uses(quantizable_tensors(model, INT8)) == {"x": ["Conv#0.0"]}


def test_a_rule_takes_the_skip_branch_out(parse_graph: Parse) -> None:
    text = "(float[N,4,8,8] x) => (float[N,4,8,8] y) { c = Conv(x, w) y = Add(c, x) }"
    model = parse_graph(text, {"w": (4, 4, 1, 1)})
    assert uses(quantizable_tensors(model, INT8)) == {"x": ["Conv#0.0", "Add#0.1"]}
    for rule in (Rule("fp16", op="Add"), Rule("fp16", op="Conv")):
        left = uses(quantizable_tensors(model, INT8.with_rules([rule])))
        assert left == ({"x": ["Conv#0.0"]} if rule.op == "Add" else {})


def test_pooling_takes_the_range_of_what_it_pools_where_that_is_quantized(parse_graph: Parse) -> None:
    text = """(float[N,4,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z) {{
        r = Relu(x)
        p = MaxPool<kernel_shape=[3,3]>(r)
        y = Conv(p, w)
        {other}
    }}"""
    shared = parse_graph(text.format(other="z = Conv(r, w3)"), {"w": (4, 4, 1, 1), "w3": (4, 4, 3, 3)})
    assert quantizable_tensors(shared, INT8).measured == ("r",)
    alone = parse_graph(text.format(other="z = AveragePool<kernel_shape=[3,3]>(r)"), {"w": (4, 4, 1, 1)})
    assert quantizable_tensors(alone, INT8).measured == ("p",)


def test_attention_is_optional(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,2,8,4] q, float[N,2,8,4] k, float[N,2,8,4] v) => (float[N,2,8,4] y) {
            t = Transpose<perm=[0,1,3,2]>(k)
            s = MatMul(q, t)
            p = Softmax(s)
            y = MatMul(p, v)
        }""",
        {},
    )
    placement = quantizable_tensors(model, INT8)
    assert list(uses(placement)) == ["q", "t", "p", "v"]
    assert placement.measured == ("q", "k", "p", "v")
    without = quantizable_tensors(model, INT8, attention=False)
    assert without.tensors == ()
    assert [skipped.node for skipped in without.skipped] == ["MatMul#0", "MatMul#1"]


def test_weights_behind_layout_changes_and_weights_on_the_left(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,4] x, float[4,M] z) => (float[N,6] y, float[5,M] l, float[M,3] g) {
            t = Transpose<perm=[1,0]>(w)
            y = MatMul(x, t)
            l = MatMul(left, z)
            g = Gemm<transA=1>(z, wg)
        }""",
        {"w": (6, 4), "left": (5, 4), "wg": (4, 3)},
    )
    placement = quantizable_tensors(model, INT8)
    assert axes(placement) == {"MatMul#0.1": 1, "MatMul#1.0": 0, "Gemm#0.1": 1}


def test_one_weight_along_two_axes_is_two_weights(parse_graph: Parse) -> None:
    model = parse_graph(
        "(float[N,4] x) => (float[N,4] a, float[N,4] b) { a = Gemm(x, w) b = Gemm<transB=1>(x, w) }", {"w": (4, 4)}
    )
    assert [(weight.name, weight.axis) for weight in quantizable_tensors(model, INT8).weights] == [("w", 1), ("w", 0)]


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        ("(float[1,M] x) => (float[4,M] y) { y = MatMul(w, x) }", {"w": (4, 1)}, "outer product"),
        ("(float[N,4] x) => (float[N] y) { y = MatMul(x, w) }", {"w": (4,)}, "vector"),
        (
            "(float[N,4] x) => (float[N,4] y) { c = MatMul(a, w) y = Add(x, c) }",
            {"a": (1, 4), "w": (4, 4)},
            "constants",
        ),
        ("(int32[N,4] x) => (int32[N,4] y) { y = MatMul(x, w) }", {"w": np.ones((4, 4), np.int32)}, "not float"),
        ("(double[N,4] x) => (double[N,4] y) { y = MatMul(x, w) }", {"w": np.ones((4, 4))}, "not float"),
    ],
)
def test_what_is_left_in_float_says_why(parse_graph: Parse, text: str, weights: dict, reason: str) -> None:
    placement = quantizable_tensors(parse_graph(text, weights), INT8)
    assert (placement.tensors, placement.weights) == ((), ())
    (skipped,) = placement.skipped
    assert reason in skipped.reason


def test_bodies_stay_in_float(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,4] x, bool c) => (float[N,4] y) {
            y = If(c) <then_branch = t () => (float[N,4] a) { a = MatMul(x, w) },
                       else_branch = e () => (float[N,4] b) { b = Relu(x) }>
        }""",
        {"w": (4, 4)},
    )
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = node.name or f"inner{index}"
    placement = quantizable_tensors(model, INT8)
    assert placement.nodes == ()
    assert [skipped.reason for skipped in placement.skipped] == ["it is inside the body of an If, Loop or Scan"]


def test_a_dynamic_weight_is_an_activation(parse_graph: Parse) -> None:
    model = parse_graph("(float[2,4,8,8] x, float[8,4,3,3] k) => (float[2,8,6,6] y) { y = Conv(x, k) }", {})
    assert uses(quantizable_tensors(model, INT8)) == {"x": ["Conv#0.0"], "k": ["Conv#0.1"]}


def test_a_rule_that_can_quantize_nothing_is_an_error(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { h = MatMul(x, w) y = Softmax(h) }", {"w": (4, 4)})
    plan = PrecisionPlan(default="fp16", rules=(Rule("int8", op="Softmax"),))
    with pytest.raises(ConfigError, match="quantizes nothing"):
        quantizable_tensors(model, plan)
    assert quantizable_tensors(model, PrecisionPlan(default="fp16", rules=(Rule("int8", op="*M*"),))).nodes == (
        "MatMul#0",
    )


def test_a_model_with_qdq_is_left_alone(parse_graph: Parse) -> None:
    model = parse_graph(
        """(float[N,4] x) => (float[N,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            h = MatMul(d, w)
            y = MatMul(h, w)
        }""",
        {"w": (4, 4), "s": np.array(0.1, np.float32), "z": np.array(0, np.int8)},
    )
    assert quantizable_tensors(model, INT8) == Placement(existing=1)


def test_nodes_without_ids_are_refused(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { h = MatMul(x, w) y = Relu(h) }", {"w": (4, 4)})
    model.graph[0].name = model.graph[1].name = "same"
    with pytest.raises(CalibrationError, match="same"):
        quantizable_tensors(model, INT8)


def test_without_takes_nodes_and_what_only_they_read(parse_graph: Parse) -> None:
    model = parse_graph(
        "(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = MatMul(x, a) h = Relu(x) z = MatMul(h, a) }",
        {"a": (4, 4)},
    )
    placement = quantizable_tensors(model, INT8).without({"MatMul#0"})
    assert uses(placement) == {"h": ["MatMul#1.0"]}
    assert placement.nodes == ("MatMul#1",)
    assert [len(weight.uses) for weight in placement.weights] == [1]
