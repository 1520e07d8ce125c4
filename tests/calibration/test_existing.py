from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.existing import check_existing, fold_bias_codes, inspect_existing
from trtforge.calibration.placement import quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.precision import PrecisionPlan

Parse = Callable[..., ir.Model]
Call = Callable[..., Any]

TEXT = """(float[N,4] x) => (float[N,3] y) {
    q = QuantizeLinear(x, s, z)
    d = DequantizeLinear(q, s, z)
    w = DequantizeLinear<axis=1>(codes, ws, wz)
    h = MatMul(d, w)
    y = Add(h, b)
}"""


def weights(**changed: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "s": np.array(0.1, np.float32),
        "z": np.array(0, np.int8),
        "codes": np.arange(12, dtype=np.int8).reshape(4, 3),
        "ws": np.full(3, 0.2, np.float32),
        "wz": np.zeros(3, np.int8),
        "b": np.zeros(3, np.float32),
    } | changed


def test_a_float_model_carries_nothing(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", {})
    assert inspect_existing(model) is None
    assert check_existing(model) is None


def test_a_sound_model_is_described_and_builds(parse_graph: Parse, build_rtx: Call) -> None:
    model = parse_graph(TEXT, weights())
    found = check_existing(model)
    assert found is not None
    assert (found.pairs, found.weights, found.formats, found.ours, found.problems) == (1, 1, ("int8",), False, ())
    build_rtx(model)


def test_what_was_inserted_here_is_known_as_ours(parse_graph: Parse) -> None:
    model = parse_graph("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": (4, 4)})
    placement = quantizable_tensors(model, PrecisionPlan(default="fp8", base="fp32"))
    insert_qdq(model, placement, Ranges({"x": TensorRange(1.0, "max")}))
    found = check_existing(model)
    assert found is not None
    assert (found.ours, found.formats, found.pairs, found.weights) == (True, ("fp8",), 1, 1)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"z": np.array(3, np.int8)}, "zero point is not a constant 0"),
        ({"z": np.array(128, np.uint8)}, "codes are uint8"),
        ({"s": np.array(0, np.float32)}, "not finite and above 0, such as 0"),
        ({"ws": np.array([1, np.nan, 1], np.float32)}, "1 of its 3 scales are not finite and above 0, such as nan"),
        ({"s": np.array(-0.1, np.float32)}, "such as -0.1"),
    ],
)
def test_what_tensorrt_would_refuse_is_named(parse_graph: Parse, changed: dict[str, np.ndarray], what: str) -> None:
    model = parse_graph(TEXT, weights(**changed))
    with pytest.raises(CalibrationError) as caught:
        check_existing(model)
    assert what in caught.value.what
    assert "Linear#" in caught.value.what
    assert caught.value.fix


def test_scales_along_the_wrong_axis(parse_graph: Parse) -> None:
    text = TEXT.replace("axis=1", "axis=0")
    model = parse_graph(text, weights(ws=np.full(4, 0.2, np.float32), wz=np.zeros(4, np.int8)))
    with pytest.raises(CalibrationError, match="lie along axis 0, and MatMul MatMul#0 needs 1"):
        check_existing(model)


def test_an_activation_with_many_scales(parse_graph: Parse) -> None:
    model = parse_graph(TEXT, weights(s=np.full(4, 0.1, np.float32), z=np.zeros(4, np.int8)))
    with pytest.raises(CalibrationError, match="an activation has 4 scales"):
        check_existing(model)


def test_a_quantize_node_without_zero_point_makes_uint8(parse_graph: Parse) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }"
    with pytest.raises(CalibrationError, match="codes are uint8"):
        check_existing(parse_graph(text, {"s": np.array(0.1, np.float32)}))


def test_integer_operators_are_named(parse_graph: Parse) -> None:
    text = "(int8[N,4] x) => (int32[N,4] y) { y = MatMulInteger(x, w) }"
    model = parse_graph(text, {"w": np.ones((4, 4), np.int8)})
    with pytest.raises(CalibrationError, match="MatMulInteger computes on integers"):
        check_existing(model)


def test_int32_biases_fold_exactly(parse_graph: Parse, random_feeds: Call, run_model: Call, build_rtx: Call) -> None:
    text = TEXT.replace("y = Add(h, b)", "c = DequantizeLinear(codes32, bs) y = Add(h, c)")
    extra = {"codes32": np.array([-7, 0, 70000], np.int32), "bs": np.array(0.02, np.float32)}
    model = parse_graph(text, weights(**extra))
    with pytest.raises(CalibrationError, match="codes are int32"):
        check_existing(model)
    feeds = random_feeds(model)
    before = run_model(model, feeds)
    assert fold_bias_codes(model) == 1
    assert fold_bias_codes(model) == 0
    assert np.array_equal(run_model(model, feeds)["y"], before["y"])
    assert check_existing(model) is not None
    assert "codes32" not in model.graph.initializers
    build_rtx(model)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_of_two_dimensions_are_folded_along_their_axis(parse_graph: Parse, run_model: Call, axis: int) -> None:
    codes = np.arange(9, dtype=np.int32).reshape(3, 3)
    model = parse_graph(
        f"(float[3,3] x) => (float[3,3] y) {{ b = DequantizeLinear<axis={axis}>(codes, s) y = Add(x, b) }}",
        {"codes": codes, "s": np.array([1, 10, 100], np.float32)},
    )
    feeds = {"x": np.zeros((3, 3), np.float32)}
    before = run_model(model, feeds)
    assert fold_bias_codes(model) == 1
    assert np.array_equal(run_model(model, feeds)["y"], before["y"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnxruntimes_symmetric_output_is_taken_once_its_biases_are_folded(
    parse_graph: Parse, tmp_path: Path, build_rtx: Call
) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    model = parse_graph(
        "(float[N,3,8,8] x) => (float[N,4,8,8] y) { c = Conv(x, w, b) y = Relu(c) }", {"w": (4, 3, 1, 1), "b": (4,)}
    )
    ir.save(model, tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self.left = 3

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.left -= 1
            return {"x": np.full((1, 3, 8, 8), 0.5, np.float32)} if self.left >= 0 else None

    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    quantized = ir.load(tmp_path / "int8.onnx")
    for index, node in enumerate(quantized.graph):
        node.name = node.name or f"node{index}"
    with pytest.raises(CalibrationError, match="codes are int32"):
        check_existing(quantized)
    assert fold_bias_codes(quantized) == 1
    found = check_existing(quantized)
    assert found is not None
    assert not found.ours
    assert not quantizable_tensors(quantized, PrecisionPlan(default="int8")).tensors
    build_rtx(quantized)
