"""The compiled replay against the steps of `lanes`, on a driver that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import gc
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.lanes import replay_in_steps
from trtforge.runtime.trt.replay import CALLS, DriverCalls, NativeReplay, native_replay

DONE, GRAPH, STREAM = 0x1001, 0x2002, 0x3003
POINTER = ctypes.c_void_p
KINDS = {
    "wait": ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER, ctypes.c_uint),
    "copy": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, POINTER),
    "launch": ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER),
    "record": ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER),
}


class Recorder:
    """The driver's functions, a graph and a context of `lanes` at once; call number `failing` returns 700."""

    handle = GRAPH

    def __init__(self, failing: int = -1) -> None:
        self.log: list[tuple[object, ...]] = []
        self.failing = failing
        self.kept = [
            kind(lambda *given, name=name: self._say(name, *given))  # type: ignore[misc]
            for name, kind in KINDS.items()
        ]
        self.calls = DriverCalls(*(ctypes.cast(function, POINTER).value for function in self.kept))

    def _say(self, *what: object) -> int:
        self.log.append(what)
        return 700 if len(self.log) - 1 == self.failing else 0

    def check(self, code: int, name: str) -> None:
        if code:
            raise ArtifactError(f"{name}: {code}")

    def begin(self, stream: int) -> None:
        self.check(self._say("wait", stream, DONE, 0), CALLS[0])

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        if size_bytes:
            self.check(self._say("copy", target, source, size_bytes, stream), CALLS[1])

    def launch(self, stream: int) -> None:
        self.check(self._say("launch", GRAPH, stream), CALLS[2])

    def end(self, stream: int) -> None:
        self.check(self._say("record", DONE, stream), CALLS[4])


def native(driver: Recorder, inputs: int, inside: list[int], sizes: list[int]) -> NativeReplay:
    function = native_replay()
    if function is None:
        pytest.skip("no compiler was there when trtforge was installed")
    return NativeReplay(function, driver, driver, done=DONE, inputs=inputs, inside=inside, sizes=sizes)


ADDRESSES = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**40)), max_size=6)


@given(ADDRESSES, st.data())
def test_it_does_what_the_steps_do(tensors, data):
    inputs = data.draw(st.integers(0, len(tensors)))
    failing = data.draw(st.integers(-1, len(tensors) + 3))
    inside, outside, sizes = ([tensor[i] for tensor in tensors] for i in range(3))
    ends = []
    for make in (native, lambda driver, *rest: replay_in_steps(driver, driver, *rest)):
        driver = Recorder(failing)
        replay = make(driver, inputs, inside, sizes)
        try:
            replay(outside, STREAM)
            error = ""
        except ArtifactError as raised:
            error = str(raised)
        ends.append((driver.log, error))
    assert ends[0] == ends[1]
    assert (ends[0][1] != "") == (0 <= failing < len(ends[0][0]))


def test_it_keeps_what_its_addresses_point_to():
    driver = Recorder()
    replay = native(driver, 1, [0x10, 0x20], [4, 8])
    gc.collect()
    churn = [bytes([255]) * size for size in range(1, 400)]
    for number in range(100):
        driver.log.clear()
        replay([number, number + 1], STREAM)
        assert driver.log[1:4] == [
            ("copy", 0x10, number, 4, STREAM),
            ("launch", GRAPH, STREAM),
            ("copy", number + 1, 0x20, 8, STREAM),
        ]
    assert churn


def test_a_wrong_number_of_addresses_is_refused_and_nothing_runs():
    driver = Recorder()
    with pytest.raises(ValueError, match="size"):
        native(driver, 1, [1, 2], [3, 4])([5], STREAM)
    assert driver.log == []


def test_the_default_stream_is_a_null_handle():
    driver = Recorder()
    native(driver, 0, [], [])((), 0)
    assert driver.log == [("wait", None, DONE, 0), ("launch", GRAPH, None), ("record", DONE, None)]


def test_it_lets_go_of_the_interpreter():
    """Else a thread that waits in the driver would stop all others."""
    driver = Recorder()
    inside, go_on = threading.Event(), threading.Event()
    driver.kept[2] = KINDS["launch"](lambda graph, stream: inside.set() or not go_on.wait(10))
    driver.calls = DriverCalls(*(ctypes.cast(function, POINTER).value for function in driver.kept))
    thread = threading.Thread(target=native(driver, 0, [], []), args=((), STREAM))
    thread.start()
    assert inside.wait(10)
    go_on.set()
    thread.join(10)
    assert driver.log[-1] == ("record", DONE, STREAM)


def test_without_native_code_the_steps_are_made_one_by_one(monkeypatch):
    native_replay.cache_clear()
    monkeypatch.setenv("TRTFORGE_NATIVE", "0")
    assert native_replay() is None
    native_replay.cache_clear()
