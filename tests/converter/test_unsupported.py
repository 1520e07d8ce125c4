"""Operators that parsers lack: results against onnxruntime, ids and shapes, and a build with TensorRT-RTX."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_corpus import CORPUS, Case, run_model
from onnx_ir.passes.common import ShapeInferencePass

from trtforge.converter.foreign import import_onnx
from trtforge.converter.unsupported import REWRITTEN, dft_matrix, rewrite
from trtforge.runtime.specs import DimRange


def parsed(text: str, *, opset: int = 20, **weights: Any) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def rewritten(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(copy.deepcopy(proto))
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    rewrite(model, REWRITTEN)
    return model


def check(proto: onnx.ModelProto, feeds: dict[str, Any], *, gone: bool = True, tolerance: float = 1e-5) -> ir.Model:
    model = rewritten(proto)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    left = [node.op_type for node in model.graph if node.op_type in REWRITTEN]
    assert bool(left) != gone
    expected, found = run_model(proto, feeds), run_model(model, feeds)
    assert list(expected) == list(found)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=tolerance * max(1.0, float(np.abs(array).max())))
    before = str(model)
    rewrite(model, REWRITTEN)
    assert str(model) == before
    return model


def floats(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def fourier(parts: int, size: int, length: int | None, *, inverse: bool, onesided: bool, axis: int) -> onnx.ModelProto:
    shape = [2, 3, 4]
    shape[axis] = size
    dims = ", ".join(map(str, shape[1:]))
    flags = f"inverse = {int(inverse)}, onesided = {int(onesided)}"
    return parsed(
        f"g (float[batch, {dims}, {parts}] x) => (float[a, b, c, d] y) {{"
        f"y = DFT <{flags}> (x, {'length' if length else ''}, axis) }}",
        **({"length": np.int64(length)} if length else {}), axis=np.int64(axis),
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 9), length=st.integers(1, 9) | st.none(), parts=st.sampled_from([1, 2]), inverse=st.booleans(),
    onesided=st.booleans(), axis=st.sampled_from([1, 2]),
)  # fmt: skip
def test_dft_is_numpys(size: int, length: int | None, parts: int, inverse: bool, onesided: bool, axis: int) -> None:
    if onesided and (parts == 2) != inverse:
        return  # a onesided transform takes real signals, its inverse complex ones
    if onesided and inverse and (length or 2 * (size - 1)) < 1:
        return
    proto = fourier(parts, size, length, inverse=inverse, onesided=onesided, axis=axis)
    model = rewritten(proto)
    assert "DFT" not in {node.op_type for node in model.graph}
    x = floats(2, *(size if a == axis else (3, 4)[a - 1] for a in (1, 2)), parts)
    found = run_model(model, {"x": x})["y"]
    signal = x[..., 0] + (1j * x[..., 1] if parts == 2 else 0)
    period = length or (2 * (size - 1) if onesided and inverse else size)
    if onesided and inverse:
        np.testing.assert_allclose(found[..., 0], np.fft.irfft(signal, period, axis), atol=1e-5)
        return
    transform = np.fft.rfft if onesided else np.fft.ifft if inverse else np.fft.fft
    wanted = transform(signal.real if onesided else signal, period, axis)
    np.testing.assert_allclose(found[..., 0] + 1j * found[..., 1], wanted, atol=1e-5)


def test_dft_as_onnxruntime_has_it() -> None:
    check(fourier(1, 8, None, inverse=False, onesided=True, axis=1), {"x": floats(2, 8, 4, 1)})
    check(fourier(2, 8, 6, inverse=True, onesided=False, axis=2), {"x": floats(2, 3, 8, 2)})
    old = parsed("g (float[n, 8, 1] x) => (float[n, 8, 2] y) { y = DFT <axis = 1> (x) }", opset=17)
    check(old, {"x": floats(3, 8, 1)})


def test_a_signal_of_unknown_length_stays() -> None:
    proto = parsed("g (float[n, t, 1] x) => (float[n, t, 2] y) { y = DFT (x, , axis) }", axis=np.int64(1))
    check(proto, {"x": floats(2, 5, 1)}, gone=False)


def test_the_matrix_is_unitary() -> None:
    product = dft_matrix(5, 5, 5, 2, inverse=False) @ dft_matrix(5, 5, 5, 2, inverse=True)
    np.testing.assert_allclose(product, np.eye(10), atol=1e-15)


@pytest.mark.parametrize(
    ("image", "block", "strides", "dilations", "pads"),
    [
        ([5, 6], [2, 3], [1, 1], [1, 1], [0, 0, 0, 0]),
        ([7, 6], [3, 2], [2, 2], [1, 1], [0, 0, 0, 0]),
        ([6, 5], [2, 2], [2, 1], [1, 1], [1, 0, 1, 2]),
        ([6, 6], [3, 2], [1, 1], [2, 1], [1, 1, 1, 1]),
        ([8, 6], [3, 2], [2, 3], [1, 1], [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_col2im(image: list[int], block: list[int], strides: list[int], dilations: list[int], pads: list[int]) -> None:
    reach = [image[i] + pads[i] + pads[i + 2] - dilations[i] * (block[i] - 1) - 1 for i in (0, 1)]
    columns = (reach[0] // strides[0] + 1) * (reach[1] // strides[1] + 1)
    rows = 3 * block[0] * block[1]
    proto = parsed(
        f"g (float[n, {rows}, {columns}] x) => (float[n, 3, {image[0]}, {image[1]}] y) {{"
        f"y = Col2Im <strides = {strides}, dilations = {dilations}, pads = {pads}> (x, image, block) }}",
        image=np.array(image), block=np.array(block),
    )  # fmt: skip
    check(proto, {"x": floats(2, rows, columns)})


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements(reduction: str, axis: int) -> None:
    shape = [4, 5, 3]
    proto = parsed(
        "g (float[4, 5, 3] x, int64[i, j, k] at, float[i, j, k] u) => (float[4, 5, 3] y)"
        f'{{ y = ScatterElements <axis = {axis}, reduction = "{reduction}"> (x, at, u) }}'
        .replace("[i, j, k]", str(shape if axis else [6, 5, 3]))
    )  # fmt: skip
    sizes = shape if axis else [6, 5, 3]
    at = np.random.default_rng(0).integers(-shape[axis], shape[axis], sizes)
    check(proto, {"x": floats(*shape), "at": at, "u": floats(*sizes) * 2})


def test_a_scatter_smaller_than_its_data_stays() -> None:
    proto = parsed(
        "g (float[4, 5] x, int64[2, 3] at, float[2, 3] u) => (float[4, 5] y)"
        '{ y = ScatterElements <axis = 1, reduction = "add"> (x, at, u) }'
    )
    check(proto, {"x": floats(4, 5), "at": np.zeros((2, 3), np.int64), "u": floats(2, 3)}, gone=False)


def test_scatter_nd() -> None:
    proto = parsed(
        "g (float[4, n, 3] x, int64[6, 1] at, float[6, n, 3] u) => (float[4, n, 3] y)"
        '{ y = ScatterND <reduction = "add"> (x, at, u) }'
    )
    at = np.array([[0], [3], [-1], [1], [1], [0]])
    check(proto, {"x": floats(4, 2, 3), "at": at, "u": floats(6, 2, 3)})


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_corpus_is_left_alone(case: Case, tmp_path: Path) -> None:
    onnx.save(case.proto(), tmp_path / "source.onnx")
    dims = {name: DimRange(1, 2, 8) for name in ("batch", "length", "B")}
    plain = import_onnx(tmp_path / "source.onnx", profiles=[dims], opset=None, folder=tmp_path)
    other = import_onnx(tmp_path / "source.onnx", profiles=[dims], opset=None, folder=tmp_path, rewritten=REWRITTEN)
    assert plain.model.hash == other.model.hash


def test_inside_a_body_and_with_ids(tmp_path: Path) -> None:
    text = """g (float[batch, 8, 1] x, bool c) => (float[batch, 8, 2] y) {
        y = If (c) <
            then_branch = a () => (float[batch, 8, 2] t) { t = DFT (x, , axis) },
            else_branch = b () => (float[batch, 8, 2] e) { z = DFT <inverse = 1> (x, , axis)  e = Neg(z) }
        >
    }"""
    proto = parsed(text, axis=np.int64(1))
    onnx.save(proto, tmp_path / "source.onnx")
    dims = {"batch": DimRange(1, 2, 4)}
    imported = import_onnx(tmp_path / "source.onnx", profiles=[dims], opset=None, folder=tmp_path, rewritten=REWRITTEN)
    found = onnx.load(imported.model.path)
    assert "DFT" not in str(found)
    names = Counter(line for line in str(found).splitlines() if line.strip().startswith('name: "/'))
    assert max(names.values()) == 1
    for c in (True, False):
        feeds = {"x": floats(2, 8, 1), "c": np.array(c)}
        np.testing.assert_allclose(run_model(found, feeds)["y"], run_model(proto, feeds)["y"], atol=1e-5)
