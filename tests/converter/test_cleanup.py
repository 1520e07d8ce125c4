from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, Case, run_model

from trtforge.converter.cleanup import clean
from trtforge.runtime.graph import all_graphs, graph_hash


def cleaned(case: Case) -> ir.Model:
    model = case.ir()
    clean(model)
    return model


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_results_and_interface_stay(case: Case) -> None:
    model = cleaned(case)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for batch in (1, 3):
        before = case.expected(batch)
        for node in model.graph:
            node.name = None  # naming nodes is identity's business, and onnxruntime refuses doubled names
        after = run_model(model, case.feeds(batch))
        assert list(before) == list(after)
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name])


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_a_second_cleaning_changes_nothing(case: Case) -> None:
    model = cleaned(case)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    clean(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_result_is_plain(case: Case) -> None:
    model = cleaned(case)
    assert not model.functions
    operators = [node.op_type for graph in all_graphs(model) for node in graph]
    assert "Constant" not in operators
    assert not set(model.graph.inputs) & set(model.graph.initializers.values())
    names = [value.name for graph in all_graphs(model) for node in graph for value in node.outputs if value.name]
    assert len(names) == len(set(names))


def test_repeats_are_merged_and_dead_nodes_dropped() -> None:
    model = cleaned(next(case for case in CORPUS if case.name == "repeats"))
    assert [node.op_type for node in model.graph] == ["Mul", "Add", "ReduceMean", "Sub"]


def test_unused_initializers_are_dropped() -> None:
    model = cleaned(next(case for case in CORPUS if case.name == "shared_weights"))
    assert "unused" not in model.graph.initializers


def test_an_initializer_as_output_gets_a_node() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 2] x) => (float[n, 2] y, float[2] w)'
        " <float[2] w = {1, 2}> { y = Mul(x, w) }"
    )
    graph = ir.from_proto(model)
    before = graph_hash(graph)
    clean(graph)
    assert graph_hash(graph) != before
    assert [node.op_type for node in graph.graph] == ["Mul", "Identity"]
    found = run_model(graph, {"x": np.ones((1, 2), np.float32)})
    np.testing.assert_array_equal(found["w"], [1, 2])
    np.testing.assert_array_equal(found["y"], [[1, 2]])
