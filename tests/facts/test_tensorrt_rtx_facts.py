"""Facts about TensorRT-RTX that shape runtime/trt. When one turns false, the file named beside it wants a change.

Each probe runs in a process of its own: some of them crash it. Run on 1.6 and 1.7.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import trt_models as models

from trtforge.runtime.device import gpu_present
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.header import read_rtx_header

trt = pytest.importorskip("tensorrt_rtx")
BACKEND = find_backend("tensorrt-rtx")
IS_1_7 = BACKEND.version.startswith("1.7.")

PRELUDE = """
import sys
import tensorrt_rtx as trt
class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.said = []
    def log(self, severity, text):
        if severity <= trt.ILogger.WARNING:
            self.said.append(text)
log = Logger()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
config = builder.create_builder_config()
parser = trt.OnnxParser(network, log)
parsed = parser.parse_from_file(sys.argv[1])
"""
BUILD = "plan = builder.build_serialized_network(network, config)\n"


def _probe(model: Path, code: str, *, prelude: str = PRELUDE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", prelude + code, str(model)], capture_output=True, text=True, check=False
    )


def _says(model: Path, code: str) -> str:
    done = _probe(model, code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_table_of_backend_py_agrees_with_the_module():
    flags = trt.NetworkDefinitionCreationFlag.__members__
    assert ("EXPLICIT_BATCH" in flags) is BACKEND.capabilities.explicit_batch_flag
    assert "STRONGLY_TYPED" in flags
    named = {name[2:-1] + "." + name[-1] for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert named == set(BACKEND.capabilities.targets)


def test_build_py_tf32_is_on_unless_cleared(tmp_path):
    model = models.write(tmp_path, models.STATIC)
    assert _says(model, "print(config.get_flag(trt.BuilderFlag.TF32))") == "True"


def test_build_py_failure_is_none_and_no_exception(tmp_path):
    model = models.write(tmp_path, models.NON_MAX_SUPPRESSION)
    assert _says(model, BUILD + "print(parsed, plan)") == "True None"


def test_build_py_objects_do_not_keep_each_other_alive(tmp_path):
    model = models.write(tmp_path, models.STATIC)
    code = "parser = trt.OnnxParser(builder.create_network(1), log)\nparser.parse_from_file(sys.argv[1])\n"
    assert _probe(model, code).returncode == -11


def test_build_py_a_monitor_is_called_on_the_cpu_and_false_cancels(tmp_path):
    code = """
class Monitor(trt.IProgressMonitor):
    def __init__(self, answer):
        trt.IProgressMonitor.__init__(self)
        self.answer, self.phases = answer, []
    def phase_start(self, name, parent, steps):
        self.phases.append(name)
    def phase_finish(self, name):
        pass
    def step_complete(self, name, step):
        return self.answer
for answer in (True, False):
    monitor = Monitor(answer)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    print(plan is not None, len(monitor.phases) > 0)
"""
    assert _says(models.write(tmp_path, models.STATIC), code).split() == ["True", "True", "False", "True"]


def test_profiles_py_wrong_profiles_are_swallowed(tmp_path):
    code = """
def add(least, usual, most):
    profile = builder.create_optimization_profile()
    profile.set_shape("x", least, usual, most)
    return config.add_optimization_profile(profile)
print(add((3, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8)), add((0, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8)))
print(add((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)), add((1, 2, 8), (2, 2, 8), (4, 2, 8)))
"""
    assert _says(models.write(tmp_path, models.CONV), code).split() == ["-1", "0", "1", "2"]


def test_profiles_py_a_missing_input_fails_at_build_only(tmp_path):
    code = "print(config.add_optimization_profile(builder.create_optimization_profile()))\n" + BUILD
    code += "print(plan, any('is missing dimensions in profile 0' in text for text in log.said))"
    assert _says(models.write(tmp_path, models.CONV), code).split() == ["0", "None", "True"]


def test_messages_py_a_frozen_batch_is_only_a_warning(tmp_path):
    code = """
profile = builder.create_optimization_profile()
profile.set_shape("x", (1, 6), (2, 6), (4, 6))
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
print(plan is not None, any("Profile kMAX values are not self-consistent" in text for text in log.said))
"""
    assert _says(models.write(tmp_path, models.BAKED), code).split() == ["True", "True"]


@pytest.mark.skipif(gpu_present(), reason="a GPU is here")
def test_messages_py_errors_without_a_gpu_are_followed_by_cuda_error_35(tmp_path):
    code = "print(parsed, sum('cudaError 35' in text for text in log.said) > 0)"
    assert _says(models.write(tmp_path, models.MIXED_TYPES), code).split() == ["False", "True"]


def test_parse_py_every_unsupported_operator_is_an_error_that_says_false(tmp_path):
    code = """
for number in range(parser.num_errors):
    error = parser.get_error(number)
    print(error.node_operator(), error.node_name(), error.code().name, error.desc())
"""
    assert _says(models.write(tmp_path, models.UNSUPPORTED), code).splitlines() == [
        "Det m.b/Det#0 UNSUPPORTED_NODE false",
        "Unique m.c/Unique#0 UNSUPPORTED_NODE false",
    ]


def test_backend_py_nonzero_is_promised_and_does_not_parse(tmp_path):
    text = "g (float[2,3] x) => (float[2,n] y) { i = NonZero(x) y = Cast<to = 1>(i) }"
    code = "print(parser.supports_operator('NonZero'), parsed)"
    assert _says(models.write(tmp_path, text), code).split() == ["True", "False"]


def test_parse_py_any_bytes_parse_as_an_empty_network(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x00garbage" * 100)
    assert _says(path, "print(parsed, network.num_outputs)").split() == ["True", "0"]


def test_parse_py_int8_convolutions(tmp_path):
    code = """
profile = builder.create_optimization_profile()
profile.set_shape("x", (1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
print("built" if plan is not None else "refused")
"""
    said = _says(models.write(tmp_path, models.INT8_CONV), code).split()[-1]
    assert said == ("built" if BACKEND.capabilities.int8_conv else "refused")


def test_onnx_scan_py_float64_becomes_float32_silently(tmp_path):
    model = models.write(tmp_path, "g (double[2] x) => (double[2] y) { y = Relu(x) }")
    assert _says(model, "print(parsed, network.get_input(0).dtype.name, log.said)") == "True FLOAT []"


def test_onnx_scan_py_an_input_without_a_rank_becomes_a_scalar(tmp_path):
    path = models.write(tmp_path, "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    assert _says(path, "print(parsed, tuple(network.get_input(0).shape), log.said)") == "True () []"


def test_onnx_scan_py_external_data_cut_short(tmp_path):
    path = models.write(tmp_path, "g (float[2,64] x) => (float[2,64] y) <float[64,64] w> { y = MatMul(x, w) }")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes()[:8000])
    # 1.6 parses (and builds) it; 1.7 refuses.
    assert _says(path, "print(parsed)") == str(not IS_1_7)


def test_onnx_scan_py_attention_of_one_tensor_crashes_1_7(tmp_path):
    done = _probe(models.write(tmp_path, models.SELF_ATTENTION, opset=23), BUILD)
    assert done.returncode == (-11 if IS_1_7 else 0)


@pytest.mark.parametrize("target", ["", "SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])
def test_header_py_the_mask_names_the_targets(tmp_path, target):
    chosen = f"config.num_compute_capabilities = 1\nconfig.set_compute_capability(trt.ComputeCapability.{target}, 0)\n"
    code = (chosen if target else "") + BUILD + "open(sys.argv[1] + '.engine', 'wb').write(plan)"
    model = models.write(tmp_path, models.STATIC)
    _says(model, code)
    header = read_rtx_header(model.with_name("model.onnx.engine"))
    assert header.version == BACKEND.version
    # The portable default leaves Turing out.
    named = (f"{target[2:-1]}.{target[-1]}",) if target else BACKEND.capabilities.targets[1:]
    assert header.compute_capabilities == named


def test_execute_py_a_second_logger_in_a_process_is_warned_of(tmp_path):
    code = """
second = Logger()
again = trt.Builder(second)
print(any("logger passed into createInferBuilder differs" in text for text in second.said))
"""
    assert _says(models.write(tmp_path, models.STATIC), code) == "True"
