"""What a call of an engine costs over bare CUDA graph replay of the same engine, and what people would use instead.

    python benchmarks/engine.py [--model resnet50] [--batch 1] [--precision fp16] [--no-compile] [--json]

Every side runs in this process on the same weights: `bare` is TensorRT's own context, captured with torch and replayed;
`bind` and `call` are `trtforge`'s engine; `polygraphy` its TrtRunner on GPU tensors; `compile` is torch.compile
(max-autotune) of the model in the same dtype, whose inputs are that dtype already. Sides take turns, round by round.

    throughput_ms   a call, of many put on the GPU without waiting (polygraphy waits in each)
    latency_ms      one call and the wait for its result: median, p90, p99
    host_us         until a call returns, where it does not wait
    over_bare       throughput over bare's

`load_seconds` are the first load of the engine with an empty runtime cache, the second one, and bare TensorRT's.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

import trtforge
from trtforge.converter.artifact import Artifact
from trtforge.runtime.trt.backend import find_backend, import_backend
from trtforge.runtime.trt.tf32 import Tf32Hold

ROUNDS = 9
LIMITS = {"bind": 1.05, "call": 1.15}
POLYGRAPHY_LIMIT = 2.2
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Call = Callable[[], Any]


def convert(model: torch.nn.Module, x: torch.Tensor, precision: str, folder: Path) -> Artifact:
    return trtforge.convert(model, x.cpu(), folder / "artifact", precision=precision)


def bare(path: Path, feeds: dict[str, torch.Tensor], tf32: bool) -> tuple[Call, float]:
    """TensorRT without us: its context at fixed addresses, captured by torch; and the seconds of loading."""
    backend = find_backend("auto")
    trt = import_backend(backend)
    hold = Tf32Hold(tf32)
    started = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    context = engine.create_execution_context()
    loaded = time.perf_counter() - started
    tensors = {}
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            tensors[name] = feeds[name].clone()
            context.set_input_shape(name, tuple(feeds[name].shape))
        else:
            dtype = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
            shape = tuple(context.get_tensor_shape(name))
            tensors[name] = torch.empty(shape, dtype=dtype[engine.get_tensor_dtype(name).name], device="cuda")
        context.set_tensor_address(name, tensors[name].data_ptr())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        assert context.execute_async_v3(stream.cuda_stream)
    kept = (runtime, engine, context, logger, hold, tensors)  # the graph reads the inputs where they are
    output = list(tensors.values())[-1]

    def replay(_: Any = kept) -> torch.Tensor:
        graph.replay()
        return output

    return replay, loaded


def polygraphy(path: Path, x: torch.Tensor, precision: str) -> Call:
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    runner = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
    if precision != "tf32":  # an engine refuses a context under another value than it was built under
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    runner.activate()
    os.environ.pop("NVIDIA_TF32_OVERRIDE", None)
    atexit.register(runner.deactivate)
    (name,) = runner.get_input_metadata()

    def infer() -> torch.Tensor:
        return next(iter(runner.infer({name: x}, check_inputs=False, copy_outputs_to_host=False).values()))

    return infer


def compiled(model: torch.nn.Module, x: torch.Tensor, precision: str, channels_last: bool) -> Call:
    dtype = DTYPES[precision]
    # The older switches: torch.compile reads them, and raises once the newer `cudnn.conv.fp32_precision` was set.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    fast = model.to("cuda", dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    given = x.to(dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimized = torch.compile(fast, mode="max-autotune")

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return optimized(given)

    return call


def throughput(call: Call, count: int) -> tuple[float, float]:
    """Milliseconds a call on the GPU, and microseconds a call on the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    started = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - started
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count, spent / count * 1e6


def latencies(call: Call, count: int) -> list[float]:
    """Milliseconds of single calls, each waited for."""
    stream = torch.cuda.current_stream()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        stream.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure_throughput(sides: dict[str, Call], rounds: int, least_ms: float) -> dict[str, float]:
    """Milliseconds a call on the GPU, the median of rounds that take turns and last `least_ms` or more each."""
    counts = {}
    for name, call in sides.items():
        for _ in range(10):
            call()
        counts[name] = max(10, int(least_ms / throughput(call, 10)[0]))
    gc.collect()
    gc.disable()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(throughput(call, counts[name])[0])
    gc.enable()
    return {name: statistics.median(values) for name, values in found.items()}


def measure(sides: dict[str, Call], count: int) -> dict[str, dict[str, Any]]:
    for call in sides.values():
        for _ in range(20):
            call()
    torch.cuda.synchronize()
    gpu: dict[str, list[float]] = {name: [] for name in sides}
    host: dict[str, list[float]] = {name: [] for name in sides}
    single: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for _ in range(ROUNDS):
        for name, call in sides.items():
            ms, _ = throughput(call, count)
            gpu[name].append(ms)
            # Few enough that the queue of launches does not fill and make the host wait.
            host[name].append(throughput(call, 50)[1])
            single[name] += latencies(call, 50)
    gc.enable()
    base = statistics.median(gpu["bare"])
    rows = {}
    for name in sides:
        ordered = sorted(single[name])
        rows[name] = {
            "throughput_ms": statistics.median(gpu[name]),
            "latency_ms": {
                "median": statistics.median(ordered),
                "p90": ordered[len(ordered) * 90 // 100],
                "p99": ordered[len(ordered) * 99 // 100],
            },
            "host_us": statistics.median(host[name]),
            "over_bare": statistics.median(gpu[name]) / base,
        }
    return rows


def timed(load: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    made = load()
    return made, time.perf_counter() - started


def agreement(expected: torch.Tensor, call: Call) -> float:
    """Cosine of a side's output with the model's in float32."""
    result = call().float().flatten()
    return torch.nn.functional.cosine_similarity(result, expected.float().flatten(), dim=0).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a name in torchvision.models")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="fp16", choices=list(DTYPES))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; it takes minutes")
    parser.add_argument("--channels-last", action="store_true", help="for torch.compile")
    parser.add_argument("--calls", type=int, default=300, help="in each round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    backend = find_backend("auto")
    # Before polygraphy is imported anywhere.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(backend.name == "tensorrt-rtx"))
    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None).eval()
    x = torch.randn(options.batch, 3, 224, 224, device="cuda")
    with torch.inference_mode():
        expected = model(x.cpu()).cuda()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        artifact = convert(model, x, options.precision, folder)
        assert artifact.engine is not None
        import_backend(backend)
        engine, first = timed(artifact.load)
        engine.close()
        engine, second = timed(artifact.load)
        replay, bare_load = bare(artifact.engine, {engine.inputs[0].name: x}, options.precision == "tf32")
        given = x.to(getattr(torch, engine.inputs[0].dtype))
        sides: dict[str, Call] = {
            "bare": replay,
            "bind": engine.bind(given.clone()),
            "call": lambda: engine(given),
            "polygraphy": polygraphy(artifact.engine, given, options.precision),
        }
        if not options.no_compile:
            sides["compile"] = compiled(model, x, options.precision, options.channels_last)
        cosines = {side: agreement(expected, call) for side, call in sides.items()}
        rows = measure(sides, options.calls)
        engine.close()
    ratio = rows["polygraphy"]["throughput_ms"] / rows["call"]["throughput_ms"]
    result = {
        "model": options.model,
        "batch": options.batch,
        "precision": options.precision,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, backend.name: backend.version, "trtforge": trtforge.__version__},
        "load_seconds": {"first": first, "second": second, "bare": bare_load},
        "cosine": cosines,
        "sides": rows,
        "polygraphy_over_call": ratio,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{options.model} {options.precision} batch {options.batch}, {result['device']}, {result['versions']}")
    print(f"{'':10} {'ms':>8} {'/ bare':>7} {'median':>8} {'p90':>8} {'p99':>8} {'host us':>8} {'cosine':>9}")
    for side, row in rows.items():
        latency = row["latency_ms"]
        print(
            f"{side:10} {row['throughput_ms']:8.4f} {row['over_bare']:7.3f} {latency['median']:8.4f} "
            f"{latency['p90']:8.4f} {latency['p99']:8.4f} {row['host_us']:8.1f} {cosines[side]:9.6f}"
        )
    for side, limit in LIMITS.items():
        print(f"{side} over bare: {rows[side]['over_bare']:.3f} (limit {limit})")
    print(f"polygraphy over call: {ratio:.2f} (at least {POLYGRAPHY_LIMIT})")
    print(f"load: first {first:.2f} s, second {second:.2f} s (at most a tenth), bare TensorRT {bare_load:.2f} s")


if __name__ == "__main__":
    main()
