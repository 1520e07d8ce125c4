from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, Case

from trtforge.converter.types import check_types, infer_types, node_types
from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import META_LINE, all_graphs


def model_of(text: str, *, opset: int = 20, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items())
    model = ir.from_proto(proto)
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = f"{node.op_type}#{index}"
    infer_types(model)
    return model


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for graph in all_graphs(model) for node in graph for value in node.outputs}


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_corpus_is_consistent_and_is_not_changed_by_looking(case: Case) -> None:
    model = case.ir()
    infer_types(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    check_types(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("case", [case for case in CORPUS if case.name != "functions"], ids=str)
def test_inferred_types_are_onnx_s(case: Case) -> None:
    model = case.ir()
    infer_types(model)
    inferred = onnx.shape_inference.infer_shapes(case.make(), strict_mode=True)
    known = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert known
    ours = values_of(model)
    assert {name: int(ours[name].dtype or 0) for name in known} == known
    assert all(value.dtype is not None for value in ours.values() if value.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[n] x, float16[n] h) => (float[n] y) { y = Add(x, h) }",
         r"Add#0 \(Add\): inputs of one type T: x FLOAT, h FLOAT16"),
        ("g (float[n] x, float16[n] h) => (float[n] y) { c = Concat<axis = 0>(x, x, h) y = Relu(x) }",
         r"Concat#0 \(Concat\): inputs of one type T: x FLOAT, x FLOAT, h FLOAT16"),
        ("g (float16[n] h) => (float[n] y) { y = Relu(h) }", "gives FLOAT16 at output 'y', declared FLOAT"),
        ("g (float16[n] h) => (float[n] y) { y = Cast<to = 10>(h) }", "gives FLOAT16 at output 'y', declared FLOAT"),
        ("g (float[n] x) => (float16[n] y) { s = Shape(x) y = ConstantOfShape(s) }", "gives FLOAT at output 'y'"),
        ("g (bfloat16[1,1,4,4] x, bfloat16[1,1,1,1] w) => (bfloat16[1,1,4,4] y) { y = Conv(x, w) }",
         "input 'x' is BFLOAT16, which it does not take here"),
        ("""g (float[n] x, bool c) => (float[n] y) { y = If(c)<then_branch = t () => (float[n] a) { a = Neg(x) },
          else_branch = e () => (float16[n] b) { b = Cast<to = 10>(x) }> }""",
         "branches give output 0 as FLOAT and FLOAT16"),
        ("""g (float[n] x) => (float[n] y) { y = Loop(trips, , x)<body = l (int64 i, bool c, float[n] a) =>
          (bool d, float16[n] b) { d = Identity(c) b = Cast<to = 10>(a) }> }""",
         "carried value 0 .'a'. is FLOAT, then FLOAT, then FLOAT16"),
        ("""g (float16[n] h) => (float16[n] y) { y = Loop(trips, , h)<body = l (int64 i, bool c, float[n] a) =>
          (bool d, float[n] b) { d = Identity(c) b = Relu(a) }> }""",
         "carried value 0 .'a'. is FLOAT16, then FLOAT, then FLOAT"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_node_and_types(text: str, message: str) -> None:
    weights = {"trips": np.array(2)} if "Loop" in text else {}
    with pytest.raises(ExportError, match=message):
        check_types(model_of(text, **weights))


def test_nodes_in_bodies_are_found_with_their_line() -> None:
    model = model_of(
        "g (float[n] x, float16[n] h, bool c) => (float[n] y) { y = If(c)<then_branch = t () => (float[n] a)"
        " { a = Mul(x, h) }, else_branch = e () => (float[n] b) { b = Neg(x) }> }"
    )
    (mul,) = [node for graph in all_graphs(model) for node in graph if node.op_type == "Mul"]
    mul.metadata_props[META_LINE] = "model.py:7"
    with pytest.raises(ExportError, match=r"\(Mul, model\.py:7\): inputs of one type T: x FLOAT, h FLOAT16"):
        check_types(model)


def test_a_long_list_is_cut() -> None:
    body = " ".join(f"y{i} = Add(x, h)" for i in range(11))
    model = model_of(f"g (float[n] x, float16[n] h) => (float[n] y0) {{ {body} }}")
    with pytest.raises(ExportError, match=r"11 node\(s\)") as caught:
        check_types(model)
    assert "and 3 more" in caught.value.what


def test_an_initializer_whose_data_is_of_another_type() -> None:
    model = model_of("g (float[2] x) => (float[2] y) { y = Add(x, w) }", w=np.ones(2, np.float32))
    model.graph.initializers["w"].const_value = ir.tensor(np.ones(2, np.float16))
    with pytest.raises(ExportError, match="initializer 'w' is FLOAT16, declared FLOAT"):
        check_types(model)


def test_what_only_onnx_s_checker_sees() -> None:
    model = model_of("g (float[2,3] x) => (float[3,2] y) { y = MatMul(x, x) }")
    check_types(model, strict=False)
    with pytest.raises(ExportError, match="checker refuses") as caught:
        check_types(model)
    assert "MatMul" in caught.value.why


def test_unknown_operators_are_passed_over() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20, "mine": 1]> g (float[n] x) => (float[n] y) { y = mine.Odd(x) }'
    )
    model = ir.from_proto(proto)
    check_types(model)
    (node,) = model.graph
    assert node_types(node, model.graph.opset_imports) is None


def test_optional_and_variadic_slots_have_their_variables() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { c = Clip(x, , hi) y = Sum(c, x, x) }", hi=np.float32(1))
    clip, total = model.graph
    opsets = model.graph.opset_imports
    clip_types, sum_types = node_types(clip, opsets), node_types(total, opsets)
    assert clip_types is not None
    assert sum_types is not None
    assert (clip_types.inputs, sum_types.inputs) == (("T", "T", "T"), ("T", "T", "T"))
    assert clip_types.takes("T", ir.DataType.BFLOAT16)
    assert not clip_types.takes("T", ir.DataType.BOOL)
