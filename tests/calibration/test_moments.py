"""Moments: exact, whatever the order and the batches; and of the windows that onnxruntime multiplies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.moments import ROWS, Layer, Moments, collect_moments, describe_layer
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel, load_graph, save_graph

Parse = Callable[..., ir.Model]

CONVOLUTIONS: list[tuple[str, str, Any]] = [
    ("plain", "", (6, 4, 3, 3)),
    ("pads, strides", "pads=[1, 0, 2, 1], strides=[2, 1]", (6, 4, 3, 2)),
    ("dilations", "dilations=[2, 1], pads=[2, 1, 2, 1]", (6, 4, 3, 3)),
    ("groups", "group=2", (6, 2, 3, 3)),
    ("depthwise", "group=4, pads=[1, 1, 1, 1]", (4, 1, 3, 3)),
    ("same upper", 'auto_pad="SAME_UPPER", strides=[2, 2]', (6, 4, 3, 3)),
    ("same lower", 'auto_pad="SAME_LOWER", strides=[2, 2]', (6, 4, 4, 3)),
    ("valid", 'auto_pad="VALID"', (6, 4, 5, 5)),
]


def only_layer(model: OnnxModel, scale: float) -> Layer:
    graph = load_graph(model.path)
    node = next(node for node in graph.graph if node.op_type in ("Conv", "Gemm", "MatMul"))
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    found = describe_layer(node, "x", scale, weight.const_value.numpy().shape)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "attributes", "shape"), CONVOLUTIONS, ids=[case[0] for case in CONVOLUTIONS])
def test_windows_are_those_that_the_convolution_multiplies(
    name: str,
    attributes: str,
    shape: tuple[int, ...],
    parse_graph: Parse,
    tmp_path: Path,
    run_model: Callable[..., dict[str, np.ndarray]],
) -> None:
    inner = f"<{attributes}>" if attributes else ""
    graph = parse_graph(f"(float[n, 4, 9, 8] x) => (float[n, c, h, v] y) {{ y = Conv{inner}(x, w) }}", {"w": shape})
    model = save_graph(graph, tmp_path / "m.onnx")
    layer = only_layer(model, 1.0)
    x = np.random.default_rng(0).integers(-9, 9, (1, 4, 9, 8)).astype(np.float32)
    rows = layer.rows(x, 0)
    weight = graph.graph.initializers["w"].const_value
    assert weight is not None
    grouped = weight.numpy().reshape(layer.groups, -1, layer.inputs)
    found = np.einsum("rgk,gok->gor", rows, grouped).reshape(len(grouped[0]) * layer.groups, -1)
    wanted = run_model(graph, {"x": x})["y"][0]
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-4)


@pytest.fixture
def model(parse_graph: Parse, tmp_path: Path) -> OnnxModel:
    text = "(float[n, 4, 24, 24] x) => (float[n, 6, 22, 22] y) { y = Conv(x, w) }"
    return save_graph(parse_graph(text, {"w": (6, 4, 3, 3)}), tmp_path / "m.onnx")


def equal(a: Moments, b: Moments) -> bool:
    assert a.products is not None
    assert b.products is not None
    same = np.array_equal(a.codes, b.codes) and np.array_equal(a.remainders, b.remainders)
    return a.count == b.count and same and np.array_equal(a.products, b.products)


def test_moments_are_equal_to_the_bit_for_any_batches_and_order(model: OnnxModel) -> None:
    data = np.random.default_rng(1).standard_normal((14, 4, 24, 24)).astype(np.float32)
    layer = only_layer(model, 0.02)
    shuffled = np.random.default_rng(2).permutation(data)
    runs = [
        collect_moments(model, [layer], [{"x": part} for part in np.split(order, parts)])["Conv#0"]
        for order, parts in ((data, 1), (data, 14), (shuffled, 7))
    ]
    assert runs[0].count == 14 * ROWS
    assert all(equal(runs[0], run) for run in runs[1:])


def test_means_and_covariance(parse_graph: Parse, tmp_path: Path) -> None:
    text = "(float[n, 5] x) => (float[n, 3] y) { y = Gemm<transB=1>(x, w) }"
    model = save_graph(parse_graph(text, {"w": (3, 5)}), tmp_path / "m.onnx")
    data = np.random.default_rng(3).standard_normal((200, 5)).astype(np.float32)
    scale = 0.015
    found = collect_moments(model, [only_layer(model, scale)], [{"x": data}])["Gemm#0"]
    codes = np.clip(np.rint(data / np.float32(scale)), -127, 127).astype(np.float64)
    floats, means = found.means()
    np.testing.assert_array_equal(means[0], codes.sum(axis=0) / 200)
    np.testing.assert_allclose(floats[0] * scale, data.mean(axis=0), atol=1e-6)
    covariance = found.covariance()
    assert covariance is not None
    np.testing.assert_allclose(covariance[0], np.cov(codes.T, bias=True), rtol=1e-9)


def test_sequences_and_transposed_convolutions_are_not_described(parse_graph: Parse) -> None:
    graph = parse_graph("(float[n, 7, 5] x) => (float[n, 7, 3] y) { y = MatMul(x, w) }", {"w": (5, 3)})
    assert describe_layer(next(iter(graph.graph)), "x", 1.0, (5, 3)) is None
    text = "(float[n, 4, 6, 6] x) => (float[n, 3, 7, 7] y) { y = ConvTranspose(x, w) }"
    graph = parse_graph(text, {"w": (4, 3, 2, 2)})
    assert describe_layer(next(iter(graph.graph)), "x", 1.0, (4, 3, 2, 2)) is None


def test_no_samples(model: OnnxModel) -> None:
    assert collect_moments(model, [], [{}]) == {}
    with pytest.raises(CalibrationError, match="no samples"):
        collect_moments(model, [only_layer(model, 1.0)], [])
