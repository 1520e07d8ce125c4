"""What is kept apart: a stand-in for TensorRT's contexts notes who is inside of it with whom."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.context import GpuContext
from trtforge.runtime.trt.gate import GATE
from trtforge.runtime.trt.session import EngineSession

SPEC = TensorSpec("x", "float32", ("n",))


class Inside:
    """Who is inside TensorRT; remembers each time that one who compiles was not alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now: list[str] = []
        self.broken: list[list[str]] = []
        self.most = 0

    def enter(self, what: str) -> None:
        with self.lock:
            self.now.append(what)
            self.most = max(self.most, len(self.now))
            if len(self.now) > 1 and "compiles" in self.now:
                self.broken.append(list(self.now))
        time.sleep(0.001)
        with self.lock:
            self.now.remove(what)


class StandIn:
    """An `IExecutionContext` that compiles where shapes are new to it."""

    def __init__(self, inside: Inside) -> None:
        self.inside, self.known, self.shape = inside, set[tuple[int, ...]](), ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.inside.enter("knows" if shape in self.known else "compiles")
        self.shape = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.inside.enter("knows" if self.shape in self.known else "compiles")
        self.known.add(self.shape)
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        return True


class Streams:
    def create_stream(self) -> int:
        return 1

    def create_event(self) -> int:
        return 2

    def record(self, event: int, stream: int) -> None: ...

    def wait(self, stream: int, event: int) -> None: ...

    def destroy_event(self, event: int) -> None: ...

    def destroy_stream(self, stream: int) -> None: ...


def test_what_compiles_is_alone_and_what_is_compiled_is_not() -> None:
    inside = Inside()
    opened: Any = SimpleNamespace(
        inputs=(SPEC,), outputs=(SPEC,), host_inputs=frozenset(), log=SimpleNamespace(errors=[])
    )

    def call(seed: int) -> None:
        streams: Any = Streams()
        context = GpuContext(opened, streams, StandIn(inside), 0)
        for number in range(60):
            assert context.set_shapes([(1 + (seed + number) % 5,)])
            context.run([1, 2], 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(8)))
    assert inside.broken == []
    assert inside.most > 1  # known shapes still run beside each other


def _is_alone() -> bool:
    with GATE.alone(wait=False) as entered:
        return not entered


def test_what_is_freed_is_freed_alone() -> None:
    freed = []

    class Freed(StandIn):
        def __del__(self) -> None:
            freed.append(_is_alone())

    opened: Any = SimpleNamespace(inputs=(SPEC,), outputs=(SPEC,), host_inputs=frozenset())
    streams: Any = Streams()
    GpuContext(opened, streams, Freed(Inside()), 0).close()
    assert freed == [True]


def test_an_engine_is_freed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    freed = []
    opened = SimpleNamespace(close=lambda: freed.append(_is_alone()))
    here = {
        "find_backend": lambda name: SimpleNamespace(name=name),
        "check_fit": lambda *given, **named: None,
        "Cuda": lambda: SimpleNamespace(close=lambda: None),
        "Streams": lambda cuda: Streams(),
        "OpenEngine": lambda *given, **named: opened,
    }
    for name, stand_in in here.items():
        monkeypatch.setattr(f"trtforge.runtime.trt.session.{name}", stand_in)
    EngineSession(tmp_path / "model.engine", "tensorrt", None, None).close()
    assert freed == [True]


def test_a_context_that_cannot_take_its_profile_leaves_nothing_behind() -> None:
    class Refusing(StandIn):
        def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
            return False

    class Counting(Streams):
        left = 0

        def create_stream(self) -> int:
            self.left += 1
            return 1

        def create_event(self) -> int:
            self.left += 1
            return 2

        def destroy_event(self, event: int) -> None:
            self.left -= 1

        def destroy_stream(self, stream: int) -> None:
            self.left -= 1

    opened: Any = SimpleNamespace(inputs=(SPEC,), outputs=(SPEC,), host_inputs=frozenset(), refused=ArtifactError)
    streams: Any = Counting()
    with pytest.raises(ArtifactError, match="profile 1"):
        GpuContext(opened, streams, Refusing(Inside()), 1)
    assert streams.left == 0


def test_graphs_are_not_destroyed_at_exit_while_a_daemon_thread_may_launch_them() -> None:
    script = """
from types import SimpleNamespace
from trtforge.runtime.trt.context import _GpuGraph
kept = _GpuGraph(SimpleNamespace(destroy_graph=lambda handle: print("destroyed", handle)), 7)
dropped = _GpuGraph(SimpleNamespace(destroy_graph=lambda handle: print("destroyed", handle)), 8)
del dropped
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "destroyed 8\n"
