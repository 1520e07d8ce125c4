"""With the real Polygraphy: the line we print reproduces our verdict, and its vacuous passes are not ours."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, RunResults, SnrCompareFunc

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.specs import DimRange, InputSpec
from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet, Sample, plan_points, record, run_samples
from trtforge.validation.metrics import measure
from trtforge.validation.parity import Candidate, Verdict
from trtforge.validation.polygraphy_data import (
    CANDIDATE_FILE,
    REFERENCE_FILE,
    export_polygraphy,
    load_run_results,
    polygraphy_command,
)
from trtforge.validation.tolerance import DEFAULTS, Tolerance

INPUTS = (InputSpec("x", "float32", ("batch", 8)),)


def write_model(path, *, scale=1.0, boolean=False):
    weight = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    weight[0] *= scale
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ArgMax", ["y"], ["best"], axis=1)]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5]),
        helper.make_tensor_value_info("best", TensorProto.INT64, ["batch", 1]),
    ]
    if boolean:
        nodes.append(helper.make_node("Greater", ["y", "zero"], ["positive"]))
        outputs.append(helper.make_tensor_value_info("positive", TensorProto.BOOL, ["batch", 5]))
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0), "zero")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "g", [x], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def prove(golden, outputs, tolerance=DEFAULTS["fp32"]):
    return compare(golden, outputs, tolerance, Candidate("export", "onnxruntime", "1", "fp32", {}))


def run_line(line):
    words = shlex.split(line)
    assert words[0] == "polygraphy"
    script = Path(sys.executable).with_name("polygraphy")
    tool = [str(script)] if script.exists() else [shutil.which("polygraphy") or "polygraphy"]
    return subprocess.run([*tool, *words[1:]], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("golden") / "m.onnx")
    return record(OnnxRuntimeRunner(path), INPUTS, plan_points([{"batch": DimRange(1, 2, 4)}], repeats=1))


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (2.0, False)])
def test_the_line_reproduces_the_verdict_by_running_onnxruntime(golden, tmp_path, scale, passes):
    model = write_model(tmp_path / "model.onnx", scale=scale)
    outputs = run_samples(golden, OnnxRuntimeRunner(model))
    report = prove(golden, outputs)
    assert report.passed == passes
    export_polygraphy(golden, tmp_path / "data", outputs)
    done = run_line(polygraphy_command(report, str(tmp_path / "data"), model=str(model)))
    assert (done.returncode == 0) == passes, done.stdout + done.stderr
    assert "SNR" in done.stdout
    assert "Traceback" not in done.stderr


def test_recorded_outputs_are_compared_without_a_model(golden, tmp_path):
    model = write_model(tmp_path / "model.onnx", scale=2.0, boolean=True)
    right = OnnxRuntimeRunner(write_model(tmp_path / "right.onnx", boolean=True))
    reference = record(right, INPUTS, plan_points([{"batch": DimRange(2, 2, 2)}]))
    outputs = run_samples(reference, OnnxRuntimeRunner(model))
    report = prove(reference, outputs)
    export_polygraphy(reference, tmp_path / "a b", outputs)
    done = run_line(polygraphy_command(report, str(tmp_path / "a b")))
    assert done.returncode == 1
    assert "FAILED" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, "bool outputs, which Polygraphy's SNR cannot subtract"
    assert report.verdict is Verdict.FAILED


def test_elementwise_limits_in_the_line(golden):
    report = prove(golden, run_samples(golden, Repeat(golden)), Tolerance(atol=0.5))
    words = shlex.split(polygraphy_command(report, "data", model="m.onnx"))
    assert words[-6:] == ["--compare", "simple", "--atol", "0.5", "--rtol", "0"]


def test_engine_line():
    report = replace(
        prove(GoldenSet((), "torch", "2"), {}), candidate=Candidate("engine", "tensorrt-rtx", "1", "fp16", {})
    )
    line = polygraphy_command(report, "data", model="model.engine", backend="tensorrt-rtx")
    assert line.startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run model.engine --model-type engine --trt ")


class Repeat:
    """Gives the golden outputs again."""

    name, version, inputs, outputs = "fake", "1", INPUTS, ()

    def __init__(self, golden):
        self.answers = iter([sample.outputs for sample in golden.samples])

    def run(self, feeds):
        return dict(next(self.answers))


def test_samples_can_be_chosen_and_bfloat16_is_widened(tmp_path):
    array = np.arange(3).astype(ml_dtypes.bfloat16)
    golden = GoldenSet(tuple(Sample(f"s{i}", {}, i, {"x": array}, {"y": array}) for i in range(3)), "torch", "2")
    export_polygraphy(golden, tmp_path, samples=["s1"])
    results = load_run_results(tmp_path / REFERENCE_FILE)
    assert list(results) == ["torch"]
    (iteration,) = results["torch"]
    assert iteration["y"].dtype == np.float32
    assert not (tmp_path / CANDIDATE_FILE).exists()


def test_results_that_are_none(tmp_path):
    for text in ("{", "[1]"):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"r\.json"):
            load_run_results(tmp_path / "r.json")
    with pytest.raises(ArtifactError):
        load_run_results(tmp_path / "absent.json")


def results_of(**runners):
    results = RunResults()
    for name, outputs in runners.items():
        results.add(outputs, runner_name=name)
    return results


def test_our_measures_are_polygraphys(golden):
    """An independent implementation of the same formulas (theirs takes the first runner for the signal)."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((8, 50)).astype(np.float32)
    candidate = reference + np.float32(0.01) * rng.standard_normal((8, 50)).astype(np.float32)
    results = results_of(reference=[{"y": reference}], candidate=[{"y": candidate}])
    found = Comparator.compare_accuracy(results, compare_func=[SnrCompareFunc(), CosineSimilarityCompareFunc()])
    ours = measure(reference, candidate)
    snr, cosine = (accuracy[("reference", "candidate")][0]["y"] for accuracy in found)
    assert ours.sqnr_db == pytest.approx(snr.snr, abs=1e-3)
    assert ours.cosine == pytest.approx(cosine.cosine_similarity, abs=1e-6)


VACUOUS = {
    "no iterations": ([], []),
    "empty outputs": ([{"y": np.zeros((0, 3), np.float32)}] * 2, [{"y": np.zeros((0, 3), np.float32)}] * 2),
    "missing output": ([{"y": np.ones(3), "z": np.ones(3)}] * 2, [{"y": np.ones(3)}] * 2),
    "extra output": ([{"y": np.ones(3)}] * 2, [{"y": np.ones(3), "z": np.ones(3)}] * 2),
    "other dtype": ([{"y": np.ones(3, np.float32)}] * 2, [{"y": np.ones(3, np.float64)}] * 2),
    "all zero": ([{"y": np.zeros(3, np.float32)}] * 2, [{"y": np.zeros(3, np.float32)}] * 2),
    "same for every input": ([{"y": np.arange(3.0)}] * 2, [{"y": np.arange(3.0)}] * 2),
}


@pytest.mark.parametrize("case", VACUOUS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Polygraphy takes means of empty arrays
def test_vacuous_passes_of_polygraphy_are_refused_here(case):
    reference, candidate = VACUOUS[case]
    passed = bool(Comparator.compare_accuracy(results_of(reference=reference, candidate=candidate)))
    assert passed, "where this turns false, Polygraphy has mended it: say so in FACTS.md"
    samples = tuple(Sample(f"s{i}", {}, i, {"x": np.full(1, i)}, y) for i, y in enumerate(reference))
    report = prove(GoldenSet(samples, "torch", "2"), {f"s{i}": y for i, y in enumerate(candidate)})
    assert not report.passed
    assert report.reasons
