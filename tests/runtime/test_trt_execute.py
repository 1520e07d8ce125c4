"""What can be said of running engines without a GPU; tests/gpu/test_engine_run.py runs them."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.tensors import group_samples, save_tensors
from trtforge.runtime.trt import execute
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.execute import EngineRunner, _extent, _holds, inspect_engine, run_engine

pytest.importorskip("tensorrt_rtx")
VERSION = find_backend("tensorrt-rtx").version


def _plan(version: str) -> bytes:
    numbers = bytes(int(number) for number in version.split("."))
    return struct.pack("<4sxxxxQQ4s4sI", b"vtrt", 2, 64, numbers, b"vtrt", 2).ljust(64, b"\0")


def test_an_engine_of_another_release_names_both(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(_plan("1.2.3.4"))
    with pytest.raises(ArtifactError, match=r"built by TensorRT-RTX 1\.2\.3\.4, and ") as caught:
        EngineRunner(path, "tensorrt-rtx")
    assert VERSION in str(caught.value)
    assert "tensorrt-rtx==1.2.3.4" in caught.value.fix


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, _plan(VERSION) + b"x"])
def test_what_is_no_engine_is_refused(tmp_path, data):
    path = tmp_path / "model.engine"
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        EngineRunner(path, "tensorrt-rtx")


@pytest.mark.skipif(gpu_present(), reason="a GPU is here")
def test_without_a_gpu_it_says_so_from_the_child_too(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(_plan(VERSION))
    feeds = tmp_path / "in.safetensors"
    save_tensors(feeds, {"s0/x": np.zeros(1, np.float32)})
    for run in (
        lambda: EngineRunner(path, "tensorrt-rtx"),
        lambda: run_engine(path, "tensorrt-rtx", feeds, tmp_path / "out.safetensors"),
        lambda: inspect_engine(path, "tensorrt-rtx"),
    ):
        with pytest.raises(ArtifactError, match="there is none here"):
            run()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("shape", "held"),
    [((1, 4), True), ((8, 4), True), ((0, 4), False), ((9, 4), False), ((2, 5), False), ((2,), False)],
)
def test_a_profile_holds_what_is_inside_it(shape, held):
    profile = {"x": ((1, 4), (2, 4), (8, 4))}
    array = np.zeros(shape, np.float32)
    assert _holds(profile, {"x": _extent(array, by_value=False)}) is held


def test_of_a_shape_input_a_profile_holds_the_values():
    profile = {"size": ((4, 4), (8, 8), (16, 16))}
    for values, held in (((4, 16), True), ((3, 8), False), ((8, 17), False)):
        assert _holds(profile, {"size": _extent(np.array(values), by_value=True)}) is held


def test_samples_are_grouped_at_the_first_slash():
    arrays = {name: np.zeros(1) for name in ("s0/a", "s0/b/c", "s1/a")}
    assert {sample: list(names) for sample, names in group_samples(arrays).items()} == {
        "s0": ["a", "b/c"],
        "s1": ["a"],
    }
    with pytest.raises(ArtifactError, match="'a' belongs to no sample"):
        group_samples({"a": np.zeros(1)})


@pytest.mark.parametrize("task", [execute.run_engine, execute.time_engine, execute.inspect_engine])
def test_every_child_opens_the_engine_as_it_was_built(task, tmp_path, monkeypatch):
    opened = []

    def run_child(name, args, on_event=None):
        execute._open(args)
        return {"milliseconds": 1.0}

    monkeypatch.setattr(execute, "run_child", run_child)
    monkeypatch.setattr(execute, "EngineRunner", lambda *args, **named: opened.append((args, named)))
    files = {"run_engine": 2, "time_engine": 1, "inspect_engine": 0}[task.__name__]
    built = {"tf32": True, "version_compatible": True, "plugins": [tmp_path / "libx.so"]}
    task(tmp_path / "model.engine", "tensorrt", *[tmp_path / "samples"] * files, **built)
    assert opened == [((tmp_path / "model.engine", "tensorrt"), built)]


def test_an_engine_without_a_context_is_closed(tmp_path, monkeypatch):
    closed = []

    class Opened:
        engine = SimpleNamespace(create_execution_context=lambda: None)
        log = None

        def refused(self, what):
            return ArtifactError(what)

        def close(self):
            closed.append("engine")

    cuda = SimpleNamespace(make_current=lambda: None, close=lambda: closed.append("cuda"))
    monkeypatch.setattr(execute, "find_backend", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(execute, "check_fit", lambda *given: None)
    monkeypatch.setattr(execute, "Cuda", lambda: cuda)
    monkeypatch.setattr(execute, "OpenEngine", lambda *given, **named: Opened())
    with pytest.raises(ArtifactError, match="no execution context"):
        EngineRunner(tmp_path / "model.engine", "tensorrt")
    assert closed == ["engine", "cuda"]
