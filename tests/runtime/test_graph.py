from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, Case, run_model

from trtforge.runtime import graph as graph_module
from trtforge.runtime.graph import (
    META_LINE,
    META_MODULE,
    META_ORIGIN,
    all_graphs,
    graph_hash,
    load_graph,
    node_refs,
    save_graph,
)


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [node for graph in all_graphs(model) for node in graph]


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_hash_survives_names_metadata_and_the_disk(case: Case, tmp_path: Path) -> None:
    model = case.ir()
    before = graph_hash(model)
    saved = save_graph(model, tmp_path / "model.onnx")
    assert saved.hash == before
    loaded = load_graph(saved.path)
    for number, node in enumerate(nodes_of(loaded)):
        node.name = f"other_{number}"
        node.metadata_props[META_LINE] = "net.py:7"
        for value in node.outputs:
            if value not in set(loaded.graph.outputs) and value.name:
                value.name = f"value_{value.name}"
    loaded.metadata_props["x"] = "y"
    loaded.doc_string = "another"
    assert graph_hash(loaded) == before


def change_weight(model: ir.Model) -> None:
    value = model.graph.initializers["w1"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array.flat[-1] += 1
    value.const_value = ir.tensor(array, name="w1")


def change_attribute(model: ir.Model) -> None:
    model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)


def change_operator(model: ir.Model) -> None:
    model.graph[1].op_type = "Tanh"


def change_edge(model: ir.Model) -> None:
    model.graph[2].replace_input_with(0, model.graph[0].outputs[0])


def change_input_name(model: ir.Model) -> None:
    model.graph.inputs[0].name = "other"


def change_dimension(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(["n", 8])


def change_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 21


@pytest.mark.parametrize(
    "change",
    [
        change_weight, change_attribute, change_operator, change_edge, change_input_name, change_dimension,
        change_opset,
    ],
)  # fmt: skip
def test_the_hash_follows_what_the_graph_is(change: Callable[[ir.Model], None]) -> None:
    case = next(case for case in CORPUS if case.name == "mlp")
    model = case.ir()
    change(model)
    assert graph_hash(model) != graph_hash(case.ir())


def test_the_hash_follows_bodies_and_what_they_capture() -> None:
    case = next(case for case in CORPUS if case.name == "if_body")
    other_attribute, other_edge = case.ir(), case.ir()
    body = list(all_graphs(other_attribute))[1]
    next(node for node in body if node.op_type == "Mul").op_type = "Div"
    assert graph_hash(other_attribute) != graph_hash(case.ir())
    body = list(all_graphs(other_edge))[2]
    product = next(node for node in body if node.op_type == "MatMul")
    product.replace_input_with(0, product.inputs[1])
    assert graph_hash(other_edge) != graph_hash(case.ir())


def test_all_graphs_gives_outer_before_inner() -> None:
    model = next(case for case in CORPUS if case.name == "nested_bodies").ir()
    assert [graph.name for graph in all_graphs(model)] == ["g", "loop_g", "then_g", "else_g"]


def test_node_refs_leave_out_what_passes_inserted() -> None:
    model = next(case for case in CORPUS if case.name == "mlp").ir()
    model.graph[0].metadata_props[META_MODULE] = "layers.0"
    model.graph[1].metadata_props[META_ORIGIN] = "precision"
    refs = node_refs(model)
    assert [(ref.id, ref.op, ref.module) for ref in refs] == [("n0", "Gemm", "layers.0"), ("n2", "Gemm", "")]


def test_big_models_keep_their_weights_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CORPUS if case.name == "mlp")
    whole = save_graph(case.ir(), tmp_path / "whole.onnx")
    assert whole.files == (whole.path,)
    monkeypatch.setattr(graph_module, "_SINGLE_FILE_LIMIT", 64)
    split = save_graph(case.ir(), tmp_path / "split.onnx")
    assert split.files == (split.path, tmp_path / "split.onnx.data")
    assert split.path.stat().st_size < whole.path.stat().st_size
    assert split.hash == whole.hash == graph_hash(load_graph(split.path))
    found = run_model(onnx.load(split.path), case.feeds(2))
    np.testing.assert_array_equal(found["y"], case.expected(2)["y"])


def test_external_weights_move_into_a_small_model_and_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CORPUS if case.name == "if_body")
    with monkeypatch.context() as patch:
        patch.setattr(graph_module, "_SINGLE_FILE_LIMIT", 1)
        first = save_graph(case.ir(), tmp_path / "first.onnx")
        again = save_graph(load_graph(first.path), tmp_path / "again.onnx")
    second = save_graph(load_graph(again.path), tmp_path / "second.onnx")
    assert second.files == (second.path,)
    assert first.hash == again.hash == second.hash
    found = run_model(onnx.load(second.path), case.feeds(2))
    np.testing.assert_array_equal(found["y"], case.expected(2)["y"])


def test_saving_over_the_file_that_holds_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CORPUS if case.name == "mlp")
    monkeypatch.setattr(graph_module, "_SINGLE_FILE_LIMIT", 64)
    first = save_graph(case.ir(), tmp_path / "model.onnx")
    second = save_graph(load_graph(first.path), tmp_path / "model.onnx")
    assert first.hash == second.hash == graph_hash(load_graph(second.path))


def test_specs_tell_dtypes_and_dimensions(tmp_path: Path) -> None:
    case = next(case for case in CORPUS if case.name == "masked_attention")
    saved = save_graph(case.ir(), tmp_path / "model.onnx")
    assert [(spec.name, spec.dtype, spec.shape) for spec in saved.inputs] == [
        ("x", "float32", ("batch", "length", 4)),
        ("mask", "bool", ("batch", "length")),
    ]
    assert saved.opset == 20
