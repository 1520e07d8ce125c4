"""Models that bring their own Q/DQ, as onnxruntime's quantizer writes it: passed through, proved and built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import trtforge
from trtforge.runtime.errors import BuildError, MissingDependencyError
from trtforge.runtime.trt.backend import Backend, find_backend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnxruntime's own quantizer


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(288, 5),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("floats")
    artifact = trtforge.convert(
        net, torch.randn(2, 3, 8, 8), folder / "net", dims={"batch": (1, 2, 4)}, inputs={"input": ("batch", 3, 8, 8)}
    )
    return Path(artifact.reference)


def found_backend() -> Backend:
    try:
        return find_backend("auto")
    except MissingDependencyError as error:
        pytest.skip(str(error))


def quantized(floats: Path, folder: Path, *, symmetric: bool) -> Path:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            random = np.random.default_rng(0)
            self.batches = iter([random.standard_normal((4, 3, 8, 8)).astype(np.float32) for _ in range(4)])

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch}

    quantization.quantize_static(
        floats, folder / "int8.onnx", Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True},
    )  # fmt: skip
    return folder / "int8.onnx"


def pairs(path: Path) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Operator, dtype of the codes, bytes of the scale and of what is stored, of each Q and DQ but those of biases."""
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        codes = stored.get(node.input[0])
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (codes is None or codes.dtype != np.int32):
            held = "" if codes is None else str(codes.dtype)
            yield node.op_type, held, stored[node.input[1]].tobytes(), b"" if codes is None else codes.tobytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_scales_and_codes_stay_to_the_byte(precision: str, floats: Path, tmp_path: Path) -> None:
    if not found_backend().capabilities.int8_conv:
        pytest.skip("needs a TensorRT with INT8 convolutions")
    source = quantized(floats, tmp_path, symmetric=True)
    notes: list[str] = []
    artifact = trtforge.convert(
        source, None, tmp_path / precision, precision=precision, dims={"batch": (1, 2, 4)},
        inputs={"input": ("batch", 3, 8, 8)},
        on_event=lambda event: notes.append(event.text) if event.kind == "note" else None,
    )  # fmt: skip
    assert artifact.status in ("built", "validated")  # an engine was made of them
    wanted = sorted(pairs(source))
    assert len(wanted) > 8
    assert sorted(pairs(artifact.reference)) == wanted
    if precision != "fp16":  # there scales are of the type of what they scale
        assert sorted(pairs(artifact.model)) == wanted
    assert any("is not calibrated again" in note for note in notes) == (precision == "int8")


def test_zero_points_are_explained(floats: Path, tmp_path: Path) -> None:
    found_backend()
    source = quantized(floats, tmp_path, symmetric=False)
    with pytest.raises(BuildError) as caught:
        trtforge.convert(
            source, None, tmp_path / "made", dims={"batch": (1, 2, 4)}, inputs={"input": ("batch", 3, 8, 8)}
        )
    assert "its zero point is not a constant 0" in caught.value.why
    assert caught.value.fix == "quantize symmetrically (ActivationSymmetric: True)"
