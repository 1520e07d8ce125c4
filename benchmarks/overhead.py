"""What trtforge adds to `torch.onnx.export` plus TensorRT's bare parser and builder, on ResNet-50. Proof not counted.

    python benchmarks/overhead.py [--runs 3] [--json]

Both sides run in turn in this process, after one run of each that is not counted; the ratio is of the medians. The
bare side is what the documentation of both libraries shows: export with a dynamic batch, save, parse, one profile,
build. `startup` is `trtforge --help` over the bare interpreter, in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision

import trtforge
from trtforge.converter.progress import Event
from trtforge.runtime.trt.backend import find_backend, import_backend

NOT_COUNTED = ("record", "prove", "load")
LIMIT = 1.2


def bare(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Seconds of export, and of parse and build, without trtforge."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.randn(2, 3, 224, 224),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=32)},),
            opset_version=23,
            verbose=False,
        )
    assert program is not None
    path = folder / "bare.onnx"
    program.save(path)
    exported = time.perf_counter()
    backend = find_backend("auto")
    trt = import_backend(backend)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, (1, 3, 224, 224), (8, 3, 224, 224), (32, 3, 224, 224))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    (folder / "bare.engine").write_bytes(memoryview(plan))
    done = time.perf_counter()
    return {"export": exported - start, "build": done - exported, "total": done - start}


def ours(model: torch.nn.Module, folder: Path, precision: str) -> dict[str, float]:
    """Seconds of each stage of `trtforge.convert`; `total` leaves the proof out."""
    seconds: dict[str, float] = {}

    def add(event: Event) -> None:
        if event.kind == "end":
            seconds[event.stage] = seconds.get(event.stage, 0.0) + event.seconds

    trtforge.convert(
        model,
        torch.randn(2, 3, 224, 224),
        folder / f"ours-{precision}",
        precision=precision,
        dims={"batch": (1, 8, 32)},
        inputs={"x": ("batch", 3, 224, 224)},
        on_event=add,
    )
    seconds["total"] = sum(spent for stage, spent in seconds.items() if stage not in NOT_COUNTED)
    return seconds


def startup(runs: int) -> float:
    """Median seconds of `trtforge --help` less those of the bare interpreter."""

    def spent(*arguments: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    pairs = [(spent("-m", "trtforge", "--help"), spent("-c", "pass")) for _ in range(2 * runs + 1)]
    return statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    sides: dict[str, list[dict[str, float]]] = {"bare": [], "fp32": [], "fp16": []}
    with tempfile.TemporaryDirectory() as name:
        for run in range(options.runs + 1):
            folder = Path(name)
            found = {
                "bare": bare(model, folder),
                "fp32": ours(model, folder, "fp32"),
                "fp16": ours(model, folder, "fp16"),
            }
            for side, seconds in found.items():
                if run:  # the first run of each pays for imports and caches
                    sides[side].append(seconds)
    medians = {
        side: {stage: statistics.median(r.get(stage, 0.0) for r in runs) for stage in runs[0]}
        for side, runs in sides.items()
    }
    ratios = {side: medians[side]["total"] / medians["bare"]["total"] for side in ("fp32", "fp16")}
    result = {"seconds": medians, "ratio": ratios, "limit": LIMIT, "startup_seconds": startup(options.runs)}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for side, stages in medians.items():
        print(f"{side:5}", "  ".join(f"{stage} {spent:.2f} s" for stage, spent in stages.items()))
    print(f"ratio of medians, proof not counted: fp32 {ratios['fp32']:.2f}, fp16 {ratios['fp16']:.2f} (limit {LIMIT})")
    print(f"trtforge --help: {result['startup_seconds']:.3f} s over the bare interpreter (limit 0.25)")


if __name__ == "__main__":
    main()
