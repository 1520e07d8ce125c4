"""What is kept apart: a stand-in for TensorRT's contexts notes who is inside of it with whom."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.context import GpuContext

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
