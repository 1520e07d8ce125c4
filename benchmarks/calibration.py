"""What calibration costs, beside onnxruntime's calibrator and ModelOpt: time, memory, and the same answers.

    python benchmarks/calibration.py [--runs 3] [--images 128] [--batch 4] [--quick] [--json]

Every figure is measured in a process of its own, the sides in turn; ratios are of medians. ResNet-18 and MobileNetV2 at
224, untrained (their weights cost no time), on crops of scikit-image's pictures, which each side's loader cuts as it
goes, so that no side holds the data. Both `inference` and `calibration` begin with making their sessions and end with
the last result (for calibration: with all thresholds chosen). `inference` is onnxruntime as it comes: all its threads,
all its optimizations. Of onnxruntime's calibrator, `default` is entropy as it comes (128 bins), `entropy` has 2048 bins
and 128 levels; both look at the operators that trtforge quantizes. ModelOpt takes part where it can be imported
(PYTHONPATH for a folder outside the environment). `--quick` leaves out what takes minutes.

`--json` prints one object: over_inference, faster_than_ort_entropy, faster_than_ort_default, faster_than_modelopt (each
{resnet18, mobilenet_v2}, null where it was left out; `left_out` says why), memory_growth, memory_share_of_ort,
search_ms, argmin_equal (over all histograms) and argmin_undefined: in how many the reference chose a candidate whose
divergence it computes as 0/0.
`ours` collects histograms and chooses ranges; the fitting of weights that `convert` does by default is not in it.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("resnet18", "mobilenet_v2")
OPERATORS = ["Conv", "Gemm", "MatMul", "Add"]
LIMITS = {
    "over_inference": {"resnet18": 1.25, "mobilenet_v2": 1.5},
    "faster_than_ort_entropy": {"resnet18": 10, "mobilenet_v2": 10},
    "faster_than_ort_default": {"resnet18": 2, "mobilenet_v2": 7},
}
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def pictures() -> list[np.ndarray]:
    import skimage.data

    found = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    return [((picture / np.float32(255) - MEAN) / STD).transpose(2, 0, 1).astype(np.float32) for picture in found]


def batches(count: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """`count` crops; the same ones on every side."""
    rng = np.random.default_rng(0)
    natural = pictures()
    for start in range(0, count, batch):
        crops = []
        for index in range(start, min(start + batch, count)):
            picture = natural[index % len(natural)]
            y, x = (int(rng.integers(0, size - 224 + 1)) for size in picture.shape[1:])
            crops.append(picture[:, y : y + 224, x : x + 224])
        yield {"x": np.stack(crops)}


def run_inference(model: Path, count: int, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    for feeds in batches(count, batch):
        session.run(None, feeds)


def run_ours(model: Path, count: int, batch: int, method: str = "auto") -> None:
    """From the file to the ranges: reading and hashing the graph and placing count too."""
    from trtforge.calibration.auto import choose_ranges
    from trtforge.calibration.collect import collect
    from trtforge.calibration.placement import quantizable_tensors
    from trtforge.runtime.graph import describe_model, load_graph
    from trtforge.runtime.precision import PrecisionPlan

    graph = load_graph(model)
    tensors = quantizable_tensors(graph, PrecisionPlan("int8")).measured
    choose_ranges(collect(describe_model(graph, model), tensors, batches(count, batch)), method)


def run_ort(model: Path, count: int, batch: int, bins: int = 128) -> None:
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.source = batches(count, batch)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.source, None)

    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            model,
            OPERATORS,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.Entropy,
            extra_options={"num_bins": bins, "num_quantized_bins": 128},
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()


@functools.cache
def make_module(name: str) -> Any:
    import torch
    import torchvision

    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval()


def prepare(side: str, model: Path) -> None:
    """What no side is timed for: imports, a first small batch of data, and ModelOpt's module."""
    import onnxruntime

    if side.startswith("ort"):
        import onnxruntime.quantization.calibrate  # noqa: F401
        import scipy.stats  # noqa: F401
    elif side == "modelopt":
        import modelopt.torch.quantization  # noqa: F401

        make_module(model.stem)
    else:
        import trtforge.calibration.auto
        import trtforge.calibration.collect
        import trtforge.calibration.placement  # noqa: F401
    next(batches(1, 1))


def run_modelopt(model: Path, count: int, batch: int) -> None:
    """ModelOpt's histogram calibrators on the torch model, entropy with 2048 bins, activations alone."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    module = make_module(model.stem)
    inputs = {"num_bits": 8, "axis": None, "calibrator": "histogram"}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*input_quantizer", "cfg": inputs, "enable": True},
        ],
        "algorithm": None,
    }
    mtq.quantize(module, config)
    enable_stats_collection(module)
    with torch.no_grad():
        for feeds in batches(count, batch):
            module(torch.from_numpy(feeds["x"]))
    finish_stats_collection(module, method="entropy")


SIDES: dict[str, Any] = {
    "inference": run_inference,
    "ours": run_ours,
    "ours_entropy": lambda model, count, batch: run_ours(model, count, batch, "entropy"),
    "ort_default": run_ort,
    "ort_entropy": lambda model, count, batch: run_ort(model, count, batch, 2048),
    "modelopt": run_modelopt,
}


def side_main(side: str, model: Path, count: int, batch: int) -> None:
    """In the child."""
    prepare(side, model)
    start = time.perf_counter()
    SIDES[side](model, count, batch)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measure(side: str, model: Path, count: int, batch: int) -> dict[str, float]:
    arguments = [sys.executable, __file__, "--side", side, "--model", str(model), "--images", str(count)]
    done = subprocess.run([*arguments, "--batch", str(batch)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} on {model.stem} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{model.stem} {side} x{count}: {result['seconds']:.2f} s, {result['peak']:.0f} MiB", file=sys.stderr)
    return result


def missing_modelopt() -> str | None:
    """Why ModelOpt takes no part; None where it does. A child tries: it imports torch and half of transformers."""
    code = "import modelopt.torch.quantization, torchvision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1] if done.returncode else None


def export(folder: Path) -> dict[str, Path]:
    """Children export, so that torch is in no process that measures."""
    code = (
        "import sys, torch, torchvision, warnings; warnings.simplefilter('ignore'); torch.manual_seed(0)\n"
        "m = getattr(torchvision.models, sys.argv[1])().eval()\n"
        "d = ({0: torch.export.Dim('batch')},)\n"
        "torch.onnx.export(m, (torch.randn(2, 3, 224, 224),), sys.argv[2], dynamo=True, dynamic_shapes=d,"
        " verbose=False, opset_version=20, external_data=False, input_names=['x'])"
    )
    paths = {name: folder / f"{name}.onnx" for name in MODELS}
    for name, path in paths.items():
        subprocess.run([sys.executable, "-c", code, name, str(path)], check=True, capture_output=True)
        name_nodes(path)
    return paths


def name_nodes(path: Path) -> None:
    import onnx

    proto = onnx.load(path)
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}#{index}"
    onnx.save(proto, path)


def compare(
    paths: dict[str, Path], runs: int, count: int, batch: int, *, quick: bool, without: list[str]
) -> dict[str, Any]:
    quicker = ["inference", "ours"]
    slow = [] if quick else ["ort_default", "ort_entropy", "ours_entropy", "modelopt"]
    left_out = dict.fromkeys(without, "asked for")
    if "modelopt" in slow and "modelopt" not in left_out and (missing := missing_modelopt()):
        left_out["modelopt"] = missing
    slow = [side for side in slow if side not in left_out]
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], list[float]] = {}
    for run in range(runs):
        for name, path in paths.items():
            for side in [*quicker, *(slow if run == 0 else [])]:
                found = measure(side, path, count, batch)
                seconds.setdefault((name, side), []).append(found["seconds"])
                peaks.setdefault((name, side), []).append(found["peak"])

    from trtforge.calibration.count import native_kernel

    def ratio(above: str, below: str) -> dict[str, float | None]:
        return {
            name: round(statistics.median(seconds[name, above]) / statistics.median(seconds[name, below]), 3)
            if (name, above) in seconds and (name, below) in seconds
            else None
            for name in MODELS
        }

    small = paths["mobilenet_v2"]
    growth = measure("ours", small, 512, batch)["peak"] / measure("ours", small, 32, batch)["peak"]
    ort_peak = peaks.get(("mobilenet_v2", "ort_default"))
    share = statistics.median(peaks["mobilenet_v2", "ours"]) / ort_peak[0] if ort_peak else None
    return {
        "over_inference": ratio("ours", "inference"),
        "faster_than_ort_entropy": ratio("ort_entropy", "ours_entropy"),
        "faster_than_ort_default": ratio("ort_default", "ours"),
        "faster_than_modelopt": ratio("modelopt", "ours_entropy"),
        "left_out": left_out,
        "native": native_kernel() is not None,
        "memory_growth": round(growth, 3),
        "memory_share_of_ort": None if share is None else round(share, 4),
        "seconds": {f"{name} {side}": statistics.median(values) for (name, side), values in seconds.items()},
    }


def reference_histograms(count: int, model: Path) -> list[Any]:
    """Real ones (activations of four images) and drawn ones, a half of each; sparse ones are among them."""
    from trtforge.calibration.collect import collect
    from trtforge.calibration.histogram import Histogram
    from trtforge.calibration.placement import quantizable_tensors
    from trtforge.runtime.graph import describe_model, load_graph
    from trtforge.runtime.precision import PrecisionPlan

    graph = load_graph(model)
    tensors = quantizable_tensors(graph, PrecisionPlan("int8")).measured
    described = describe_model(graph, model)
    found: list[Histogram] = []
    for feeds in batches(4, 1):
        found.extend(collect(described, tensors, [feeds]).histograms.values())
    found = found[: count // 2]
    rng = np.random.default_rng(1)
    while len(found) < count:
        size = int(10 ** rng.uniform(2, 5))
        draw = [
            rng.standard_normal(size), rng.laplace(size=size), rng.random(size), rng.standard_t(2, size),
            np.clip(4 * rng.standard_normal(size), 0, 6), rng.standard_normal(size) * (rng.random(size) < 0.05),
        ][len(found) % 6]  # fmt: skip
        histogram = Histogram()
        histogram.add(draw.astype(np.float32) + np.float32(1e-3))
        found.append(histogram)
    return found


def compare_search(model: Path, count: int, *, quick: bool) -> dict[str, Any]:
    """Our search against ModelOpt's own function, on every candidate's divergence where they differ."""
    from trtforge.calibration.thresholds import LEVELS, entropy_divergences, entropy_threshold

    histograms = reference_histograms(count, model)
    entropy_threshold(histograms[0])
    times = []
    for histogram in histograms:
        start = time.perf_counter()
        entropy_threshold(histogram)
        times.append((time.perf_counter() - start) * 1e3)
    found: dict[str, Any] = {"search_ms": round(statistics.median(times), 3), "argmin_equal": None, "reference": None}
    reference = None if quick else load_reference()
    if reference is None:
        return found
    compute, version = reference
    equal = undefined = 0
    for histogram in histograms:
        counts = histogram.counts[: histogram.used]
        edges = np.arange(len(counts) + 1) * histogram.width
        theirs = round(float(compute(counts.astype(np.float64), edges, 8, False)) / histogram.width) - LEVELS
        divergences = entropy_divergences(counts)
        ours = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
        # A candidate that keeps no element at all: the reference divides 0 by 0 there and takes the NaN for least.
        undefined += not np.isfinite(divergences[theirs])
        equal += ours == theirs or abs(divergences[ours] - divergences[theirs]) <= 1e-12
    found.update(
        argmin_equal=round(float(equal) / len(histograms), 4),
        argmin_undefined=undefined,
        reference=f"nvidia-modelopt {version}",
    )
    return found


def load_reference() -> tuple[Any, str] | None:
    """ModelOpt's `_compute_amax_entropy`, from its file: importing the package loads half of transformers."""
    import ast
    import importlib.metadata
    import importlib.util
    from collections import Counter

    spec = importlib.util.find_spec("modelopt")
    if spec is None or not spec.submodule_search_locations:
        return None
    import torch
    from scipy.stats import entropy

    root = Path(next(iter(spec.submodule_search_locations)))
    tree = ast.parse((root / "torch/quantization/calib/histogram.py").read_text(encoding="utf-8"))
    name = "_compute_amax_entropy"
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    scope: dict[str, Any] = {"np": np, "Counter": Counter, "entropy": entropy, "torch": torch}
    exec(compile(ast.Module([function], []), "modelopt", "exec"), scope)
    return scope[name], importlib.metadata.version("nvidia-modelopt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--histograms", type=int, default=200)
    parser.add_argument("--without", action="append", default=[], choices=["modelopt"], help="a side to leave out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side_main(options.side, options.model, options.images, options.batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = export(Path(folder))
        result = compare(
            paths, options.runs, options.images, options.batch, quick=options.quick, without=options.without
        )
        result.update(compare_search(paths["mobilenet_v2"], options.histograms, quick=options.quick))
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        limit = LIMITS.get(name)
        print(f"{name}: {value}" + (f" (target {limit})" if limit else ""))


if __name__ == "__main__":
    main()
