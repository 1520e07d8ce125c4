"""How many public models convert, with a dynamic batch, the ONNX proof and a TensorRT build; and why others do not.

    python benchmarks/zoo.py [--precision fp32 fp16] [--only NAME …] [--library timm] [--json FILE] [--jobs 1]
    python benchmarks/zoo.py --slice 1/2 --stop-after 450 --json FILE      # then 2/2 --resume, with the same FILE

Each model is converted in a process of its own under a time limit, by `trtforge.convert` and nothing else, with random
weights (see `zoo_models.py`). Without a GPU the best status is `built`: the ONNX is proved against PyTorch at the
minimum, optimum and maximum of every dynamic dimension, with the precision plan, and the engine was built. With a GPU
it is `validated`: the engine ran too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

GOOD = ("built", "validated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--only", nargs="+", default=[], help="names, or beginnings of them")
    parser.add_argument("--library", choices=["torchvision", "timm", "transformers"])
    parser.add_argument("--json", type=Path, help="also write the results here, after each model")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model, all precisions")
    parser.add_argument("--slice", type=part, default=(1, 1), metavar="K/N", help="every Nth model, from the Kth on")
    parser.add_argument("--resume", action="store_true", help="leave out the models whose results --json has already")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="S", help="begin no model after this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        convert_one(args.child, args.precision)
        return
    from zoo_models import MODELS

    chosen = [
        model.name
        for model in MODELS
        if (not args.only or model.name.startswith(tuple(args.only))) and args.library in (None, model.library)
    ][args.slice[0] - 1 :: args.slice[1]]
    results: dict[str, dict[str, Any]] = read_results(args.json) if args.resume else {}
    started = time.perf_counter()

    def run_in_time(name: str) -> dict[str, Any] | None:
        if time.perf_counter() - started > args.stop_after:
            return None
        return run_child(name, args.precision, args.timeout)

    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run_in_time, name): name for name in chosen if name not in results}
        for future in as_completed(running):
            found = future.result()
            if found is None:
                print(f"{running[future]:40} not begun", flush=True)
                continue
            results[running[future]] = found
            print(line(running[future], found), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"versions": versions(), "models": results}, indent=1) + "\n")
    print_summary(results, args.precision, time.perf_counter() - started)


def part(text: str) -> tuple[int, int]:
    """`2/3` as (2, 3)."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(text)
    return int(number), int(count)


def read_results(file: Path | None) -> dict[str, dict[str, Any]]:
    """Those of an earlier run of the same versions; none where there is no such file."""
    if file is None or not file.is_file():
        return {}
    earlier = json.loads(file.read_text())
    if earlier["versions"] != versions():
        sys.exit(f"{file} was made with {earlier['versions']}, here is {versions()}: give another --json")
    models: dict[str, dict[str, Any]] = earlier["models"]
    return models


def run_child(name: str, precisions: list[str], timeout: float) -> dict[str, Any]:
    """`{precision: {"status", "seconds", "error"}}` for one model, in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--precision", *precisions]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=err, timeout=timeout, env=environment, check=False
            ).returncode
            ended = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"not done after {timeout:g} s"
        out.seek(0)
        err.seek(0)
        found: dict[str, Any] = {}
        for text in out:
            if text.startswith("RESULT "):
                found |= json.loads(text.removeprefix("RESULT "))
        last = [text.strip() for text in err if text.strip()][-1:]
    for precision in precisions:
        found.setdefault(precision, {"status": "failed", "seconds": 0, "error": " ".join([ended, *last])})
    return found


def convert_one(name: str, precisions: list[str]) -> None:
    from zoo_models import MODELS, make

    import trtforge

    model = next(model for model in MODELS if model.name == name)
    for precision in precisions:
        started = time.perf_counter()
        result: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                artifact = trtforge.convert(
                    make(model), model.example(), Path(folder) / "model", precision=precision, dims=model.dims,
                    inputs=model.shapes,
                )  # fmt: skip
                result = {"status": artifact.status, "sqnr_db": artifact.facts["measured"]["sqnr_db"]}
            except trtforge.TrtForgeError as error:
                kind = type(error).__name__
                result = {"status": "failed", "stage": error.stage, "error": f"{kind}: {error}"}
        result["seconds"] = round(time.perf_counter() - started, 1)
        print("RESULT " + json.dumps({precision: result}), flush=True)


def line(name: str, found: dict[str, Any]) -> str:
    cells = []
    for precision, result in found.items():
        good = result["status"] in GOOD
        detail = (
            f"{result['sqnr_db']:.0f} dB" if good and result.get("sqnr_db") is not None else result.get("stage", "")
        )
        cells.append(f"{precision} {result['status']:9} {detail:8} {result['seconds']:6.1f} s")
    text = f"{name:40} " + "   ".join(cells)
    reasons = {result["error"].splitlines()[0] for result in found.values() if "error" in result}
    return text + "".join(f"\n    {reason[:300]}" for reason in sorted(reasons))


def print_summary(results: dict[str, dict[str, Any]], precisions: list[str], seconds: float) -> None:
    print(f"\n{json.dumps(versions())}, {seconds / 60:.0f} minutes")
    for precision in precisions:
        good = sum(found[precision]["status"] in GOOD for found in results.values())
        print(f"{precision}: {good} of {len(results)} convert ({100 * good / max(1, len(results)):.1f} %)")


def versions() -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "tensorrt_rtx")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
