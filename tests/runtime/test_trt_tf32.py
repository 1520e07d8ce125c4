"""The environment variable that decides TF32 on TensorRT-RTX is held while an engine lives, and given back."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.trt import tf32 as room
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.load import OpenEngine
from trtforge.runtime.trt.options import LoadOptions
from trtforge.runtime.trt.tf32 import Tf32Hold, set_build_tf32

VARIABLE = "NVIDIA_TF32_OVERRIDE"


@pytest.fixture(autouse=True, params=[None, "0", "1"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "_with_tf32", False)  # each test stands for a process of its own
    if request.param is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, request.param)
    yield request.param
    assert os.environ.get(VARIABLE) == request.param


@pytest.mark.parametrize(("tf32", "value"), [(False, "0"), (True, None)])
def test_value_is_held_and_given_back_with_the_last_engine(tf32: bool, value: str | None, before: str | None) -> None:
    first, second = Tf32Hold(tf32), Tf32Hold(tf32)
    assert os.environ.get(VARIABLE) == value
    first.release()
    first.release()
    assert os.environ.get(VARIABLE) == value
    second.release()
    assert os.environ.get(VARIABLE) == before


def test_engines_of_both_kinds_do_not_live_together() -> None:
    first = Tf32Hold(False)
    with pytest.raises(ArtifactError, match="without it lives in this process"):
        Tf32Hold(True)
    assert os.environ[VARIABLE] == "0"
    first.release()
    second = Tf32Hold(True)
    with pytest.raises(ArtifactError, match="with it lives in this process"):
        Tf32Hold(False)
    second.release()


def test_an_engine_with_tf32_spoils_the_process_for_those_without() -> None:
    Tf32Hold(False).release()
    Tf32Hold(True).release()
    with pytest.raises(ArtifactError, match="was loaded before"):
        Tf32Hold(False)
    Tf32Hold(True).release()


def test_a_forgotten_hold_lets_go() -> None:
    hold = Tf32Hold(False)
    assert os.environ[VARIABLE] == "0"
    del hold
    gc.collect()  # the fixture sees that the variable is back


def test_builds_set_it(before: str | None) -> None:
    set_build_tf32(False)
    assert os.environ[VARIABLE] == "0"
    set_build_tf32(True)
    assert VARIABLE not in os.environ
    if before is not None:
        os.environ[VARIABLE] = before


def test_an_engine_that_does_not_load_holds_nothing_while_its_error_is_kept(tmp_path: Path, before: str | None) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = tmp_path / "model.engine"
    plan.write_bytes(bytes(100))
    with pytest.raises(ArtifactError) as caught:
        OpenEngine(plan, find_backend("tensorrt-rtx"), tf32=False)
    assert caught.value.__traceback__ is not None
    assert os.environ.get(VARIABLE) == before


def test_an_engine_that_is_refused_after_it_was_read_is_freed_while_its_error_is_kept(
    tmp_path: Path, before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        streamable_weights_size = 0

    made: list[weakref.ref[Engine]] = []

    def deserialize(plan: bytes) -> Engine:
        engine = Engine()
        made.append(weakref.ref(engine))
        return engine

    trt = SimpleNamespace(Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize))
    monkeypatch.setattr("trtforge.runtime.trt.load.import_backend", lambda backend: trt)
    monkeypatch.setattr("trtforge.runtime.trt.load._runtime_logger", lambda trt: (SimpleNamespace(errors=[]), None))
    monkeypatch.setattr("trtforge.runtime.trt.load.load_plugins", lambda *given: None)
    (tmp_path / "model.engine").write_bytes(b"plan")
    backend: Any = SimpleNamespace(name="tensorrt")
    with pytest.raises(ConfigError, match="no weights to stream") as caught:
        OpenEngine(tmp_path / "model.engine", backend, tf32=False, options=LoadOptions(weight_budget_mib=1))
    assert caught.value.__traceback__ is not None
    assert made[0]() is None
