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
from trtforge.calibration.smoothing import ORIGIN, _Channels, _predict, _weight, apply_smoothing, measure_smoothing
from trtforge.runtime.graph import META_ORIGIN, OnnxModel, load_graph, save_graph
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.specs import DimRange, InputSpec

# Two products read the normalized tensor, a residual Add does too, and one reads what is behind an activation.
NETWORK = """(float[n, 48, 16] x) => (float[n, 48, 16] y) {
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
    return model, placement, [{"x": rng.standard_normal((1, 48, 16)).astype(np.float32)} for _ in range(32)]


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


def test_a_gain_that_is_only_predicted_is_left(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> None:
    """Peaks of a long tail are chance: other rows have them in other channels, and `auto` clips them anyway."""
    graph = parse_graph("(float[n, 32, 256] x) => (float[n, 32, 64] y) { y = MatMul(x, w) }", {"w": (256, 64)})
    model = save_graph(graph, tmp_path / "m.onnx")
    placement = quantizable_tensors(load_graph(model.path), PLAN)
    rng = np.random.default_rng(0)
    samples = [{"x": (rng.standard_normal((1, 32, 256)) ** 3).astype(np.float32)} for _ in range(32)]
    channels = _Channels.none(256)
    channels.add(np.concatenate([sample["x"][0] for sample in samples]))
    assert _predict(channels, _weight(next(iter(load_graph(model.path).graph)))) > 2
    assert measure_smoothing(model, placement, samples) == {}


def averages(parse_graph: Callable[..., ir.Model], path: Path) -> Prepared:
    """What attention does at random weights: averages over a sequence, which are larger over a shorter one."""
    axis = np.array([1], np.int64)
    text = "(float[n, s, 16] x) => (float[n, 1, 16] y) { a = ReduceMean(x, axis)  y = MatMul(a, w) }"
    model = save_graph(parse_graph(text, {"axis": axis, "w": (16, 16)}), path)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 64, 16)).astype(np.float32)} for _ in range(64)]
    for sample in samples:
        sample["x"][..., 3] += 8  # an outlier that no length makes larger
    return model, quantizable_tensors(load_graph(model.path), PLAN), samples


def test_a_gain_at_the_length_of_the_data_alone_is_left(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> None:
    prepared = averages(parse_graph, tmp_path / "m.onnx")
    specs = [InputSpec("x", "float32", ("n", "s", 16))]
    assert "a" in measure_smoothing(*prepared)
    for shortest, found in ((64, {"a"}), (4, set())):
        profiles = [{"n": DimRange(1, 1, 8), "s": DimRange(shortest, 64, 64)}]
        assert set(measure_smoothing(*prepared, specs=specs, profiles=profiles)) == found


def test_a_model_that_does_not_take_its_inputs_cut(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> None:
    weights = {"last": np.array([47], np.int64), "gamma": np.full(16, 1, np.float32), "w": (16, 16)}
    weights["gamma"][3] = 60
    text = """(float[n, s, 16] x) => (float[n, s, 16] y) {
        l = Gather<axis = 1>(x, last)
        m = Mul(x, gamma)
        a = Add(m, l)
        y = MatMul(a, w)
    }"""
    model = save_graph(parse_graph(text, weights), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 48, 16)).astype(np.float32)} for _ in range(32)]
    placement = quantizable_tensors(load_graph(model.path), PLAN)
    specs, profiles = [InputSpec("x", "float32", ("n", "s", 16))], [{"s": DimRange(2, 48, 48)}]
    assert "a" in measure_smoothing(model, placement, samples, specs=specs, profiles=profiles)


def test_factors_are_the_same_for_any_batches_and_order(outliers: Prepared) -> None:
    model, placement, samples = outliers
    data = np.concatenate([sample["x"] for sample in samples])
    specs, profiles = [InputSpec("x", "float32", ("n", 48, 16))], [{"n": DimRange(1, 8, 32)}]
    found = [
        measure_smoothing(
            model,
            placement,
            choose_samples(model, [{"x": part} for part in np.split(order, parts)]),
            specs=specs,
            profiles=profiles,
        )
        for order, parts in ((data, 32), (data, 4), (data, 1), (data[::-1], 4))
    ]
    assert found[0]
    assert all(factors == found[0] for factors in found[1:])


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
    zeros = [{"x": np.zeros((1, 48, 16), np.float32)}]
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
