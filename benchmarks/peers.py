"""The engine against torch.compile, on seven models at batch 1 and 32: who is faster, in how many of the 14 cells.

    python benchmarks/peers.py [--models resnet50 …] [--batches 1 32] [--precision fp16] [--auto] [--folder DIR]
        [--json FILE]

Artifacts are made first, several at a time (with `--jobs 1` each before its cell); each cell runs alone, in a process
of its own: both sides on the same
weights and inputs, taking turns round by round. `call` is the plain call of trtforge's engine, `bind` its zero-copy
form, `bare` TensorRT's own context captured by torch; `compile` is torch.compile (max-autotune, which captures CUDA
graphs) of the model in the same dtype, channels_last for convolutions; `eager` is PyTorch as it comes. Times are
milliseconds of a call out of many that are put on the GPU without waiting; the median of the rounds.

The engine's inputs are what the model's are: images in float32, cast inside. torch.compile gets images in its own
dtype. Every side's output is compared with the model's in float32.

`--auto` also converts each cell with `precision: auto`, quantized candidates included, and times a plain call of what
it picked beside the one above. The budget: a cosine of the outputs within 0.01 of 1 on 64 other inputs. A candidate
that fails is not mended (`looks: 1`), which keeps the search short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "configs")]

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vit_b_16", "swin_t", "encoder")
CONVOLUTIONS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0")
TOKENS = 128
NEEDED = 12


def make_model(name: str) -> Any:
    import torch
    from example_models import encoder, torchvision_model  # the configurations' folder is put in the path above

    torch.manual_seed(0)
    if name == "encoder":
        return encoder(layers=12).eval()
    return torchvision_model(name, unit_variance=name in ("mobilenet_v2", "efficientnet_b0")).eval()


def make_inputs(name: str, batch: int, seed: int = 1) -> tuple[Any, ...]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    if name == "encoder":
        ids = torch.randint(0, 30522, (batch, TOKENS), generator=generator)
        return ids, torch.ones(batch, TOKENS, dtype=torch.bool)
    return (torch.randn(batch, 3, 224, 224, generator=generator),)


def prepare(name: str, batch: int, precision: str, folder: Path) -> None:
    import trtforge

    place = folder / f"{name}-{batch}-{precision}"
    if not place.exists():
        trtforge.convert(make_model(name), make_inputs(name, batch), place, precision=precision)


def prepare_auto(name: str, batch: int, folder: Path) -> Path:
    import trtforge

    def data(first: int, count: int) -> list[tuple[Any, ...]]:
        return [make_inputs(name, batch, seed) for seed in range(first, first + max(count // batch, 1))]

    place = folder / f"{name}-{batch}-auto"
    budget = {"metric": "cosine", "labels": "model", "max_drop": 0.01, "data": data(1000, 64)}
    if name == "encoder":
        budget["output"] = "output_0"
    if not place.exists():
        trtforge.convert(
            make_model(name),
            make_inputs(name, batch),
            place,
            precision="auto",
            search={"looks": 1},
            calibration=data(100, 32),
            accuracy=budget,
        )
    return place


def measure_auto(name: str, batch: int, precision: str, folder: Path, rounds: int) -> dict[str, Any]:
    """What `precision: auto` picks, and a plain call of it beside the one in `precision`."""
    import engine as one

    import trtforge

    started = time.perf_counter()
    places = {"auto": prepare_auto(name, batch, folder), precision: folder / f"{name}-{batch}-{precision}"}
    spent = time.perf_counter() - started
    search = trtforge.open_artifact(places["auto"]).facts["search"]
    engines = {side: trtforge.load(place) for side, place in places.items()}
    given = tuple(x.cuda() for x in make_inputs(name, batch))
    calls: dict[str, Callable[[], Any]] = {
        side: lambda engine=engine: engine(*given)  # type: ignore[misc]
        for side, engine in engines.items()
    }
    rows = one.measure_throughput(calls, rounds, least_ms=60.0)
    for engine in engines.values():
        engine.close()
    candidates = {
        row["name"]: {key: row[key] for key in ("passed", "latency_ms", "accuracy", "reason")}
        for row in search["candidates"]
    }
    return {
        "model": name,
        "batch": batch,
        "auto": search["chosen"],
        "ms": rows,
        "candidates": candidates,
        "search_seconds": spent,
    }


def measure_load(place: Path) -> None:
    """One load in this process; the imports that any user of torch has are not counted, TensorRT's is."""
    import torch

    import trtforge

    torch.zeros(1, device="cuda")
    started = time.perf_counter()
    artifact = trtforge.open_artifact(place)
    opened = time.perf_counter()
    engine = artifact.load()
    done = time.perf_counter()
    print(json.dumps({"seconds": done - started, "open": opened - started, "load": done - opened}))
    engine.close()


def print_layers(name: str, batch: int, precision: str, folder: Path) -> None:
    """Where the engine's time goes, layer by layer; the slowest first."""
    import trtforge

    with trtforge.load(folder / f"{name}-{batch}-{precision}") as engine:
        given = tuple(x.cuda() for x in make_inputs(name, batch))
        with engine.profile() as times:
            for _ in range(20):
                engine(*given)
    print(times)


def measure_cell(name: str, batch: int, precision: str, folder: Path, rounds: int, sides: list[str]) -> dict[str, Any]:
    import engine as one  # benchmarks/engine.py
    import torch

    import trtforge
    from trtforge.runtime.trt.backend import find_backend, import_backend

    import_backend(find_backend("auto"))
    artifact = trtforge.open_artifact(folder / f"{name}-{batch}-{precision}")
    assert artifact.engine is not None
    model = make_model(name)
    inputs = make_inputs(name, batch)
    with torch.inference_mode():
        expected = first_output(model(*inputs)).cuda()
    loaded = artifact.load()
    given = tuple(x.cuda() for x in inputs)
    bound = loaded.bind(*(x.clone() for x in given))
    dtype = one.DTYPES[precision]
    format = torch.channels_last if name in CONVOLUTIONS else torch.contiguous_format
    model.to("cuda", dtype, memory_format=format)
    typed = tuple(x.to(dtype, memory_format=format) if x.is_floating_point() else x for x in given)

    def eager() -> Any:
        with torch.inference_mode():
            return model(*typed)

    calls: dict[str, Callable[[], Any]] = {"call": lambda: loaded(*given), "bind": bound}
    if "bare" in sides:
        names = [spec.name for spec in loaded.inputs]
        calls["bare"] = one.bare(artifact.engine, dict(zip(names, given, strict=True)), precision == "tf32")[0]
    if "eager" in sides:
        calls["eager"] = eager
    spent = 0.0
    if "compile" in sides:
        optimized = torch.compile(model, mode="max-autotune")

        def compiled() -> Any:
            with torch.inference_mode():
                return optimized(*typed)

        started = time.perf_counter()
        compiled()
        torch.cuda.synchronize()
        spent = time.perf_counter() - started
        calls["compile"] = compiled
    cosines = {
        side: torch.nn.functional.cosine_similarity(
            first_output(call()).float().flatten(), expected.float().flatten(), dim=0
        ).item()
        for side, call in calls.items()
        if side != "bare"
    }
    rows = one.measure_throughput(calls, rounds, least_ms=60.0)
    loaded.close()
    return {
        "model": name,
        "batch": batch,
        "precision": precision,
        "ms": rows,
        "cosine": cosines,
        "compile_seconds": spent,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "tensorrt": artifact.facts["engine"]["version"]},
    }


def first_output(result: Any) -> Any:
    if isinstance(result, dict):
        return next(iter(result.values()))
    return result[0] if isinstance(result, (tuple, list)) else result


def child(*arguments: str, timeout: float, threads: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)


def last_object(done: subprocess.CompletedProcess[str], what: str) -> dict[str, Any] | None:
    if done.returncode:
        said = done.stderr.strip()  # the cause may stand at either end
        said = said if len(said) < 5000 else f"{said[:2500]}\n[…]\n{said[-2500:]}"
        print(f"{what} failed: {said}", file=sys.stderr, flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_cells(cells: list[dict[str, Any]]) -> None:
    print(f"{'model':16} {'batch':>5} {'call':>8} {'bind':>8} {'compile':>8} {'eager':>8} {'compile / call':>14}")
    won = 0
    for cell in cells:
        ms = cell["ms"]
        peer = ms.get("compile")
        won += peer is not None and ms["call"] <= peer
        figures = " ".join(
            f"{ms[side]:8.4f}" if side in ms else f"{'-':>8}" for side in ("call", "bind", "compile", "eager")
        )
        ratio = f"{peer / ms['call']:14.3f}" if peer else ""
        print(f"{cell['model']:16} {cell['batch']:5} {figures} {ratio}")
    print(f"at least as fast as torch.compile in {won} of {len(cells)} cells (at least {NEEDED} of 14 asked)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--sides", nargs="*", default=["bare", "compile", "eager"], choices=["bare", "compile", "eager"]
    )
    parser.add_argument("--auto", action="store_true", help="also what precision: auto picks")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="keeps the artifacts here, and uses those that are there")
    parser.add_argument("--jobs", type=int, default=5, help="conversions at a time")
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--loads", nargs="*", default=[], choices=MODELS, help="also time first and second loads")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one cell")
    parser.add_argument("--json", type=Path, help="one object a line, written as cells end")
    parser.add_argument("--child", choices=["prepare", "cell", "load", "auto", "layers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        (name,), (batch,) = options.models, options.batches
        if options.child == "prepare":
            prepare(name, batch, options.precision, options.folder)
        elif options.child == "load":
            measure_load(options.folder / f"{name}-{batch}-{options.precision}")
        elif options.child == "layers":
            print_layers(name, batch, options.precision, options.folder)
        elif options.child == "auto":
            print(json.dumps(measure_auto(name, batch, options.precision, options.folder, options.rounds)))
        else:
            found = measure_cell(name, batch, options.precision, options.folder, options.rounds, options.sides)
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = (options.folder or Path(temporary)).resolve()
        cells = [(name, batch) for name in options.models for batch in options.batches]
        common = ["--precision", options.precision, "--folder", str(options.folder)]

        def arguments(kind: str, name: str, batch: int) -> list[str]:
            return ["--child", kind, "--models", name, "--batches", str(batch), *common]

        threads = max(1, (os.cpu_count() or 1) // options.jobs)

        def make(cell: tuple[str, int]) -> subprocess.CompletedProcess[str]:
            started = time.perf_counter()
            done = child(*arguments("prepare", *cell), timeout=900, threads=threads)
            print(f"{cell[0]} at batch {cell[1]} prepared in {time.perf_counter() - started:.0f} s", flush=True)
            return done

        made: dict[tuple[str, int], bool] = {}

        def ready(cell: tuple[str, int]) -> bool:
            if cell not in made:
                made[cell] = not failed(make(cell), cell)
            return made[cell]

        if options.jobs > 1 or options.prepare_only:
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(ready, cells))
        if options.prepare_only:
            return
        for name in options.loads:
            if not ready((name, options.batches[0])):
                continue
            with tempfile.TemporaryDirectory() as cache:
                os.environ["XDG_CACHE_HOME"] = cache
                loads = [
                    last_object(child(*arguments("load", name, options.batches[0]), timeout=300), f"load of {name}")
                    for _ in range(3)
                ]
                del os.environ["XDG_CACHE_HOME"]
            line = {
                "model": name,
                "load_seconds": [load and round(load["seconds"], 3) for load in loads],
                "parts": loads,
            }
            print(json.dumps(line), flush=True)
            write(options.json, line)

        def measure(kind: str, cell: tuple[str, int]) -> dict[str, Any] | None:
            command = [*arguments(kind, *cell), "--rounds", str(options.rounds), "--sides", *options.sides]
            what = f"{kind}: {cell[0]} at batch {cell[1]}"
            try:
                found = last_object(child(*command, timeout=options.timeout), what)
            except subprocess.TimeoutExpired:
                print(f"{what}: over {options.timeout:.0f} s", file=sys.stderr, flush=True)
                return None
            if found is not None:
                write(options.json, found)
            return found

        results = []
        for cell in cells if options.sides else []:
            if ready(cell) and (found := measure("cell", cell)):
                results.append(found)
                print_cells([found])
        print_cells(results)
        for cell in cells if options.auto else []:
            if ready(cell) and (found := measure("auto", cell)):
                ms, chosen = found["ms"], found["auto"]
                times = f"auto {ms['auto']:.4f} ms, {options.precision} {ms[options.precision]:.4f} ms"
                print(f"{cell[0]} at batch {cell[1]}: auto picks {chosen}, {times}", flush=True)


def failed(done: subprocess.CompletedProcess[str], cell: tuple[str, int]) -> bool:
    if done.returncode:
        print(
            f"{cell[0]} at batch {cell[1]} did not convert: {done.stderr.strip()[-1500:]}", file=sys.stderr, flush=True
        )
    return bool(done.returncode)


def write(place: Path | None, line: dict[str, Any]) -> None:
    if place is not None:
        with place.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
