"""Bias correction: mean shifts of a quantized network go, whatever form its biases have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.auto import choose_ranges
from trtforge.calibration.bias import apply_corrections, measure_corrections
from trtforge.calibration.collect import collect
from trtforge.calibration.placement import Placement, quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel, load_graph, save_graph
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.precision import PrecisionPlan

NETWORK = """(float[n, 3, 12, 12] x) => (float[n, 4] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, shared)
    b = Relu(a)
    c = Conv<pads=[1, 1, 1, 1], group=8>(b, w2)
    d = Relu(c)
    e = Conv(d, w3, shared)
    f = Relu(e)
    g = ConvTranspose(f, w4)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    y = Gemm<transB=1, beta=2.0>(i, w5, last)
}"""
WEIGHTS = {
    "w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1), "w4": (8, 6, 2, 2), "w5": (4, 6), "shared": (8,),
    "last": (4,),
}  # fmt: skip
Prepared = tuple[OnnxModel, Placement, Ranges, list[dict[str, np.ndarray]]]


@pytest.fixture
def prepared(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> Prepared:
    model = save_graph(parse_graph(NETWORK, WEIGHTS), tmp_path / "m.onnx")
    placement = quantizable_tensors(load_graph(model.path), PrecisionPlan("int8"))
    rng = np.random.default_rng(0)
    samples = [{"x": rng.random((8, 3, 12, 12), np.float32) + 1} for _ in range(2)]
    ranges = choose_ranges(collect(model, placement.measured, samples), "max")
    # Cut hard, so that there is a shift worth the name.
    cut = {name: type(found)(found.amax * 0.6, "max") for name, found in ranges.tensors.items()}
    return model, placement, Ranges(cut), samples


def quantized(prepared: Prepared, deltas: dict[str, np.ndarray]) -> ir.Model:
    model, placement, ranges, _ = prepared
    graph = load_graph(model.path)
    insert_qdq(graph, placement, ranges)
    apply_corrections(graph, deltas)
    return graph


def means(graph: ir.Model, names: list[str], samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    runner = OnnxRuntimeRunner(
        ir.to_proto(graph).SerializeToString(), disable_quant_qdq=True, extra_outputs=[n for n in names if n != "y"]
    )
    runs = [runner.run(feeds) for feeds in samples]
    return {n: np.mean([r[n].mean((0, 2, 3)) if r[n].ndim == 4 else r[n].mean(0) for r in runs], axis=0) for n in names}


def test_means_of_every_layer_come_back(prepared: Prepared) -> None:
    model, placement, ranges, samples = prepared
    deltas = measure_corrections(model, placement, ranges, samples)
    assert set(deltas) == {"Conv#0", "Conv#1", "Conv#2", "ConvTranspose#0", "Gemm#0"}
    names = ["a", "c", "e", "g", "y"]
    wanted = means(load_graph(model.path), names, samples)
    before, after = (means(quantized(prepared, d), names, samples) for d in ({}, deltas))
    for name in names:
        assert np.abs(before[name] - wanted[name]).max() > 0.02
        np.testing.assert_allclose(after[name], wanted[name], atol=2e-3)


def test_shared_and_missing_biases(prepared: Prepared) -> None:
    model, *_ = prepared
    graph = load_graph(model.path)
    ones = {"Conv#0": np.ones(8, np.float32), "Conv#1": np.ones(8, np.float32), "Gemm#0": np.ones(4, np.float32)}
    assert apply_corrections(graph, {**ones, "else#0": np.ones(1, np.float32)}) == 3
    assert apply_corrections(graph, {"Conv#1": np.ones(8, np.float32)}) == 1
    nodes = {node.name: node for node in graph.graph}
    original = {node.name: node for node in load_graph(model.path).graph}

    def bias(node: ir.Node) -> np.ndarray:
        value = node.inputs[2]
        assert value is not None
        assert value.const_value is not None
        return value.const_value.numpy()

    np.testing.assert_allclose(bias(nodes["Conv#0"]), bias(original["Conv#0"]) + 1)
    np.testing.assert_allclose(bias(nodes["Conv#2"]), bias(original["Conv#2"]))
    np.testing.assert_allclose(bias(nodes["Conv#1"]), 2)
    np.testing.assert_allclose(bias(nodes["Gemm#0"]), bias(original["Gemm#0"]) + 0.5)  # beta is 2


def test_no_samples(prepared: Prepared) -> None:
    model, placement, ranges, _ = prepared
    with pytest.raises(CalibrationError, match="needs samples"):
        measure_corrections(model, placement, ranges, [])
    assert measure_corrections(model, Placement(), ranges, [{}]) == {}
