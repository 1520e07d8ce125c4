"""`Engine` on this GPU: torch tensors in and out, CUDA graphs, streams, threads, binding, the runtime cache."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
import trt_models as models
from onnx.reference import ReferenceEvaluator

from trtforge.runtime.device import gpu_present
from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.build import BuildRequest, build_engine
from trtforge.runtime.trt.execute import EngineRunner
from trtforge.runtime.trt.runtime_cache import cache_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu_present(), reason="there is no GPU here")]

# Two outputs, one of lower rank; a chain long enough that overlapping runs would meet in its scratch memory. The gain
# keeps float32's error at 3e-5, and TF32's at 6e-3 (without it 1e-4 and 0.1, and a GPU's sums in order give 1e-3).
WIDE = """g (float[n,256] x) => (float[n,256] y, float[n] z)
<float[256,256] w, int64[1] last = {1}, float gain = {0.0625}> {
  a = MatMul(x, w)
  a1 = Mul(a, gain)
  b = Tanh(a1)
  c = MatMul(b, w)
  c1 = Mul(c, gain)
  d = Tanh(c1)
  e = MatMul(d, w)
  y = Add(e, x)
  z = ReduceSum<keepdims = 0>(e, last)
}"""
TWO_INPUTS = "g (float[n,8] a, float[n,8] b) => (float[n,8] y) { y = Sub(a, b) }"
# Convolution, normalisation, pooling and a head, all dynamic in the batch and the image's size.
CNN = """g (float[n,3,h,w] x) => (float[n,10] y) <float[16,3,3,3] k1, float[16,16,3,3] k2, float[16,10] m> {
  a = Conv<pads = [1, 1, 1, 1]>(x, k1)
  b = Relu(a)
  c = Conv<pads = [1, 1, 1, 1]>(b, k2)
  d = Relu(c)
  e = GlobalAveragePool(d)
  f = Flatten(e)
  y = MatMul(f, m)
}"""


def _rows(*batches: int, tail: tuple[int, ...] = (256,), name: str = "x"):
    return {name: tuple((batch, *tail) for batch in batches)}


ONE = (_rows(1, 8, 64),)
OVERLAPPING = (_rows(1, 4, 16), _rows(8, 32, 64))


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Builds a graph once for all tests: text and profiles to the engine's path."""
    done: dict[tuple[str, str], Path] = {}

    def build(text: str, profiles) -> Path:
        key = (text, repr(profiles))
        if key not in done:
            folder = tmp_path_factory.mktemp("engine")
            path = models.write(folder, text)
            done[key] = build_engine(
                BuildRequest(path, folder / "model.engine", "auto", tuple(profiles), tf32=False)
            ).path
        return done[key]

    return build


def _load(path: Path, **limits) -> Engine:
    backend = find_backend("auto")
    return Engine(path, backend=backend.name, version=backend.version, device=None, **limits)


def _reference(path: Path, **feeds: torch.Tensor) -> list[np.ndarray]:
    model = onnx.load(path.parent / "model.onnx")
    return ReferenceEvaluator(model).run(None, {name: tensor.cpu().numpy() for name, tensor in feeds.items()})


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).cuda()


def _wide(weights: np.ndarray, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What WIDE computes, in float64."""
    w = torch.from_numpy(weights).double().to(x.device)
    e = torch.tanh(torch.tanh(x.double() @ w / 16) @ w / 16) @ w
    return e + x, e.sum(1)


def _weights(path: Path) -> np.ndarray:
    (found,) = [t for t in onnx.load(path.parent / "model.onnx").graph.initializer if t.name == "w"]
    return np.array(onnx.numpy_helper.to_array(found))


def _close(y: torch.Tensor, expected, tolerance: float = 5e-4) -> None:
    torch.testing.assert_close(
        y.double().cpu(), torch.as_tensor(expected).double().cpu(), rtol=tolerance, atol=tolerance
    )


def test_the_proof_runs_the_kernels_that_a_user_runs(built):
    path = built(CNN, ({"x": ((1, 3, 16, 16), (4, 3, 32, 32), (8, 3, 64, 64))},))
    inputs = [_normal(batch, 3, size, size, seed=batch) for batch, size in [(1, 16), (4, 32), (8, 64), (3, 48)]]
    with contextlib.closing(EngineRunner(path)) as runner, _load(path) as engine:
        for x in inputs:
            proved = runner.run({"x": x.cpu().numpy()})["y"]
            for _ in range(3):  # at once, captured, and replayed
                np.testing.assert_array_equal(engine(x).cpu().numpy(), proved)


@pytest.mark.parametrize("graphs", [0, 4, 32])
def test_dynamic_shapes_equal_the_reference_and_no_output_is_overwritten(built, graphs):
    path = built(WIDE, ONE)
    weights = _weights(path)
    with _load(path, graphs=graphs) as engine:
        kept = []
        for number, batch in enumerate([1, 8, 64, 8, 8, 1, 1, 1, 33, 64, 64, 33, 33, 2, 3, 4, 5, 6, 7, 8, 1, 64]):
            x = _normal(batch, 256, seed=number)
            kept.append((x, engine(x)))
        assert engine.graphs <= graphs
        assert bool(engine.graphs) == bool(graphs)
    for x, out in kept:
        y, z = _wide(weights, x)
        _close(out["y"], y)
        _close(out["z"], z, 2e-3)
    x, out = kept[0]
    y, z = _reference(path, x=x)
    _close(out["y"], y)


def test_two_dynamic_dimensions_equal_onnxruntime(built):
    path = built(CNN, ({"x": ((1, 3, 8, 8), (2, 3, 32, 32), (4, 3, 64, 64))},))
    reference = OnnxRuntimeRunner(path.parent / "model.onnx")
    with _load(path) as engine:
        for turn in range(3):
            for shape in [(1, 3, 8, 8), (2, 3, 32, 32), (4, 3, 64, 64), (3, 3, 17, 45)]:
                x = _normal(*shape, seed=turn)
                _close(engine(x), reference.run({"x": x.cpu().numpy()})["y"], 1e-3)


def test_several_profiles_are_chosen_and_mixed(built):
    path = built(WIDE, OVERLAPPING)
    weights = _weights(path)
    with _load(path) as engine:
        assert [profile["x"][1] for profile in engine.profiles] == [(4, 256), (32, 256)]
        kept = []
        for number in range(40):
            x = _normal([1, 4, 8, 12, 16, 17, 32, 64][number % 8], 256, seed=number)
            kept.append((x, engine(x)["y"]))
        assert engine.graphs == 8
    for x, y in kept:
        _close(y, _wide(weights, x)[0])


def test_a_replayed_graph_gives_the_same_bits_as_no_graph(built):
    path = built(WIDE, ONE)
    with _load(path) as engine, _load(path, graphs=0) as plain:
        for number in range(12):
            x = _normal([3, 17, 64][number % 3], 256, seed=number)
            a, b = engine(x), plain(x)
            assert torch.equal(a["y"], b["y"])
            assert torch.equal(a["z"], b["z"])
        assert engine.graphs == 3


def test_inputs_by_position_and_by_name(built):
    profiles = ({**_rows(1, 2, 4, tail=(8,), name="a"), **_rows(1, 2, 4, tail=(8,), name="b")},)
    a, b = _normal(2, 8), _normal(2, 8, seed=1)
    with _load(built(TWO_INPUTS, profiles)) as engine:
        for _ in range(3):
            for y in (engine(a, b), engine(a, b=b), engine(b=b, a=a), engine.run({"b": b, "a": a})["y"]):
                assert torch.equal(y, a - b)


@pytest.mark.parametrize(
    ("dtype", "onnx_type"),
    [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.int64, "int64"), (torch.int32, "int32"),
     (torch.bool, "bool")],
)  # fmt: skip
def test_dtypes(built, dtype, onnx_type):
    operator = "Not(x)" if dtype is torch.bool else "Add(x, x)"
    text = f"g ({onnx_type}[n,8] x) => ({onnx_type}[n,8] y) {{ y = {operator} }}"
    x = (_normal(3, 8) * 10).to(dtype)
    with _load(built(text, (_rows(1, 2, 4, tail=(8,)),))) as engine:
        for _ in range(3):
            y = engine(x)
            assert y.dtype is dtype
            assert torch.equal(y, ~x if dtype is torch.bool else x + x)


def test_numpy_and_dlpack(built):
    path = built(WIDE, ONE)
    x = _normal(5, 256)
    with _load(path) as engine:
        expected = engine(x)["y"].cpu().numpy()
        given = engine(x.cpu().numpy())
        assert engine.copies == 3
        np.testing.assert_array_equal(given["y"], expected)

        class Foreign:
            def __dlpack__(self, **kwargs):
                return x.__dlpack__(**kwargs)

            def __dlpack_device__(self):
                return x.__dlpack_device__()

        np.testing.assert_array_equal(engine(Foreign())["y"].cpu().numpy(), expected)
        assert engine.copies == 3


def test_calls_follow_the_current_stream(built):
    """Each call's input is made on its stream, behind work that takes long, and its result is used there at once."""
    path = built(WIDE, ONE)
    weights = _weights(path)
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(5))]
    with _load(path, contexts=3) as engine:
        kept = []
        for number in range(120):
            stream = streams[number % len(streams)]
            source = _normal(1 + number % 9, 256, seed=number)
            ready = torch.cuda.Event()
            ready.record()
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                torch.cuda._sleep(200_000)
                x = source * 1.0
                y = engine(x)["y"] * 1.0
                kept.append((source, y))
                x.zero_()  # behind the call on its stream, so it may
        for stream in streams:
            stream.synchronize()
        assert 1 <= engine.contexts <= 3
    for x, y in kept:
        _close(y, _wide(weights, x)[0])


@pytest.mark.alone
def test_a_call_does_not_wait_for_the_gpu(built):
    path = built(WIDE, ONE)
    x = _normal(8, 256)
    with _load(path) as engine:
        for _ in range(5):
            engine(x)
        torch.cuda.synchronize()
        for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000_000)  # about a second
                started = time.perf_counter()
                for _ in range(20):
                    engine(x)
                took = time.perf_counter() - started
                assert not stream.query()
            stream.synchronize()
            assert took < 0.2, took


def test_bind(built):
    path = built(WIDE, ONE)
    weights = _weights(path)
    with _load(path) as engine:
        x, y, z = _normal(16, 256), torch.empty(16, 256, device="cuda"), torch.empty(16, device="cuda")
        step = engine.bind(x, out={"y": y, "z": z})
        small = engine.bind(_normal(3, 256))
        assert step.captured
        for seed in range(6):
            x.copy_(_normal(16, 256, seed=seed))
            small.inputs[0].fill_(seed)
            assert step()["y"] is y
            _close(small()["y"], _wide(weights, small.inputs[0])[0])
            expected = _wide(weights, x)
            _close(y, expected[0])
            _close(z, expected[1], 2e-3)
            plain = _normal(7, 256, seed=seed)
            _close(engine(plain)["y"], _wide(weights, plain)[0])
        with pytest.raises(ConfigError, match="not a multiple of 256"):
            engine.bind(torch.zeros(2 * 256 + 1, device="cuda")[1:].view(2, 256))
    with pytest.raises(ConfigError, match="closed"):
        step()


def test_eight_threads_and_changing_shapes(built):
    path = built(WIDE, OVERLAPPING)
    weights = _weights(path)
    batches = [1, 3, 4, 16, 17, 32, 50, 64]
    xs = [_normal(batch, 256, seed=batch) for batch in batches]
    expected = [_wide(weights, x)[0].float() for x in xs]
    torch.cuda.synchronize()
    with _load(path, contexts=4, graphs=6) as engine:
        start = threading.Barrier(8)

        def calls(thread: int) -> float:
            # Half of the threads share the default stream.
            stream = torch.cuda.Stream() if thread % 2 else torch.cuda.default_stream()
            start.wait()
            with torch.cuda.stream(stream):
                worst = torch.zeros((), device="cuda")
                for number in range(400):
                    which = (thread + number * (1 + thread)) % len(xs)
                    error = (engine(xs[which])["y"] - expected[which]).abs() / (1 + expected[which].abs())
                    worst = torch.maximum(worst, error.max())
            stream.synchronize()
            return worst.item()

        with ThreadPoolExecutor(8) as pool:
            worst = list(pool.map(calls, range(8)))
        assert max(worst) < 5e-4, worst
        assert engine.contexts <= 8  # four a profile


def test_wrong_inputs_say_what_and_the_next_call_works(built):
    path = built(WIDE, ONE)
    x = _normal(4, 256)
    with _load(path) as engine:
        expected = engine(x)["y"]
        for wrong, what in [
            (x.half(), "is float16, and the engine takes float32"),
            (x.cpu(), "is on cpu, and the engine on cuda:0"),
            (_normal(256, 4).t(), "is not contiguous"),
            (_normal(65, 256), r"no profile of the engine holds x \[65, 256\]"),
            (_normal(4, 255), "no profile"),
            ("text", "is str, not a tensor"),
        ]:
            with pytest.raises(ConfigError, match=what):
                engine(wrong)
            assert torch.equal(engine(x)["y"], expected)
        assert torch.equal(engine.run({"x": x.cpu()}, copy=True)["y"], expected)
        assert torch.equal(engine.run({"x": x.t().contiguous().t()}, copy=True)["y"], expected)
        assert engine.copies == 2
        with (
            pytest.raises(ConfigError, match="being captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            engine(x + 1)
        assert torch.equal(engine(x)["y"], expected)


@pytest.mark.alone
def test_out_of_memory_is_said_and_the_next_call_works(built):
    path = built(WIDE, (_rows(1, 8, 2_000_000),))
    x = _normal(8, 256)
    try:
        with _load(path) as engine:
            expected = engine(x)["y"]
            large = torch.zeros(1_900_000, 256, device="cuda")
            torch.cuda.synchronize()
            torch.cuda.set_per_process_memory_fraction(
                (torch.cuda.memory_reserved() + 2**29) / torch.cuda.get_device_properties(0).total_memory
            )
            with pytest.raises(ArtifactError, match="no memory left on cuda:0"):
                engine(large)
            del large
            for _ in range(4):
                assert torch.equal(engine(x)["y"], expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_profile_names_the_layers_and_their_time(built):
    path = built(CNN, ({"x": ((1, 3, 8, 8), (2, 3, 32, 32), (4, 3, 64, 64))},))
    x = _normal(2, 3, 32, 32)
    with _load(path) as engine:
        before = engine(x)
        with engine.profile() as times:
            for _ in range(5):
                _close(engine(x), before)
        assert times.layers
        assert times.total_ms > 0
        assert set(times.runs.values()) == {5}
        print(f"\n{times}")
        _close(engine(x), before)
        assert set(times.runs.values()) == {5}


def test_numpy_runner_and_engine_agree(built):
    path = built(WIDE, ONE)
    x = _normal(9, 256)
    runner = EngineRunner(path)
    try:
        expected = runner.run({"x": x.cpu().numpy()})
    finally:
        runner.close()
    with _load(path) as engine:
        np.testing.assert_allclose(engine(x)["y"].cpu().numpy(), expected["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.alone
def test_memory_does_not_grow(built):
    path = built(WIDE, ONE)
    xs = [_normal(batch, 256) for batch in range(1, 21)]
    with _load(path, graphs=8) as engine:

        def rounds(count: int) -> None:
            for number in range(count):
                # mostly replays; every so often a shape whose graph is gone
                engine(xs[number % 6 if number % 50 else (number // 50) % 20])
            torch.cuda.synchronize()
            gc.collect()

        rounds(3_000)
        free, used, host = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated(), _resident()
        rounds(10_000)
        assert torch.cuda.memory_allocated() == used
        assert free - torch.cuda.mem_get_info()[0] < 16 << 20
        assert _resident() - host < 48 << 20
        assert engine.graphs <= 8


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.alone
def test_closing_frees_the_memory(built):
    path = built(WIDE, (_rows(1, 8, 100_000),))
    x = _normal(90_000, 256)

    def once() -> int:
        with _load(path) as engine:
            for _ in range(4):
                engine(x)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    once()
    free = once()
    for _ in range(3):
        assert abs(once() - free) < 16 << 20


LOAD = """
import sys, time, torch
from trtforge.runtime.engine import Engine
from trtforge.runtime.trt.backend import find_backend, import_backend
from pathlib import Path
torch.zeros(1, device="cuda")
b = find_backend("auto")
import_backend(b)
started = time.perf_counter()
engine = Engine(Path(sys.argv[1]), backend=b.name, version=b.version)
x = torch.ones(*map(int, sys.argv[2].split("x")), device="cuda")
y = engine(x)
torch.cuda.synchronize()
took = time.perf_counter() - started
y = y if isinstance(y, torch.Tensor) else y["y"]
print("took", took, y.double().sum().item())
"""


def _load_in_a_process(path: Path, shape: str) -> tuple[float, str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", LOAD, str(path), shape], capture_output=True, text=True, check=True
    )
    _, took, total = next(line for line in done.stdout.splitlines() if line.startswith("took")).split()
    return float(took), total, done.stderr


IN_ORDER = """
import sys, torch
from trtforge.runtime.engine import Engine
from trtforge.runtime.trt.backend import find_backend
from pathlib import Path
b = find_backend("auto")
x = torch.ones(2, 3, 32, 32, device="cuda")
for path, tf32 in zip(sys.argv[1::2], sys.argv[2::2]):
    with Engine(Path(path), backend=b.name, version=b.version, tf32=tf32 == "tf32") as engine:
        print("sum", tf32, engine(x).double().sum().item())
"""


def test_tf32_and_float32_one_after_the_other_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {}
    for tf32 in (False, True):
        folder = tmp_path / f"tf32-{tf32}"
        folder.mkdir()
        path = models.write(folder, CNN)
        profile = {"x": ((1, 3, 8, 8), (2, 3, 32, 32), (4, 3, 64, 64))}
        paths[tf32] = build_engine(BuildRequest(path, folder / "model.engine", "auto", (profile,), tf32=tf32)).path
    x = np.ones((2, 3, 32, 32), np.float32)
    exact = float(OnnxRuntimeRunner(path).run({"x": x})["y"].astype(np.float64).sum())
    a, b = [str(paths[False]), "fp32"], [str(paths[True]), "tf32"]
    refused = subprocess.run([sys.executable, "-c", IN_ORDER, *b, *a], capture_output=True, text=True, check=False)
    assert "cannot be loaded where one with it was loaded before" in refused.stderr
    for order in (a, b, a + b, a):
        done = subprocess.run([sys.executable, "-c", IN_ORDER, *order], capture_output=True, text=True, check=True)
        sums = {line.split()[1]: float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("sum")}
        print(f"\n{order[1]} first: {sums}, exact {exact}")
        assert sums.get("fp32", exact) == pytest.approx(exact, abs=2e-5)  # TF32 is 2.3e-4 off
        assert sums.get("tf32", exact) == pytest.approx(exact, abs=1e-2)


@pytest.mark.skipif(
    not gpu_present() or find_backend("auto").name != "tensorrt-rtx", reason="full TensorRT compiles nothing at load"
)
@pytest.mark.alone
def test_the_second_load_is_faster_and_a_damaged_cache_is_ignored(built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = built(CNN, ({"x": ((1, 3, 8, 8), (2, 3, 32, 32), (4, 3, 64, 64))},))
    first, total, _ = _load_in_a_process(path, "2x3x32x32")
    (file,) = cache_folder().glob("*.bin")
    second, again, said = _load_in_a_process(path, "2x3x32x32")
    print(f"\nfirst load {first:.2f} s, second {second:.2f} s, cache {file.stat().st_size} bytes")
    assert again == total
    assert "Warning" not in said
    assert second < 0.5 * first, (first, second)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    _, again, said = _load_in_a_process(path, "2x3x32x32")
    assert again == total
    assert "is damaged; it is ignored" in said
    third, again, said = _load_in_a_process(path, "2x3x32x32")
    assert "Warning" not in said
    assert third < 0.5 * first


@pytest.mark.skipif(
    not gpu_present() or find_backend("auto").name != "tensorrt-rtx", reason="full TensorRT compiles nothing at load"
)
def test_a_cache_that_tensorrt_refuses_is_ignored_with_a_warning(built, tmp_path, monkeypatch):
    from trtforge.runtime.device import device_facts
    from trtforge.runtime.trt.runtime_cache import RuntimeCacheFile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = built(WIDE, ONE)
    file = RuntimeCacheFile.of_engine(path, find_backend("auto").version, device_facts())
    file.write(b"whole, but no runtime cache" * 100)
    with pytest.warns(RuntimeWarning, match="refuses it"):
        engine = _load(path)
    x = _normal(4, 256)
    _close(engine(x)["y"], _wide(_weights(path), x)[0])
    engine.close()
    with _load(path) as engine:
        _close(engine(x)["y"], _wide(_weights(path), x)[0])
