"""Collecting: the same state to the bit for any batch size, order and sharding, with onnxruntime itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from trtforge.calibration import parts
from trtforge.calibration.collect import Collected, Shard, collect, merge_collected, scan
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.stream import count_workers
from trtforge.calibration.taps import Taps
from trtforge.runtime.errors import ArtifactError, CalibrationError
from trtforge.runtime.graph import OnnxModel, describe_model, load_graph
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

CNN = """agraph (float[batch, 3, 16, 16] x) => (float[batch, 5] y) {
    a = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(x, w1, b1)
    b = Relu(a)
    c = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=16>(b, w2)
    d = Clip(c, zero, six)
    e = Conv<kernel_shape=[1, 1]>(d, w3)
    f = Add(e, b)
    g = Conv<kernel_shape=[1, 1]>(f, w4)
    h = GlobalAveragePool(g)
    i = Flatten(h)
    y = Gemm<transB=1>(i, w5)
    unused = Sigmoid(y)
}"""
WEIGHTS = {
    "w1": (16, 3, 3, 3),
    "b1": (16,),
    "w2": (16, 1, 3, 3),
    "w3": (16, 16, 1, 1),
    "w4": (20, 16, 1, 1),
    "w5": (5, 20),
}
TENSORS = ("x", "b", "d", "e", "f", "g", "i")


@pytest.fixture
def cnn(tmp_path: Path) -> OnnxModel:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) / 3 for name, shape in WEIGHTS.items()}
    arrays |= {"zero": np.float32(0), "six": np.float32(6)}
    return write_model(tmp_path / "cnn.onnx", CNN, arrays)


def write_model(path: Path, text: str, arrays: dict[str, np.ndarray]) -> OnnxModel:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> ' + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items())
    onnx.save(onnx.shape_inference.infer_shapes(proto), path)
    return describe_model(load_graph(path), path)


def images(count: int = 33) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, 3, 16, 16)).astype(np.float32)


def batches(data: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
    return [{"x": data[i : i + size]} for i in range(0, len(data), size)]


def assert_same(found: Collected, expected: Collected) -> None:
    assert found.histograms == expected.histograms
    assert (found.samples, found.data, found.shapes) == (expected.samples, expected.data, expected.shapes)


def test_counts_what_the_model_computes(cnn: OnnxModel) -> None:
    data = images(4)
    found = collect(cnn, TENSORS, batches(data, 4))
    runner = OnnxRuntimeRunner(cnn.path, extra_outputs=TENSORS, threads=1)
    expected = {name: Histogram() for name in TENSORS}
    for row in data:
        for name, array in runner.run({"x": row[None]}).items():
            if name in expected:
                expected[name].add(array)
    assert found.histograms == expected
    assert found.samples == 4
    assert found.shapes == {"x": {(3, 16, 16)}}


@pytest.mark.parametrize("size", [8, 32])
def test_batch_size_does_not_matter(cnn: OnnxModel, size: int) -> None:
    assert_same(collect(cnn, TENSORS, batches(images(), size)), collect(cnn, TENSORS, batches(images(), 1)))


def test_order_and_workers_do_not_matter(cnn: OnnxModel) -> None:
    data = images()
    shuffled = np.random.default_rng(0).permutation(data)
    expected = collect(cnn, TENSORS, batches(data, 8), workers=1)
    assert_same(collect(cnn, TENSORS, batches(shuffled, 5), workers=3), expected)


@pytest.mark.parametrize("total", [1, 2, 7])
def test_shards_merge_to_the_whole(cnn: OnnxModel, total: int, tmp_path: Path) -> None:
    files = []
    for index in range(1, total + 1):
        part = collect(cnn, TENSORS, batches(images(), 8), shard=Shard(index, total))
        files.append(tmp_path / f"part{index}.json")
        parts.save_part(files[-1], part)
    merged = merge_collected([parts.load_part(path) for path in reversed(files)])
    assert_same(merged, collect(cnn, TENSORS, batches(images(), 32)))


def test_a_hidden_layer_whose_kernel_depends_on_the_batch(tmp_path: Path) -> None:
    # onnxruntime sums a Gemm of one row in another order than one of eight: the states agree all the same.
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((257, 300)).astype(np.float32),
        "v": rng.standard_normal((300, 9)).astype(np.float32),
    }
    text = "agraph (float[n, 257] x) => (float[n, 9] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    model = write_model(tmp_path / "mlp.onnx", text, arrays)
    data = rng.standard_normal((16, 257)).astype(np.float32)
    runs = [collect(model, ("x", "b"), batches(data, size)) for size in (1, 8, 16)]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_a_model_of_fixed_batch_runs_in_the_loaders_batches(tmp_path: Path) -> None:
    text = "agraph (float[4, 3] x) => (float[4, 2] y) { y = MatMul(x, w) }"
    model = write_model(tmp_path / "fixed.onnx", text, {"w": np.ones((3, 2), np.float32)})
    found = collect(model, ("x", "y"), [{"x": np.ones((4, 3), np.float32)}] * 2)
    assert (found.samples, found.batch, found.histograms["y"].count) == (8, "loader", 16)


def test_blocked_images_leave_the_runtime_unordered_but_equal(cnn: OnnxModel) -> None:
    data = images(2)
    taps = Taps(cnn.path, TENSORS, threads=1, provider="cpu")
    before = taps.run({"x": data[:1]})
    taps.settle({"x": data[:1]})
    after = taps.run({"x": data[:1]})
    assert set(before) == set(after) == set(TENSORS)
    for name in TENSORS:
        np.testing.assert_array_equal(np.sort(before[name], axis=None), np.sort(after[name], axis=None))


def test_a_sample_is_read_a_few_tensors_at_a_time(cnn: OnnxModel) -> None:
    taps = Taps(cnn.path, TENSORS, threads=1, provider="cpu")
    taps.settle({"x": images(1)})
    read = taps.reader()
    for data in np.split(images(3), 3):
        parts = [{name: array.copy() for name, array in part.items()} for part in read({"x": data})]
        assert [len(part) for part in parts] == [1, 4, 2]
        whole = taps.run({"x": data})
        for name, array in (item for part in parts for item in part.items()):
            np.testing.assert_array_equal(array, whole[name])


@pytest.mark.parametrize(("asked", "workers"), [("1", 1), ("3,2", 3), ("99", 8)])
def test_omp_num_threads_holds_for_samples_side_by_side(
    monkeypatch: pytest.MonkeyPatch, asked: str, workers: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert count_workers(by_sample=True) == workers
    assert count_workers(by_sample=False) == 1


def test_only_what_is_asked_for_runs(cnn: OnnxModel) -> None:
    taps = Taps(cnn.path, ("b",), threads=1, provider="cpu")
    assert taps._optimized is not None
    operators = {node.op_type for node in taps._optimized.graph.node}
    assert operators <= {"Conv", "FusedConv", "Relu", "ReorderOutput", "ReorderInput"}


def test_inputs_alone_need_no_session(cnn: OnnxModel) -> None:
    assert collect(cnn, ("x",), batches(images(3), 2)).histograms["x"].count == 3 * 3 * 16 * 16


def test_subgraphs_keep_what_they_read(tmp_path: Path) -> None:
    text = """agraph (float[n, 3] x, bool c) => (float[n, 3] y) {
        a = Relu(x)
        b = Neg(x)
        r = If<then_branch = g1 () => (float[n, 3] t) { t = Identity(a) },
               else_branch = g2 () => (float[n, 3] e) { e = Identity(b) }>(c)
        y = Mul(r, r)
    }"""
    model = write_model(tmp_path / "if.onnx", text, {})
    feeds = {"x": np.array([[1, -2, 3]], np.float32), "c": np.array(True)}
    assert collect(model, ("r",), [feeds]).histograms["r"].peak == 3.0


def test_unknown_tensor(cnn: OnnxModel) -> None:
    with pytest.raises(CalibrationError, match="no tensor 'bb' to calibrate"):
        collect(cnn, ("bb",), batches(images(1), 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_named(cnn: OnnxModel, bad: float) -> None:
    data = images(6)
    data[4] = 3e38 if bad == np.inf else np.nan
    with pytest.raises(CalibrationError, match=r"tensor '\w' in batch 2, sample 0 holds"):
        collect(cnn, TENSORS, batches(data, 2))
    data[0] = data[4]
    with pytest.raises(CalibrationError, match=r"tensor '\w' in batch 0, sample 0 holds"):
        collect(cnn, TENSORS, batches(data, 2))


def test_an_exception_of_the_loader_passes_through(cnn: OnnxModel) -> None:
    class LoaderError(Exception):
        pass

    def loader() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": images(2)}
        raise LoaderError("disk")

    with pytest.raises(LoaderError, match="disk"):
        collect(cnn, TENSORS, loader())


def test_progress_counts_samples(cnn: OnnxModel) -> None:
    seen: list[int] = []
    collect(cnn, ("b",), batches(images(7), 3), on_samples=seen.append)
    assert seen == list(range(1, 8))


def test_scan_sees_the_data_as_collect_does(cnn: OnnxModel) -> None:
    found, scanned = collect(cnn, ("b",), batches(images(9), 4)), scan(cnn, batches(images(9), 9))
    assert (scanned.samples, scanned.data, scanned.shapes, scanned.batch) == (9, found.data, found.shapes, found.batch)
    other = images(9)
    other[8, 2, 15, 15] += 1
    assert scan(cnn, batches(other, 9)).data != found.data


def test_shards_that_do_not_make_a_whole(cnn: OnnxModel) -> None:
    half = collect(cnn, ("b",), batches(images(8), 4), shard=Shard(1, 2))
    with pytest.raises(CalibrationError, match="missing: shard 2/2"):
        merge_collected([half])
    with pytest.raises(CalibrationError, match="twice: shard 1/2"):
        merge_collected([half, half])
    with pytest.raises(CalibrationError, match="different tensors"):
        merge_collected([half, collect(cnn, ("d",), batches(images(8), 4), shard=Shard(2, 2))])
    with pytest.raises(CalibrationError, match="shard 9/9 has no samples"):
        collect(cnn, ("b",), batches(images(8), 4), shard=Shard(9, 9))
    with pytest.raises(CalibrationError, match="shard 3/2 does not exist"):
        Shard(3, 2)
    with pytest.raises(CalibrationError, match="no parts"):
        merge_collected([])


def test_damaged_parts(cnn: OnnxModel, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    parts.save_part(path, collect(cnn, ("b",), batches(images(2), 2)))
    text = path.read_text()
    path.write_text(text.replace('"peak": ', '"peak": 7'))
    with pytest.raises(ArtifactError, match="damaged"):
        parts.load_part(path)
    path.write_text(text[:50])
    with pytest.raises(ArtifactError, match="not JSON"):
        parts.load_part(path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="is no trtforge calibration part file"):
        parts.load_part(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        parts.load_part(tmp_path / "none.json")
