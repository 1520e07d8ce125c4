"""Builds with the TensorRT-RTX that is installed; none of it needs a GPU."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import trt_models as models

from trtforge.runtime.errors import ArtifactError, BuildError, ConfigError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.build import BuildRequest, build_engine
from trtforge.runtime.trt.header import read_rtx_header
from trtforge.runtime.trt.options import BuildOptions

pytest.importorskip("tensorrt_rtx")
BACKEND = find_backend("tensorrt-rtx")
CONV_PROFILE = {"x": ((1, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))}


def _build(onnx_path: Path, profiles=(), on_event=None, **options):
    request = BuildRequest(
        onnx=onnx_path,
        engine=onnx_path.with_suffix(".engine"),
        backend="tensorrt-rtx",
        profiles=tuple(profiles),
        **{"tf32": False, **options},
    )
    return build_engine(request, on_event)


def _fails(onnx_path: Path, profiles=(), error=BuildError, **options) -> str:
    with pytest.raises(error) as caught:
        _build(onnx_path, profiles, **options)
    assert [path.name for path in onnx_path.parent.iterdir() if "engine" in path.name] == []
    return str(caught.value)


def test_a_dynamic_convolution_is_built_and_described(tmp_path):
    events = []
    folder = tmp_path / "with space and ünï"
    folder.mkdir()
    path = models.write(folder, models.CONV)
    built = _build(path, [CONV_PROFILE], events.append)
    data = built.path.read_bytes()
    assert built.path == folder / "model.engine"
    assert built.sha256 == hashlib.sha256(data).hexdigest()
    assert built.size_bytes == len(data)
    assert (built.backend, built.version) == ("tensorrt-rtx", BACKEND.version)
    assert built.inputs == (TensorSpec("x", "float32", ("batch", 2, 8, 8)),)
    assert built.outputs == (TensorSpec("y", "float32", ("y[0]", 3, 6, 6)),)
    assert read_rtx_header(built.path).version == built.version
    assert {"parse", "build", "total"} == set(built.seconds)
    assert built.warnings == ()
    assert events
    assert all(event["event"] == "progress" and event["stage"] == "build" for event in events)
    assert all(0 <= event["done"] <= event["total"] and event["phase"] for event in events)
    assert sorted(p.name for p in folder.iterdir()) == ["model.engine", "model.onnx"]


def test_targets_two_profiles_and_options_reach_the_builder(tmp_path):
    path = models.write(tmp_path, models.CONV)
    wide = {"x": ((4, 2, 8, 8), (8, 2, 8, 8), (16, 2, 8, 8))}
    built = _build(
        path,
        [CONV_PROFILE, wide],
        compute_capabilities=("8.6", "8.9"),
        tf32=True,
        options=BuildOptions(optimization_level=1, workspace_mib=256, tiling="fast", weight_streaming=True),
    )
    assert built.compute_capabilities == ("8.6", "8.9")


def test_types_are_those_of_the_onnx(tmp_path):
    text = """g (int64[n] i, bool[n] m, float16[n] h) => (int64[n] y, bfloat16[n] b) {
      f = Cast<to = 1>(i) g2 = Cast<to = 1>(h) w = Where(m, f, g2) y = Cast<to = 7>(w) b = Cast<to = 16>(w)
    }"""
    profile = dict.fromkeys("imh", ((1,), (2,), (4,)))
    built = _build(models.write(tmp_path, text), [profile])
    assert [spec.dtype for spec in built.inputs] == ["int64", "bool", "float16"]
    assert [spec.dtype for spec in built.outputs] == ["int64", "bfloat16"]


def test_tf32_is_switched_off_and_on():
    import tensorrt_rtx as trt

    from trtforge.runtime.trt.build import _configure

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    for wanted in (False, True):
        args = {"tf32": wanted, "options": BuildOptions().to_json(), "targets": []}
        config = _configure(trt, builder, args)
        assert config.get_flag(trt.BuilderFlag.TF32) is wanted


def test_every_unsupported_operator_is_named_at_once(tmp_path):
    said = _fails(models.write(tmp_path, models.UNSUPPORTED))
    assert "has no operators Det, NonZero, Unique" in said
    for node in ("m.b/Det#0 (Det)", "m.c/Unique#0 (Unique)", "m.d/NonZero#0 (NonZero)"):
        assert node in said
    assert "cudaError" not in said


def test_the_users_line_and_the_enclosing_nodes_are_named(tmp_path):
    then = onnx.parser.parse_graph("t () => (float[n] r) { [then] r = Det(x) }")
    other = onnx.parser.parse_graph("e () => (float[n] r2) { r2 = ReduceSum(x) }")
    path = models.write(tmp_path, "g (float[2,3,3] x, bool c) => (float[n] y) { y = Identity(x) }")
    model = onnx.load(path)
    del model.graph.node[:]
    node = onnx.helper.make_node("If", ["c"], ["y"], "m/If#0", then_branch=then, else_branch=other)
    model.graph.node.append(node)
    (branch,) = (a.g for a in model.graph.node[0].attribute if a.name == "then_branch")
    line = branch.node[0].metadata_props.add()
    line.key, line.value = "trtforge.line", "model.py:42"
    onnx.save(model, path)
    said = _fails(path)
    assert "has no operator Det," in said
    assert "then (Det) inside m/If#0 (If)" in said
    assert "from model.py:42" in said


def test_a_type_conflict_names_node_and_cause_without_noise(tmp_path):
    said = _fails(models.write(tmp_path, models.MIXED_TYPES))
    assert "m.add/Add#0 (Add)" in said
    assert "must have same input types. But they are of types Half and Float." in said
    assert "/_src/" not in said
    assert "cudaError" not in said


def test_an_operator_that_parses_and_does_not_build_is_named(tmp_path):
    said = _fails(models.write(tmp_path, models.NON_MAX_SUPPRESSION))
    assert "NonMaxSuppression does not build: m.head/NonMaxSuppression#0" in said


def test_a_frozen_batch_is_an_error_although_tensorrt_only_warns(tmp_path):
    profile = {"x": ((1, 6), (2, 6), (4, 6))}
    said = _fails(models.write(tmp_path, models.BAKED), [profile])
    assert "does not hold over the whole optimization profile" in said
    assert "at the profile's max" in said


def test_values_that_decide_shapes_are_refused(tmp_path):
    assert "values of input 's' decide shapes" in _fails(models.write(tmp_path, models.SHAPE_INPUT))


def test_a_native_crash_is_a_build_error(tmp_path):
    path = models.write(tmp_path, models.SELF_ATTENTION, opset=23)
    if BACKEND.version.startswith("1.7."):
        said = _fails(path)
        assert "crashed natively (SIGSEGV) while building" in said
        assert "m.attn/Attention#0 (Attention): query, key and value are one tensor" in said
    else:
        assert _build(path).size_bytes > 0


def test_attention_of_three_tensors_builds(tmp_path):
    assert _build(models.write(tmp_path, models.ATTENTION, opset=23)).size_bytes > 0


def test_int8_convolutions_where_there_is_a_kernel(tmp_path):
    path = models.write(tmp_path, models.INT8_CONV)
    if BACKEND.capabilities.int8_conv:
        assert _build(path, [CONV_PROFILE]).size_bytes > 0
    else:
        said = _fails(path, [CONV_PROFILE])
        assert "INT8 Conv from 1.7 on" in said
        assert "m.conv/Conv#0" in said


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        (None, "there is no optimization profile, and these inputs are dynamic: x"),
        ({}, "lacks the dynamic input 'x'"),
        ({"xx": CONV_PROFILE["x"]}, "did you mean 'x'?"),
        ({"x": ((3, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))}, "has [3, 2, 4], not 1 <= min <= opt <= max"),
        ({"x": ((0, 2, 8, 8), (2, 2, 8, 8), (4, 2, 8, 8))}, "has [0, 2, 4]"),
        ({"x": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}, "axis 1 is fixed at 2"),
        ({"x": ((1, 2, 8), (2, 2, 8), (4, 2, 8))}, "has 3 dimensions, the network's 4"),
    ],
)
def test_wrong_profiles(profile, says):
    from trtforge.runtime.trt.profiles import add_profiles

    inputs = (TensorSpec("x", "float32", ("batch", 2, 8, 8)),)
    with pytest.raises(BuildError) as caught:
        add_profiles(None, None, inputs, [] if profile is None else [profile])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("g (double[2] x) => (double[2] y) { y = Relu(x) }", "float64: input 'x', output 'y'"),
        (
            "g (float[2] x) => (float[2] y) { d = Cast<to = 11>(x) e = Sqrt(d) y = Cast<to = 1>(e) }",
            "float64: node 'm/Cast#0' (Cast)",
        ),
        (
            "g (float[2] x) => (float[2] y) { d = Constant<value = double[1] {2}>() s = Sqrt(d) y = Cast<to = 1>(s) }",
            "float64: node 'm/Constant#0' (Constant)",
        ),
        ("g (float x) => (float[2] y) { y = Relu(x) }", "input 'x' has no rank"),
        ("g (seq(float[2]) x) => (float[2] y) { y = ConcatFromSequence<axis = 0>(x) }", "is no tensor"),
    ],
)
def test_what_the_parser_would_swallow(tmp_path, text, says):
    path = models.write(tmp_path, text)
    if "no rank" in says:
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.ClearField("shape")
        onnx.save(model, path)
    assert says in _fails(path)


def test_a_double_constant_that_is_only_cast_down_is_no_harm(tmp_path):
    text = "g (float[2] x) => (float[2] y) <double[2] k = {1, 2}> { f = Cast<to = 1>(k) y = Add(x, f) }"
    assert _build(models.write(tmp_path, text)).size_bytes > 0


def test_external_data_missing_and_cut_short(tmp_path):
    path = models.write(tmp_path, "g (float[2,64] x) => (float[2,64] y) <float[64,64] w> { y = MatMul(x, w) }")
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
    assert _build(path).size_bytes > 0
    path.with_suffix(".engine").unlink()
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes()[:-4])
    assert "w.bin, which has 16380 bytes; 16384 are needed" in _fails(path)
    data.unlink()
    assert "which is missing" in _fails(path)


@pytest.mark.parametrize("data", [b"\x00garbage" * 100, b""])
def test_what_is_no_onnx_file(tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    assert "is not an ONNX file" in _fails(path)


def test_a_missing_file(tmp_path):
    assert "No such file" in _fails(tmp_path / "absent.onnx")


def test_wrong_targets_and_levels(tmp_path):
    path = models.write(tmp_path, models.STATIC)
    assert "choose from 7.5, 8.0" in _fails(path, error=ConfigError, compute_capabilities=("9.0",))
    assert "not 0 to 5" in _fails(path, error=ConfigError, options=BuildOptions(optimization_level=9))


def test_an_engine_that_cannot_be_written(tmp_path):
    path = models.write(tmp_path, models.STATIC)
    request = BuildRequest(path, tmp_path / "absent" / "e.engine", "auto", (), tf32=False)
    with pytest.raises(ArtifactError, match="cannot write the engine"):
        build_engine(request)


def test_a_failed_build_leaves_the_old_engine(tmp_path):
    path = models.write(tmp_path, models.UNSUPPORTED)
    path.with_suffix(".engine").write_bytes(b"old")
    with pytest.raises(BuildError):
        _build(path)
    assert path.with_suffix(".engine").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_child_loads_neither_torch_nor_onnx(tmp_path):
    path = models.write(tmp_path, models.STATIC)
    args = {
        "onnx": str(path),
        "engine": str(tmp_path / "e.engine"),
        "backend": "tensorrt-rtx",
        "profiles": [],
        "tf32": False,
        "targets": [],
        "options": BuildOptions().to_json(),
    }
    code = (
        "import json, sys; from trtforge.runtime.trt.build import build_task; "
        "build_task(json.loads(sys.argv[1]), lambda *a, **k: None); "
        "print({'torch', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(args)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


SLOW = "g (float[batch,3,64,64] x) => (float[batch,8,64,64] y) <float[8,3,3,3] w0, float[8,8,3,3] w> {{\n{body}\n}}"


def _long_build(tmp_path: Path) -> Path:
    lines = ["c0 = Conv<pads = [1,1,1,1]>(x, w0)"]
    for i in range(600):
        lines.append(f"r{i} = Tanh(c{i})")
        lines.append(f"c{i + 1} = Conv<pads = [1,1,1,1]>(r{i}, w)")
    return models.write(tmp_path, SLOW.format(body="\n".join([*lines, "y = Relu(c600)"])))


PARENT = """
import sys
from pathlib import Path
from trtforge.runtime.trt.build import BuildRequest, build_engine
P = {"x": ((1, 3, 64, 64), (2, 3, 64, 64), (4, 3, 64, 64))}
request = BuildRequest(Path(sys.argv[1]), Path(sys.argv[1]).with_suffix(".engine"), "tensorrt-rtx", (P,), tf32=False)
build_engine(request, lambda event: print(event["phase"], flush=True))
"""


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until_gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not _alive(pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_parent_stops_a_native_build_at_once(tmp_path, how):
    path = _long_build(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip()  # the native build has begun
        (child,) = _children(parent.pid)
        started = time.monotonic()
        parent.send_signal(how)
        _, errors = parent.communicate(timeout=30)
        assert _wait_until_gone(child, 5)
        assert time.monotonic() - started < 5
    assert not path.with_suffix(".engine").exists()
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
