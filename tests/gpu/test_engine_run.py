"""Engines built and run on this GPU, against numpy."""

from __future__ import annotations

import contextlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import trt_models as models
from onnx.reference import ReferenceEvaluator

from trtforge.runtime.device import device_facts, gpu_present
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.runner import Runner
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.runtime.trt.build import BuildRequest, build_engine
from trtforge.runtime.trt.execute import EngineRunner, inspect_engine, run_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_present(), reason="there is no GPU here")]

CONV_PROFILE = {"x": ((1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))}
MATMUL = "g (float[n,256] x) => (float[n,256] y) <float[256,256] w> { y = MatMul(x, w) }"


def _engine(folder: Path, text: str, profiles=(), *, tf32: bool = False, opset: int = 20) -> Path:
    path = models.write(folder, text, opset=opset)
    request = BuildRequest(path, folder / "model.engine", "auto", tuple(profiles), tf32=tf32)
    return build_engine(request).path


def _runner(engine: Path):
    return contextlib.closing(EngineRunner(engine))


def _reference(folder: Path, feeds):
    model = onnx.load(folder / "model.onnx")
    return dict(zip([o.name for o in model.graph.output], ReferenceEvaluator(model).run(None, feeds), strict=True))


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_fp32_with_a_dynamic_batch_at_min_opt_and_max(tmp_path):
    with _runner(_engine(tmp_path, models.CONV, [CONV_PROFILE])) as runner:
        described: Runner = runner
        assert described.inputs[0].shape == ("x[0]", 2, 8, 8)
        assert described.outputs[0].dtype == "float32"
        assert runner.profiles == (CONV_PROFILE,)
        kept = []
        for batch in (1, 2, 4, 3, 1):
            feeds = {"x": _normal(batch, 2, 8, 8, seed=batch)}
            result = runner.run(feeds)["y"]
            assert result.shape == (batch, 3, 6, 6)
            kept.append((result, _reference(tmp_path, feeds)["y"]))
        for result, expected in kept:  # after all runs: an output that a later run overwrote would show
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_fp32_is_not_tf32(tmp_path):
    x = _normal(64, 256)
    exact = x.astype(np.float64) @ ((np.arange(256 * 256) % 7 - 3).reshape(256, 256) / 8)
    errors = {}
    for tf32 in (False, True):
        folder = tmp_path / str(tf32)
        folder.mkdir()
        engine = _engine(folder, MATMUL, [{"x": ((1, 256), (64, 256), (64, 256))}], tf32=tf32)
        save_tensors(folder / "in.safetensors", {"s/x": x})
        # In processes of their own: one with TF32 spoils its process for those without.
        run_engine(engine, "auto", folder / "in.safetensors", folder / "out.safetensors", tf32=tf32)
        produced = load_tensors(folder / "out.safetensors")[0]["s/y"]
        errors[tf32] = np.abs(produced - exact).max() / exact.std()
    assert errors[False] < 2e-5
    assert 1e-4 < errors[True] < 3e-3


def test_fp16_and_bf16_with_casts_inside(tmp_path):
    for code, tolerance in ((10, 1e-2), (16, 8e-2)):  # TensorProto.FLOAT16, BFLOAT16
        text = f"""g (float[n,64] x) => (float[n,64] y) <float[64,64] w> {{
          xh = Cast<to = {code}>(x) wh = Cast<to = {code}>(w) h = MatMul(xh, wh) y = Cast<to = 1>(h)
        }}"""
        folder = tmp_path / str(code)
        folder.mkdir()
        with _runner(_engine(folder, text, [{"x": ((1, 64), (8, 64), (16, 64))}])) as runner:
            for rows in (1, 8, 16):
                x = _normal(rows, 64)
                exact = x @ ((np.arange(64 * 64) % 7 - 3).reshape(64, 64) / 8).astype(np.float32)
                error = np.abs(runner.run({"x": x})["y"] - exact).max() / exact.std()
                assert 0 < error < tolerance


def test_int64_bool_and_low_precision_inputs_and_outputs(tmp_path):
    text = """g (int64[n] i, bool[n] m, bfloat16[n] b, float16[n] h) =>
        (int64[n] yi, bool[n] ym, bfloat16[n] yb, float16[n] yh, int32[n] y32) {
      yi = Add(i, i) ym = Not(m) yb = Neg(b) yh = Neg(h) y32 = Cast<to = 6>(i)
    }"""
    profile = dict.fromkeys("imbh", ((1,), (3,), (5,)))
    feeds = {
        "i": np.array([-(2**40), 0, 7]),
        "m": np.array([True, False, True]),
        "b": np.array([1.5, -2, 3e38]).astype(ml_dtypes.bfloat16),
        "h": np.array([1.5, -2, 65504], np.float16),
    }
    with _runner(_engine(tmp_path, text, [profile], opset=22)) as runner:
        result = runner.run(feeds)
    expected = {"yi": feeds["i"] * 2, "ym": ~feeds["m"], "yb": -feeds["b"], "yh": -feeds["h"]}
    for name, array in expected.items():
        assert result[name].dtype == array.dtype, name
        np.testing.assert_array_equal(result[name], array, err_msg=name)
    assert result["y32"].dtype == np.int32


def test_two_profiles_are_chosen_by_shape_and_on_demand(tmp_path):
    small = {"x": ((1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))}
    large = {"x": ((4, 2, 8, 8), (8, 2, 8, 8), (16, 2, 8, 8))}
    with _runner(_engine(tmp_path, models.CONV, [small, large])) as runner:
        assert runner.profiles == (small, large)
        for batch, profile in ((1, None), (16, None), (4, 0), (4, 1), (4, None), (2, None), (8, 1), (1, 0)):
            feeds = {"x": _normal(batch, 2, 8, 8, seed=batch)}
            result = runner.run(feeds, profile=profile)["y"]
            np.testing.assert_allclose(result, _reference(tmp_path, feeds)["y"], rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match=r"profile 0 of the engine does not hold x \[16, 2, 8, 8\]"):
            runner.run({"x": _normal(16, 2, 8, 8)}, profile=0)


def test_strided_big_endian_and_scalar_inputs(tmp_path):
    text = "g (float[4,6] x, float s) => (float[4,6] y) { y = Mul(x, s) }"
    with _runner(_engine(tmp_path, text)) as runner:
        x = _normal(6, 4).T
        for given in (x, x[:, ::-1], np.ascontiguousarray(x).astype(">f4")):
            result = runner.run({"x": given, "s": np.array(3, np.float32)})["y"]
            np.testing.assert_array_equal(result, np.float32(3) * given.astype(np.float32))


def test_wrong_feeds_are_config_errors_and_leave_the_runner_usable(tmp_path):
    with _runner(_engine(tmp_path, models.CONV, [CONV_PROFILE])) as runner:
        good = {"x": _normal(2, 2, 8, 8)}
        for feeds, says in (
            ({}, "input 'x' is missing"),
            ({**good, "xx": good["x"]}, "did you mean 'x'?"),
            ({"x": good["x"].astype(np.float64)}, "is float64, and the engine takes float32"),
            ({"x": _normal(5, 2, 8, 8)}, "no profile of the engine holds x [5, 2, 8, 8]"),
            ({"x": _normal(2, 2, 8, 9)}, "no profile of the engine holds"),
            ({"x": _normal(2, 2, 8)}, "no profile of the engine holds"),
        ):
            with pytest.raises(ConfigError) as caught:
                runner.run(feeds)
            assert says in str(caught.value)
            assert caught.value.fix
        np.testing.assert_allclose(runner.run(good)["y"], _reference(tmp_path, good)["y"], rtol=1e-5, atol=1e-5)


def test_two_runners_live_side_by_side_and_beside_torch(tmp_path):
    torch = pytest.importorskip("torch")
    before = torch.ones(4, device="cuda")
    engine = _engine(tmp_path, models.STATIC)
    x = _normal(2, 4)
    with _runner(engine) as one, _runner(engine) as two:
        for runner in (one, two, one):
            np.testing.assert_array_equal(runner.run({"x": x})["y"], np.maximum(x, 0))
    assert (before + 1).sum().item() == 8


def test_samples_run_in_a_child(tmp_path):
    engine = _engine(tmp_path, models.CONV, [CONV_PROFILE])
    feeds = {f"s{batch}/x": _normal(batch, 2, 8, 8, seed=batch) for batch in (1, 2, 4)}
    save_tensors(tmp_path / "in.safetensors", feeds)
    events = []
    out = tmp_path / "out.safetensors"
    answer = run_engine(engine, "auto", tmp_path / "in.safetensors", out, events.append, profiles={"s2": 0})
    results, metadata = load_tensors(out)
    device = device_facts()
    assert device is not None
    assert (answer["samples"], answer["device"], metadata["runner"]) == (3, device.name, answer["runner"])
    assert [event["done"] for event in events if event["event"] == "progress"] == [1, 2, 3]
    for key, x in feeds.items():
        expected = _reference(tmp_path, {"x": x})["y"]
        np.testing.assert_allclose(results[key.replace("/x", "/y")], expected, rtol=1e-5, atol=1e-5)


def test_the_inspector_lists_layers(tmp_path):
    facts = inspect_engine(_engine(tmp_path, models.CONV, [CONV_PROFILE]), "auto")
    assert facts["inputs"][0]["name"] == "x"
    assert facts["profiles"][0]["x"][2] == [4, 2, 8, 8]
    assert facts["layers"]["Layers"]


def test_a_damaged_engine_is_an_artifact_error(tmp_path):
    engine = _engine(tmp_path, models.STATIC)
    save_tensors(tmp_path / "in.safetensors", {"s0/x": _normal(2, 4)})
    data = bytearray(engine.read_bytes())
    data[64:2048] = bytes(2048 - 64)
    engine.write_bytes(data)
    with pytest.raises(ArtifactError):
        run_engine(engine, "auto", tmp_path / "in.safetensors", tmp_path / "out.safetensors")
