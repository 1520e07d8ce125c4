"""An engine under load for long: eight threads and changing shapes, a million calls, faults and the call after them.

    python benchmarks/endurance.py [--calls 100000] [--long 1000000] [--threads 8] [--contexts 8]
        [--parts threads memory faults] [--model digits] [--seconds 420] [--json FILE]

On the GPU machine; random weights. `digits` takes 8 x 8 images, 1 to 64 at a time, so that a call is nothing but the
host's work; `resnet18` 224 x 224 ones, 1 to 8, and the GPU works longer than the host. The parts but `threads` are made
for digits. One JSON object a part, printed (and appended
to FILE) as it ends, so that a run that is cut short keeps what it has. The exit code is 1 where a part failed.

    threads   every result of every call against the first single-threaded one of its input, on the GPU; and the calls
              a second of one thread and of all, without that comparison
    memory    resident memory of the process and memory in use on the GPU, every hundredth of the calls; growth is what
              the line fitted through the second half rises by in a million calls
    faults    wrong inputs, an altered engine, a full GPU, a process killed in the middle of its calls: each has to give
              its error, and the next call the right result
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "configs"))

MODELS: dict[str, tuple[tuple[int, ...], tuple[int, int, int]]] = {
    "digits": ((1, 2, 3, 8, 17, 32, 50, 64), (1, 8, 8)),
    "resnet18": ((1, 2, 3, 4, 5, 6, 7, 8), (3, 224, 224)),
}
"""Batches that come by turns, and an image."""
TOLERANCE = 1e-4
"""Of the greatest output; another context may sum in another order."""
GROWTH_MIB = 8.0
"""A million calls may add this much to either memory: a leak of nine bytes a call would."""

Report = Callable[[str, dict[str, Any]], None]


def make_artifact(place: Path, name: str = "digits") -> Any:
    from example_models import digits, torchvision_model  # the configurations' folder is put in the path above

    import trtforge

    torch.manual_seed(0)
    model = digits() if name == "digits" else torchvision_model(name)
    batches, image = MODELS[name]
    (argument,) = inspect.signature(model.forward).parameters
    settings = {"dims": {"batch": (1, batches[-1] // 2, batches[-1])}, "inputs": {argument: ("batch", *image)}}
    return trtforge.convert(model.eval(), torch.zeros(2, *image), place, **settings)


def make_samples(engine: Any, name: str = "digits") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs of every batch size, and what one thread makes of them."""
    generator = torch.Generator().manual_seed(1)
    batches, image = MODELS[name]
    inputs = [torch.rand(batch, *image, generator=generator).cuda() for batch in batches]
    samples = []
    for x in inputs:
        for _ in range(3):  # the graph is captured at the second call; threads would have to wait for each other
            y = engine(x)
        samples.append((x, y.clone()))
    torch.cuda.synchronize()
    return samples


def run_threads(
    engine: Any,
    samples: list[tuple[torch.Tensor, torch.Tensor]],
    threads: int,
    calls: int,
    *,
    check: bool,
    until: float,
) -> dict[str, Any]:
    """Calls from several threads, each on a stream of its own, shapes changing at every call."""
    start = threading.Barrier(threads + 1)
    worst: list[float] = [0.0] * threads
    done: list[int] = [0] * threads
    errors: list[str] = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                error = torch.zeros((), device="cuda")
                start.wait()
                for call in range(calls // threads):
                    x, expected = samples[(number + call * (2 * number + 1)) % len(samples)]
                    y = engine(x)
                    if check:
                        error = torch.maximum(error, (y - expected).abs().max())
                    if call % 500 == 0:
                        stream.synchronize()  # a queue without end would time the driver's limits
                        if time.monotonic() > until:
                            break
                    done[number] += 1
                stream.synchronize()
                worst[number] = float(error)
        except Exception as error:  # noqa: BLE001  # told below
            errors.append(f"{type(error).__name__}: {error}")
            with contextlib.suppress(threading.BrokenBarrierError):
                start.abort()

    pool = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in pool:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        start.wait()
    began = time.perf_counter()
    for thread in pool:
        thread.join()
    spent = time.perf_counter() - began
    return {"calls": sum(done), "per_second": sum(done) / spent, "worst": max(worst), "errors": errors}


def part_threads(engine: Any, options: argparse.Namespace, report: Report) -> bool:
    samples = make_samples(engine, options.model)
    scale = max(float(y.abs().max()) for _, y in samples)
    until = time.monotonic() + options.seconds / 3
    checked = run_threads(engine, samples, options.threads, options.calls, check=True, until=until)
    until = time.monotonic() + options.seconds / 3
    few = max(options.calls // 5, options.threads)
    rates: dict[int, list[float]] = {1: [], options.threads: []}
    for _ in range(3):  # by turns
        for threads, found in rates.items():
            found.append(run_threads(engine, samples, threads, few, check=False, until=until)["per_second"])
    alone, together = (sorted(found)[1] for found in rates.values())
    right = (
        not checked["errors"]
        and checked["worst"] <= TOLERANCE * scale
        and checked["calls"] >= options.calls // options.threads * options.threads
    )
    passed = right and together >= alone
    report(
        "threads",
        {
            "passed": passed,
            "model": options.model,
            "threads": options.threads,
            "contexts": options.contexts,
            "calls": checked["calls"],
            "worst_over_greatest": checked["worst"] / scale,
            "errors": checked["errors"][:3],
            "calls_per_second": {"one": alone, "all": together, "all_over_one": together / alone},
        },
    )
    return passed


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def part_memory(engine: Any, options: argparse.Namespace, report: Report) -> bool:
    samples = make_samples(engine)
    inputs = [x for x, _ in samples]
    until = time.monotonic() + options.seconds / 2
    step = max(options.long // 100, 1)
    points: list[tuple[int, int, int]] = []
    calls = 0
    began = time.perf_counter()
    while calls < options.long and time.monotonic() < until:
        for number in range(step):
            engine(inputs[number % len(inputs)])
            if number % 1000 == 999:
                torch.cuda.current_stream().synchronize()
        torch.cuda.synchronize()
        calls += step
        points.append((calls, resident_bytes(), gpu_bytes()))
    growth = {name: slope(points, column) for name, column in (("host", 1), ("gpu", 2))}
    right = all(torch.allclose(engine(x), y, atol=TOLERANCE * float(y.abs().max())) for x, y in samples)
    passed = right and calls >= options.long and all(value <= GROWTH_MIB for value in growth.values())
    report(
        "memory",
        {
            "passed": passed,
            "calls": calls,
            "us_a_call": (time.perf_counter() - began) / calls * 1e6,
            "mib_a_million_calls": growth,
            "host_mib": [round(p[1] / 2**20, 2) for p in points[:: max(1, len(points) // 10)]],
            "gpu_mib": [round(p[2] / 2**20, 2) for p in points[:: max(1, len(points) // 10)]],
        },
    )
    return passed


def slope(points: list[tuple[int, int, int]], column: int) -> float:
    """MiB in a million calls, of a line through the second half."""
    half = points[len(points) // 2 :]
    if len(half) < 2:
        return 0.0
    rise = np.polyfit([p[0] for p in half], [p[column] for p in half], 1)[0]
    return float(rise) * 1e6 / 2**20


def part_faults(engine: Any, artifact: Any, options: argparse.Namespace, report: Report) -> bool:
    import trtforge
    from trtforge.runtime.errors import ArtifactError, ConfigError

    samples = make_samples(engine)
    x, expected = samples[3]
    told: dict[str, str] = {}

    def next_call_works() -> bool:
        return torch.allclose(engine(x), expected, atol=TOLERANCE * float(expected.abs().max()))

    def fails(name: str, kind: type[Exception], run: Callable[[], object]) -> None:
        try:
            run()
            told[name] = "no error"
        except kind as error:
            told[name] = "ok" if next_call_works() else "the next call is wrong"
            told[name] += f": {str(error).splitlines()[0][:160]}"
        except Exception as error:  # noqa: BLE001  # told below
            told[name] = f"another error: {type(error).__name__}: {error}"[:300]

    fails("dtype", ConfigError, lambda: engine(x.half()))
    fails("shape", ConfigError, lambda: engine(torch.zeros(65, 1, 8, 8, device="cuda")))
    fails("host", ConfigError, lambda: engine(x.cpu()))
    fails("no tensor", ConfigError, lambda: engine("garbage"))
    engine(torch.full_like(x, float("nan")))
    told["nan in, right after"] = "ok" if next_call_works() else "the next call is wrong"
    copy = Path(tempfile.mkdtemp()) / "altered"
    shutil.copytree(artifact.path, copy)
    data = bytearray((copy / "model.engine").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.engine").write_bytes(data)
    fails("altered engine", ArtifactError, lambda: trtforge.load(copy))
    hog: list[torch.Tensor] = []

    def full() -> None:
        large = torch.zeros(64, 1, 8, 8, device="cuda")
        torch.cuda.empty_cache()
        size = 1 << 30
        while size >= 1 << 9:
            try:
                hog.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                size //= 2
        try:
            for _ in range(100_000):  # torch may hold small blocks back
                hog.append(engine(large))  # noqa: PERF401  # what came before the error must stay held
        finally:
            hog.clear()
            torch.cuda.empty_cache()

    fails("GPU full", ArtifactError, full)
    child = [sys.executable, __file__, "--child", str(artifact.path)]
    victim = subprocess.Popen(child, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    calling = victim.stdout.readline().strip() == "calling"
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    again = subprocess.run([*child, "--calls", "100"], capture_output=True, text=True, check=False, timeout=120)
    told["killed while it called"] = (
        "ok"
        if calling and victim.returncode == -signal.SIGKILL and next_call_works() and again.returncode == 0
        else f"calling {calling}, the next process: {again.returncode} {again.stderr[-300:]}"
    )
    passed = all(text.startswith("ok") for text in told.values())
    report("faults", {"passed": passed, **told})
    return passed


def be_child(path: Path, calls: int) -> None:
    import trtforge

    with trtforge.load(path) as engine:
        x = torch.zeros(8, 1, 8, 8, device="cuda")
        engine(x)
        print("calling", flush=True)
        for _ in range(calls):
            engine(x)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--long", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--contexts", type=int, default=8, help="execution contexts that calls may share")
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=["faults", "threads", "memory"])
    parser.add_argument("--seconds", type=float, default=420, help="at most, about")
    parser.add_argument("--json", type=Path, help="one object a line")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        be_child(options.child, options.calls if options.calls != 100_000 else 10_000_000)
        return

    def report(part: str, found: dict[str, Any]) -> None:
        line = json.dumps({"part": part, **found})
        print(line, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")

    with tempfile.TemporaryDirectory() as folder:
        artifact = make_artifact(Path(folder) / options.model, options.model)
        passed = True
        with artifact.load(contexts=options.contexts) as engine:
            backend = artifact.facts["engine"]
            versions = {"torch": torch.__version__, backend["backend"]: backend["version"]}
            report("machine", {"device": torch.cuda.get_device_name(), "versions": versions})
            for part in options.parts:
                if part == "faults":
                    passed &= part_faults(engine, artifact, options, report)
                else:
                    passed &= {"threads": part_threads, "memory": part_memory}[part](engine, options, report)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
