"""Fitting: rounding that lowers the output's noise, biases that keep its mean, and a file that holds both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.calibration.auto import choose_ranges
from trtforge.calibration.collect import collect
from trtforge.calibration.fit import Fit, FitSettings, describe_key, fit_weights, load_fit, save_fit
from trtforge.calibration.placement import Placement, quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.calibration.rounding import output_noise, round_weights
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.graph import OnnxModel, load_graph, save_graph
from trtforge.runtime.precision import PrecisionPlan

NETWORK = """(float[n, 3, 12, 12] x) => (float[n, 4] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)
    b = Relu(a)
    c = Conv<pads=[1, 1, 1, 1], group=8>(b, w2)
    d = Relu(c)
    e = Conv(d, w3)
    f = Relu(e)
    g = ConvTranspose(f, w4)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    y = Gemm(i, w5, b5)
}"""
WEIGHTS = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (16, 8, 1, 1), "w4": (16, 6, 2, 2), "w5": (6, 4),
    "b5": (4,),
}  # fmt: skip
FITTED = {"Conv#0", "Conv#1", "Conv#2", "Gemm#0"}
Samples = list[dict[str, np.ndarray]]
Prepared = tuple[OnnxModel, Placement, Ranges, Samples]


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3), outputs=st.integers(1, 5), inputs=st.integers(1, 90), seed=st.integers(0, 10**6),
    spread=st.floats(0, 4),
)  # fmt: skip
def test_codes_are_valid_and_always_the_same(groups: int, outputs: int, inputs: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((groups, inputs, inputs)) * np.exp(spread * rng.standard_normal((groups, inputs, 1)))
    covariance = mixed @ mixed.transpose(0, 2, 1) / inputs
    weights = rng.standard_normal((groups, outputs, inputs))
    scales = np.abs(weights).max(axis=2) / 127
    codes = round_weights(weights, scales, covariance)
    assert codes.shape == weights.shape
    assert codes.min() >= -127
    assert np.array_equal(codes, round_weights(weights, scales, covariance))


@pytest.mark.parametrize("seed", range(5))
def test_correlated_inputs_leave_less_noise_than_nearest_codes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((2, 64, 8)) @ rng.standard_normal((2, 8, 200)) + rng.standard_normal((2, 64, 200)) / 4
    covariance = mixed @ mixed.transpose(0, 2, 1) / 200
    weights = rng.standard_normal((2, 10, 64))
    scales = np.abs(weights).max(axis=2) / 127
    nearest = np.rint(weights / scales[:, :, None])
    noise, plain = (
        output_noise(found * scales[:, :, None] - weights, covariance)
        for found in (round_weights(weights, scales, covariance).astype(np.float64), nearest)
    )
    assert noise < plain / 2


def test_independent_inputs_get_the_nearest_codes() -> None:
    weights = np.random.default_rng(0).standard_normal((1, 4, 30))
    scales = np.abs(weights).max(axis=2) / 127
    nearest = np.rint(weights / scales[:, :, None]).astype(np.int8)
    np.testing.assert_array_equal(round_weights(weights, scales, np.eye(30)[None]), nearest)
    np.testing.assert_array_equal(round_weights(weights, scales, np.zeros((1, 30, 30))), nearest)


@pytest.fixture
def prepared(parse_graph: Callable[..., ir.Model], tmp_path: Path) -> Prepared:
    model = save_graph(parse_graph(NETWORK, WEIGHTS), tmp_path / "m.onnx")
    placement = quantizable_tensors(load_graph(model.path), PrecisionPlan("int8"))
    rng = np.random.default_rng(0)
    smooth = rng.random((64, 3, 12, 1), np.float32) + rng.random((64, 1, 1, 12), np.float32)
    samples = [{"x": part} for part in np.split(smooth, 8)]
    return model, placement, choose_ranges(collect(model, placement.measured, samples), "max"), samples


def quantized(prepared: Prepared, fit: Fit | None) -> ir.Model:
    model, placement, ranges, _ = prepared
    graph = load_graph(model.path)
    insert_qdq(graph, placement, ranges, fit)
    return graph


def test_every_layer_gets_nearer(prepared: Prepared, run_model: Callable[..., dict[str, np.ndarray]]) -> None:
    model, placement, ranges, samples = prepared
    fit = fit_weights(model, placement, ranges, samples)
    assert set(fit.weights) == set(fit.biases) == FITTED
    assert [layer.node for layer in fit.layers] == ["Conv#0", "Conv#1", "Conv#2", "Gemm#0"]
    for layer in fit.layers:
        assert layer.nearest_db is not None
        assert layer.fitted_db is not None
        assert layer.fitted_db >= layer.nearest_db
    feeds = {"x": np.concatenate([sample["x"] for sample in samples])}
    # Each layer's own error: the rest of the network in float.
    for node, tensor in (("Conv#0", "a"), ("Conv#1", "c"), ("Conv#2", "e")):
        alone = placement.without(set(placement.nodes) - {node})
        wanted = run_model(load_graph(model.path), feeds, [tensor])[tensor]
        errors = []
        for used in (None, fit):
            graph = load_graph(model.path)
            insert_qdq(graph, alone, ranges, used)
            errors.append(run_model(graph, feeds, [tensor])[tensor] - wanted)
        assert np.mean(errors[1] ** 2) < np.mean(errors[0] ** 2)
        shifts = [np.abs(error.mean(axis=(0, 2, 3))).max() for error in errors]
        assert shifts[1] < 0.2 * shifts[0] + 1e-6


def test_parts_can_be_switched_off(prepared: Prepared) -> None:
    model, placement, ranges, samples = prepared
    both = fit_weights(model, placement, ranges, samples)
    biases = fit_weights(model, placement, ranges, samples, settings=FitSettings(rounding=False))
    assert biases.weights == {}
    assert set(biases.biases) == FITTED
    codes = fit_weights(model, placement, ranges, samples, settings=FitSettings(bias=False))
    assert codes.biases == {}
    for node, weight in codes.weights.items():
        np.testing.assert_array_equal(weight.codes, both.weights[node].codes)
    nothing = fit_weights(model, placement, ranges, [], settings=FitSettings(rounding=False, bias=False))
    assert (nothing.weights, nothing.biases, nothing.settings) == ({}, {}, "nearest codes")


def test_layers_in_float_keep_their_biases(prepared: Prepared) -> None:
    model, placement, ranges, samples = prepared
    fit = fit_weights(model, placement, ranges, samples)
    graph = load_graph(model.path)
    insert_qdq(graph, placement.without({"Conv#0"}), ranges, fit)
    conv = next(node for node in graph.graph if node.name == "Conv#0")
    assert conv.inputs[2] is graph.graph.initializers["b1"]
    other = next(node for node in graph.graph if node.name == "Conv#1")
    assert len(other.inputs) == 3


def test_float16_scales_are_exact_in_both_types(prepared: Prepared) -> None:
    model, placement, ranges, samples = prepared
    fit = fit_weights(model, placement, ranges, samples, dtype=ir.DataType.FLOAT16)
    for weight in fit.weights.values():
        np.testing.assert_array_equal(weight.scales, weight.scales.astype(np.float16).astype(np.float32))


def test_the_same_fit_whatever_the_batches(prepared: Prepared, tmp_path: Path) -> None:
    model, placement, ranges, samples = prepared
    whole = np.concatenate([sample["x"] for sample in samples])
    texts = []
    for number, batches in enumerate((samples, [{"x": whole[::-1].copy()}])):
        path = tmp_path / f"{number}.safetensors"
        save_fit(path, fit_weights(model, placement, ranges, batches))
        texts.append(path.read_bytes())
    assert texts[0] == texts[1]


def test_the_file_and_its_key(prepared: Prepared, tmp_path: Path) -> None:
    model, placement, ranges, samples = prepared
    fit = fit_weights(model, placement, ranges, samples)
    path = tmp_path / "fit.safetensors"
    save_fit(path, fit)
    read = load_fit(path)
    assert (read.layers, read.settings, read.key) == (fit.layers, fit.settings, fit.key)
    first, second = quantized(prepared, fit), quantized(prepared, read)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()

    fit_all = FitSettings()

    def key(given: Ranges = ranges, wanted: FitSettings = fit_all, dtype: ir.DataType = ir.DataType.FLOAT) -> str:
        return describe_key(model.hash, given, wanted, dtype)

    assert fit.key == key()
    name, *_ = ranges.tensors
    wider = replace(ranges, tensors={**ranges.tensors, name: replace(ranges[name], amax=9.0)})
    keys = {key(), key(wider), key(wanted=FitSettings(bias=False)), key(dtype=ir.DataType.FLOAT16)}
    keys.add(key(replace(ranges, smoothing={name: (2.0,)})))
    assert len(keys) == 5
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError):
        load_fit(path)
