"""Calibration end to end: the cache, its file, and when it is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from trtforge.calibration.auto import choose_ranges
from trtforge.calibration.cache import differences, load_ranges, save_ranges
from trtforge.calibration.calibrate import calibrate, run_shard
from trtforge.calibration.collect import Shard, merge_collected
from trtforge.calibration.ranges import MadeFrom, Ranges, TensorRange, quant_scale
from trtforge.runtime.errors import ArtifactError, CalibrationError
from trtforge.runtime.graph import OnnxModel, describe_model, load_graph
from trtforge.runtime.specs import InputSpec

SPECS = (InputSpec("x", "float32", ("n", 8)),)
TENSORS = ("x", "b")
DATA = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
GOLDEN = Path(__file__).parent / "golden" / "calibration_v1.json"


def write_model(path: Path, factor: float = 1.0) -> OnnxModel:
    text = "agraph (float[n, 8] x) => (float[n, 4] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> ' + text)
    rng = np.random.default_rng(1)
    for name, shape in (("w", (8, 6)), ("v", (6, 4))):
        array = (rng.standard_normal(shape) * factor).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    return describe_model(load_graph(path), path)


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    return write_model(tmp_path / "m.onnx")


def test_ranges_and_where_they_come_from(model: OnnxModel) -> None:
    found = calibrate(model, TENSORS, [DATA], SPECS, method="max")
    assert found.ranges["x"].amax == np.abs(DATA).max()
    assert found.ranges["x"].scale("int8") == np.float32(np.abs(DATA).max()) / np.float32(127)
    made = found.ranges.made_from
    assert (made.graph, made.samples, made.method, made.provider) == (model.hash, 12, "max", "cpu")
    assert made.shapes == {"x": ((8,),)}
    assert set(found.histograms) == set(TENSORS)
    assert (found.reused, found.why_not) == (False, ())


def test_scales_are_equal_to_the_bit_however_the_data_comes(model: OnnxModel) -> None:
    shuffled = np.random.default_rng(1).permutation(DATA)
    runs = [calibrate(model, TENSORS, list(np.split(shuffled, n)), SPECS).ranges for n in (1, 3, 12)]
    shards = [run_shard(model, TENSORS, [DATA], SPECS, Shard(i, 5)) for i in range(1, 6)]
    runs.append(choose_ranges(merge_collected(shards)))
    assert all(run == runs[0] for run in runs)


def test_the_cache_is_used_only_where_everything_matches(model: OnnxModel, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "calibration.json"
    first = calibrate(model, TENSORS, [DATA], SPECS, cache=cache)
    again = calibrate(model, TENSORS, [DATA[6:], DATA[:6]], SPECS, cache=cache)
    assert again.reused
    assert again.ranges == first.ranges
    assert calibrate(model, ("b",), [DATA], SPECS, cache=cache).reused

    other = calibrate(model, TENSORS, [DATA + 1], SPECS, cache=cache)
    assert not other.reused
    assert any(why.startswith("the data was") for why in other.why_not)
    other = calibrate(model, TENSORS, [DATA + 1], SPECS, cache=cache, method="max")
    assert any("the method was 'auto 1' and is 'max'" in why for why in other.why_not)
    other = calibrate(model, TENSORS, [DATA[:5] + 1], SPECS, cache=cache, method="max")
    assert any("samples was 12 and is 5" in why for why in other.why_not)
    changed = write_model(tmp_path / "other.onnx", 2.0)
    other = calibrate(changed, TENSORS, [DATA], SPECS, cache=cache)
    assert other.why_not == (f"the model was {model.hash[:12]!r} and is {changed.hash[:12]!r}",)
    iterator = calibrate(changed, TENSORS, iter([DATA]), SPECS, cache=cache)
    assert "iterator" in iterator.why_not[0]


def test_tensors_that_the_cache_lacks(model: OnnxModel, tmp_path: Path) -> None:
    cache = tmp_path / "calibration.json"
    calibrate(model, ("x",), [DATA], SPECS, cache=cache)
    found = calibrate(model, TENSORS, [DATA], SPECS, cache=cache)
    assert found.why_not == ("1 tensors have no range, 'b' first",)
    assert calibrate(model, TENSORS, [DATA], SPECS, cache=cache).reused


def test_a_damaged_cache_is_made_anew_and_said(model: OnnxModel, tmp_path: Path) -> None:
    cache = tmp_path / "calibration.json"
    cache.write_text("{")
    found = calibrate(model, TENSORS, [DATA], SPECS, cache=cache)
    assert "is not JSON" in found.why_not[0]
    assert load_ranges(cache) == found.ranges


def test_a_method_that_does_not_exist_is_found_before_anything_runs(model: OnnxModel) -> None:
    with pytest.raises(CalibrationError, match=r"no calibration method 'entropie'(.|\n)*'entropy'"):
        calibrate(model, TENSORS, [], SPECS, method="entropie")  # type: ignore[arg-type]


def golden_ranges() -> Ranges:
    made = MadeFrom(
        graph="a" * 64,
        data="b" * 64,
        samples=128,
        shapes={"x": ((3, 224, 224), (3, 256, 256))},
        method="auto 1",
        provider="cpu",
        versions={"trtforge": "0.1.0", "onnxruntime": "1.32.0"},
        batch="sample",
    )
    tensors = {
        "conv": TensorRange(2.5, "mse", 3.0, 0.001, 38.25, 1000, "clipping gains 1.20 dB"),
        "zero": TensorRange(0.0, "max", 0.0, 0.0, None, 10, "all zero"),
        "imported": TensorRange(0.1, "imported"),
    }
    return Ranges(tensors, made)


def test_golden_file(tmp_path: Path) -> None:
    assert load_ranges(GOLDEN) == golden_ranges()
    save_ranges(tmp_path / "c.json", golden_ranges())
    assert (tmp_path / "c.json").read_bytes() == GOLDEN.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2; this trtforge reads 1"),
        ({"kind": "else"}, "is no trtforge calibration file"),
        ({"tensors": {"a": {"amax": -1.0, "method": "max"}}}, "damaged"),
        ({"tensors": {"a": {"unknown": 1}}}, "damaged"),
        ({"made_from": {}}, "damaged"),
    ],
)
def test_files_that_are_wrong(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**json.loads(GOLDEN.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        load_ranges(path)


def test_differences_name_both_values() -> None:
    cached = golden_ranges()
    wanted = replace(cached.made_from, provider="cuda", versions={"trtforge": "0.2.0", "onnxruntime": "1.32.0"})
    assert differences(cached, wanted, ["conv"]) == (
        "the onnxruntime provider was 'cpu' and is 'cuda'",
        "the versions was onnxruntime 1.32.0, trtforge 0.1.0 and is onnxruntime 1.32.0, trtforge 0.2.0",
    )


def test_scales() -> None:
    assert quant_scale(127.0, "int8") == 1.0
    assert quant_scale(448.0, "fp8") == 1.0
    assert quant_scale(0.0, "int8") == 1.0
    assert quant_scale(1e-40, "int8") == 2.0**-126
    for amax in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CalibrationError, match="has no scale"):
            quant_scale(amax, "int8")
    rng = np.random.default_rng(0)
    for amax in np.exp(rng.uniform(-80, 80, 2000)).astype(np.float32):
        assert quant_scale(float(amax), "int8") == amax / np.float32(127)
    with pytest.raises(CalibrationError, match="'y' has no range"):
        golden_ranges()["y"]
