"""Smoothing: the same function in float, less noise in int8, and nothing where it does not pay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trtforge.calibration.auto import choose_ranges
from trtforge.calibration.collect import collect
from trtforge.calibration.placement import Placement, quantizable_tensors
from trtforge.calibration.probe import choose_samples
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.smoothing import ORIGIN, apply_smoothing, measure_smoothing
from trtforge.runtime.graph import META_ORIGIN, OnnxModel, load_graph, save_graph
from trtforge.runtime.precision import PrecisionPlan

# Two products read the normalized tensor, a residual Add does too, and one reads what is behind an activation.
NETWORK = """(float[n, 6, 16] x) => (float[n, 6, 16] y) {
    a = LayerNormalization(x, gamma, beta)
    q = MatMul(a, w1)
    k = MatMul(a, w2)
    s = Mul(q, k)
    g = Gelu(s)
    o = MatMul(g, w3)
    y = Add(o, a)
}"""
PLAN = PrecisionPlan("int8", base="fp32")
Prepared = tuple[OnnxModel, Placement, list[dict[str, np.ndarray]]]


def prepare(parse_graph: Callable[..., ir.Model], path: Path, outlier: float) -> Prepared:
    gamma = np.ones(16, np.float32)
    gamma[3] = outlier
    weights = {"gamma": gamma, "beta": np.zeros(16, np.float32), "w1": (16, 16), "w2": (16, 16), "w3": (16, 16)}
    model = save_graph(parse_graph(NETWORK, weights), path)
    placement = quantizable_tensors(load_graph(model.path), PLAN)
    rng = np.random.default_rng(0)
    return model, placement, [{"x": rng.standard_normal((1, 6, 16)).astype(np.float32)} for _ in range(32)]


@pytest.fixture
def outliers(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> Prepared:
    return prepare(parse_graph, tmp_path / "m.onnx", 60.0)


def test_outliers_move_into_weights(outliers: Prepared, run_model: Callable[..., dict[str, np.ndarray]]) -> None:
    model, placement, samples = outliers
    factors = measure_smoothing(model, placement, samples)
    assert "a" in factors
    assert np.argmax(factors["a"]) == 3
    graph = load_graph(model.path)
    assert apply_smoothing(graph, placement, factors) == len(factors)
    feeds = {"x": np.concatenate([sample["x"] for sample in samples])}
    wanted = run_model(load_graph(model.path), feeds)["y"]
    np.testing.assert_allclose(run_model(graph, feeds)["y"], wanted, rtol=1e-3, atol=1e-3)
    inserted = [node for node in graph.graph if node.metadata_props.get(META_ORIGIN) == ORIGIN]
    assert [node.op_type for node in inserted] == ["Mul"] * len(factors)
    add = next(node for node in graph.graph if node.op_type == "Add")
    assert add.inputs[1] is not None
    assert add.inputs[1].name == "a"  # the residual goes on reading the tensor itself

    def noise(source: ir.Model, path: Path) -> float:
        saved = save_graph(source, path)
        placed = quantizable_tensors(load_graph(path), PLAN)
        found = load_graph(path)
        insert_qdq(found, placed, choose_ranges(collect(saved, placed.measured, samples), "max"))
        onnx.checker.check_model(ir.to_proto(found), full_check=True)
        return float(np.mean((run_model(found, feeds)["y"] - wanted) ** 2))

    plain = noise(load_graph(model.path), model.path.with_name("plain.onnx"))
    assert noise(graph, model.path.with_name("smooth.onnx")) < plain / 2


def test_even_channels_are_left(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> None:
    model, placement, samples = prepare(parse_graph, tmp_path / "m.onnx", 1.0)
    assert "a" not in measure_smoothing(model, placement, samples)


def test_uses_in_float_keep_tensor_and_weight(outliers: Prepared) -> None:
    model, placement, samples = outliers
    factors = measure_smoothing(model, placement, samples)
    graph = load_graph(model.path)
    apply_smoothing(graph, placement.without({"MatMul#1"}), factors)
    nodes = {node.name: node for node in graph.graph}
    assert [value.name for value in nodes["MatMul#1"].inputs if value is not None] == ["a", "w2"]
    assert nodes["MatMul#0"].inputs[0] is not nodes["MatMul#1"].inputs[0]


def test_constants_of_nothing_and_no_samples(outliers: Prepared) -> None:
    model, placement, _ = outliers
    assert measure_smoothing(model, placement, []) == {}
    assert measure_smoothing(model, Placement(), [{}]) == {}
    zeros = [{"x": np.zeros((1, 6, 16), np.float32)}]
    assert measure_smoothing(model, placement, zeros) == {}


def test_the_probe_is_the_same_for_any_batches_and_order(outliers: Prepared) -> None:
    model, _, samples = outliers
    data = np.concatenate([sample["x"] for sample in samples])
    found = [
        choose_samples(model, [{"x": part} for part in np.split(order, parts)], 5)
        for order, parts in ((data, 1), (data[::-1], 32), (data, 4))
    ]
    assert [len(one) for one in found] == [5, 5, 5]
    for one in found[1:]:
        for left, right in zip(found[0], one, strict=True):
            np.testing.assert_array_equal(left["x"], right["x"])
    assert len(choose_samples(model, [{"x": np.concatenate([data, data])}], 999)) == 32


def test_rtx_builds_it(outliers: Prepared, build_rtx: Callable[..., None]) -> None:
    model, placement, samples = outliers
    graph = load_graph(model.path)
    apply_smoothing(graph, placement, measure_smoothing(model, placement, samples))
    saved = save_graph(graph, model.path.with_name("smooth.onnx"))
    placed = quantizable_tensors(load_graph(saved.path), PLAN)
    quantized = load_graph(saved.path)
    insert_qdq(quantized, placed, choose_ranges(collect(saved, placed.measured, samples), "max"))
    build_rtx(quantized)
