from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import parser

from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import ConfigError, ExportError, MissingDependencyError, ParityError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner, run_onnx
from trtforge.runtime.runner import Runner
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.tensors import load_tensors, save_tensors


def _model(text: str, opset: int = 20) -> bytes:
    return bytes(parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}').SerializeToString())


AFFINE = _model("g (float[n,2] x, float[n,2] b) => (float[n,2] y) { t = Add(x, b) y = Neg(t) }")


def test_it_is_a_runner_and_describes_itself() -> None:
    runner: Runner = OnnxRuntimeRunner(AFFINE, threads=1)
    assert runner.name == "onnxruntime"
    assert runner.version.split(".")[0] == "1"
    assert runner.inputs == (TensorSpec("x", "float32", ("n", 2)), TensorSpec("b", "float32", ("n", 2)))
    assert runner.outputs == (TensorSpec("y", "float32", ("n", 2)),)
    x = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(runner.run({"x": x, "b": x})["y"], -2 * x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_every_dtype_goes_in_and_out(dtype: str, shape: tuple[int, ...]) -> None:
    onnx_name = {"float64": "double"}.get(dtype, dtype)
    dims = ",".join(map(str, shape))
    runner = OnnxRuntimeRunner(_model(f"g ({onnx_name}[{dims}] x) => ({onnx_name}[{dims}] y) {{ y = Identity(x) }}"))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    x = np.arange(6).reshape(2, 3)[:2].astype(kind) if shape == (2, 3) else np.zeros(shape, kind)
    y = runner.run({"x": x})["y"]
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.tobytes() == x.tobytes()


def test_bfloat16_inputs_may_be_strided() -> None:
    runner = OnnxRuntimeRunner(_model("g (bfloat16[2,3] x) => (bfloat16[2,3] y) { y = Identity(x) }"))
    x = np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16).T
    np.testing.assert_array_equal(runner.run({"x": x})["y"].astype(np.float32), x.astype(np.float32))


def test_results_are_never_overwritten() -> None:
    runner = OnnxRuntimeRunner(
        _model("g (float[2] x) => (float[2] y, float[2] w, bfloat16[2] b) <float[2] w = {1,2}>"
               "{ y = Identity(x) b = Cast<to = 16>(x) }")
    )  # fmt: skip
    x = np.array([1, 2], np.float32)
    first = runner.run({"x": x})
    x[:] = 7
    for array in first.values():
        assert np.asarray(array, np.float32).tolist() == [1, 2]
    first["w"][:] = 9
    second = runner.run({"x": x})
    assert second["w"].tolist() == [1, 2]
    assert first["b"].astype(np.float32).tolist() == [1, 2]
    assert second["b"].astype(np.float32).tolist() == [7, 7]


def test_a_bound_run_writes_where_it_was_told_to() -> None:
    inputs = {"x": np.ones((3, 2), np.float32), "b": np.ones((3, 2), np.float32)}
    y = np.empty((3, 2), np.float32)
    run = OnnxRuntimeRunner(AFFINE, threads=1).bind(inputs, {"y": y})
    run()
    np.testing.assert_array_equal(y, np.full((3, 2), -2))
    inputs["x"][:] = 2
    run()
    np.testing.assert_array_equal(y, np.full((3, 2), -3))


def test_a_bound_run_whose_shapes_depend_on_values() -> None:
    text = "g (float[n] x) => (float[k] y) { i = NonZero(x) j = Squeeze(i) y = Gather(x, j) }"
    x, y = np.array([1, 0, 2], np.float32), np.empty(2, np.float32)
    run = OnnxRuntimeRunner(_model(text), threads=1).bind({"x": x}, {"y": y})
    run()
    assert y.tolist() == [1, 2]
    x[1] = 3
    with pytest.raises(ParityError, match=r"inputs of shape \{'x': \[3\]\}"):
        run()


def test_extra_outputs_come_after_the_graph_s_own(tmp_path: Path) -> None:
    x = np.ones((1, 2), np.float32)
    for model in (AFFINE, tmp_path / "m.onnx"):
        if isinstance(model, Path):
            model.write_bytes(AFFINE)
        runner = OnnxRuntimeRunner(model, extra_outputs=["t", "y", "t"])
        assert [spec.name for spec in runner.outputs] == ["y", "t"]
        assert runner.run({"x": x, "b": x})["t"].tolist() == [[2, 2]]
    with pytest.raises(ConfigError, match="no tensor 'tt'"):
        OnnxRuntimeRunner(AFFINE, extra_outputs=["tt"])


def test_extra_outputs_find_external_weights(tmp_path: Path) -> None:
    proto = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[4] x) => (float[4] y) <float[4] w = {1,2,3,4}>'
        "{ t = Add(x, w) y = Neg(t) }"
    )
    path = tmp_path / "m.onnx"
    for tensor in proto.graph.initializer:
        tensor.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("float_data")
    onnx.save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    assert (tmp_path / "m.onnx.data").exists()
    runner = OnnxRuntimeRunner(path, extra_outputs=["t"])
    assert runner.run({"x": np.zeros(4, np.float32)})["t"].tolist() == [1, 2, 3, 4]
    from_bytes = OnnxRuntimeRunner(path.read_bytes(), data_folder=tmp_path)
    assert from_bytes.run({"x": np.zeros(4, np.float32)})["y"].tolist() == [-1, -2, -3, -4]


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": np.ones((1, 2), np.float32)}, "input 'b' is missing"),
        ({"x": np.ones((1, 2)), "b": np.ones((1, 2), np.float32)}, "is float64, the model takes float32"),
        ({"x": np.ones((1, 3), np.float32), "b": np.ones((1, 2), np.float32)}, r"shape \[1, 3\]"),
        ({"x": np.ones(2, np.float32), "b": np.ones((1, 2), np.float32)}, r"shape \[2\]"),
        ({"x": np.ones((1, 2), np.float32), "b": np.ones((3, 2), np.float32)}, "'n' is 1 in input 'x' and 3"),
        ({"z": np.ones((1, 2), np.float32)}, "no input 'z'"),
    ],
)
def test_wrong_feeds_are_named(feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxRuntimeRunner(AFFINE).run(feeds)


def test_a_run_that_fails_is_a_parity_error() -> None:
    baked = _model("g (float[n] x) => (float[2] y) <int64[1] s = {2}> { y = Reshape(x, s) }")
    with pytest.raises(ParityError, match=r"\{'x': \[3\]\}"):
        OnnxRuntimeRunner(baked).run({"x": np.ones(3, np.float32)})


def test_a_model_that_does_not_load_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a model of 3 bytes"):
        OnnxRuntimeRunner(b"abc")
    with pytest.raises(ExportError, match="a model of 9 bytes"):
        OnnxRuntimeRunner(b"Attention")
    with pytest.raises(ExportError, match=r"none\.onnx"):
        OnnxRuntimeRunner(tmp_path / "none.onnx")
    matmul = _model("g (bfloat16[2,2] x) => (bfloat16[2,2] y) { y = MatMul(x, x) }")
    with pytest.raises(ExportError) as caught:
        OnnxRuntimeRunner(matmul)
    assert "emulate" in caught.value.fix


def test_providers() -> None:
    assert OnnxRuntimeRunner(AFFINE).provider == "CPUExecutionProvider"
    with pytest.raises(ConfigError, match="'gpu'"):
        OnnxRuntimeRunner(AFFINE, provider="gpu")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(MissingDependencyError, match="no CUDA provider"):
            OnnxRuntimeRunner(AFFINE, provider="cuda")


def test_disable_quant_qdq_keeps_fake_quantization() -> None:
    text = """g (float[1,1] x) => (float[1,1] y) <float s = {0.1}, int8 z = {0}, float[1,1] w = {1.04}>
    { qx = QuantizeLinear(x, s, z) dx = DequantizeLinear(qx, s, z) qw = QuantizeLinear(w, s, z)
      dw = DequantizeLinear(qw, s, z) y = MatMul(dx, dw) }"""
    x = np.array([[0.26]], np.float32)
    y = OnnxRuntimeRunner(_model(text), disable_quant_qdq=True).run({"x": x})["y"]
    assert y.item() == pytest.approx(0.3 * 1.0, rel=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_used_where_they_lie(kind: Any) -> None:
    name = {"float32": "float", "float16": "float16"}.get(np.dtype(kind).name, "bfloat16")
    proto = onnx.load_model_from_string(_model(f"g ({name}[4] x) => ({name}[4] y) {{ y = Concat<axis = 0>(w) }}"))
    tensor = proto.graph.initializer.add(name="w", data_type=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))
    tensor.dims.append(4)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    w = np.array([1, 2, 3, 4]).astype(kind)
    runner = OnnxRuntimeRunner(proto.SerializeToString(), weights={"w": w}, threads=1)
    del w  # the session keeps what it needs
    assert runner.run({"x": np.zeros(4, kind)})["y"].astype(np.float32).tolist() == [1, 2, 3, 4]
    with pytest.raises(ExportError):
        OnnxRuntimeRunner(proto.SerializeToString())


@pytest.mark.parametrize("mask", ["bool[2,1,1,5]", "float[2,1,1,5]", "float[1,5]", "float[5]", "bool[2,3,4,5]"])
def test_attention_masks_may_broadcast_over_rows(mask: str, tmp_path: Path) -> None:
    """As ONNX says and torch exports them; onnxruntime alone refuses all but the last."""
    text = f"""g (float[2,3,4,8] q, float[2,3,5,8] k, {mask} m, bool c) => (float[2,3,4,8] y, float[2,3,4,8] z) {{
        y = Attention(q, k, k, m)
        z = If(c)<then_branch = t () => (float[2,3,4,8] a) {{ a = Attention(q, k, k, m) }},
                  else_branch = e () => (float[2,3,4,8] b) {{ b = Identity(q) }}> }}"""
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, 3, rows, 8)).astype(np.float32) for rows in (4, 5))
    kind, _, dims = mask.rstrip("]").partition("[")
    m = random.standard_normal([int(dim) for dim in dims.split(",")]).astype(np.float32)
    m = m > -1 if kind == "bool" else m
    path = tmp_path / "m.onnx"
    path.write_bytes(_model(text, opset=23))
    scores = np.einsum("bhld,bhsd->bhls", q, k) / np.sqrt(8)
    scores = np.exp(np.where(m, scores, -np.inf) if kind == "bool" else scores + m)
    expected = np.einsum("bhls,bhsd->bhld", scores / scores.sum(-1, keepdims=True), k)
    for model in (path, path.read_bytes()):
        got = OnnxRuntimeRunner(model, threads=1).run({"q": q, "k": k, "m": m, "c": np.array(True)})
        assert list(got) == ["y", "z"]
        np.testing.assert_allclose(got["y"], expected, atol=1e-5)
        np.testing.assert_allclose(got["z"], expected, atol=1e-5)


def test_a_child_runs_every_sample(tmp_path: Path) -> None:
    model, feeds, outputs = tmp_path / "m.onnx", tmp_path / "feeds.safetensors", tmp_path / "outputs.safetensors"
    model.write_bytes(
        _model("g (bfloat16[n] x, int64[] k) => (float[n] y) { t = Cast<to=1>(x) f = Cast<to=1>(k) y = Add(t, f) }")
    )
    samples = {f"{i}/x": np.full(i + 1, i, ml_dtypes.bfloat16) for i in range(3)}
    save_tensors(feeds, samples | {f"{i}/k": np.array(10, np.int64) for i in range(3)}, {})
    events: list[dict[str, object]] = []
    facts = run_onnx(model, feeds, outputs, threads=1, extra_outputs=["t"], on_event=events.append)
    tensors, metadata = load_tensors(outputs)
    assert {name: array.tolist() for name, array in tensors.items()} == {
        **{f"{i}/y": [10.0 + i] * (i + 1) for i in range(3)},
        **{f"{i}/t": [float(i)] * (i + 1) for i in range(3)},
    }
    assert metadata["runner"] == facts["runner"] == "onnxruntime"
    assert facts["samples"] == 3
    assert facts["provider"] == "CPUExecutionProvider"
    assert [event["done"] for event in events] == [1, 2, 3]


def test_errors_cross_from_the_child(tmp_path: Path) -> None:
    model, feeds = tmp_path / "m.onnx", tmp_path / "feeds.safetensors"
    model.write_bytes(AFFINE)
    save_tensors(feeds, {"0/x": np.ones((1, 2), np.float32)}, {})
    with pytest.raises(ConfigError, match="input 'b' is missing"):
        run_onnx(model, feeds, tmp_path / "out.safetensors")
    save_tensors(feeds, {"x": np.ones((1, 2), np.float32)}, {})
    with pytest.raises(ConfigError, match="<sample>/<input>"):
        run_onnx(model, feeds, tmp_path / "out.safetensors")
    save_tensors(feeds, {}, {})
    with pytest.raises(ConfigError, match="holds no tensors"):
        run_onnx(model, feeds, tmp_path / "out.safetensors")


def test_a_native_crash_is_an_error_and_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An onnxruntime that reads address 0, as its fp16 kernels have done.
    (tmp_path / "onnxruntime.py").write_text("import ctypes\nctypes.string_at(0)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    model, feeds = tmp_path / "m.onnx", tmp_path / "feeds.safetensors"
    model.write_bytes(AFFINE)
    save_tensors(feeds, {"0/x": np.ones((1, 2), np.float32)}, {})
    with pytest.raises(ChildCrashError) as caught:
        run_onnx(model, feeds, tmp_path / "o")
    assert caught.value.signal == "SIGSEGV"


@pytest.mark.parametrize("asked", ["1", "3", "5,2"])
def test_omp_num_threads_holds_for_onnxruntime_too(asked: str, tmp_path: Path) -> None:
    (model := tmp_path / "affine.onnx").write_bytes(AFFINE)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from trtforge.runtime.onnx_runner import OnnxRuntimeRunner as Runner\n"
        "Runner(Path(sys.argv[1])); before = os.listdir('/proc/self/task')\n"  # whatever the first one starts for good
        "runner = Runner(Path(sys.argv[1])); print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": asked}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True, env=environment
    )
    # The calling thread is one of them.
    assert int(done.stdout) == int(asked.partition(",")[0]) - 1
