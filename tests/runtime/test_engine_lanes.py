"""Order on the GPU and threads: whatever the streams do between the events, every result is right."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_session import FakeGpu, FakeSession
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ArtifactError, ConfigError

CPU = torch.device("cpu")


class Streams:
    """The current stream of each thread."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __call__(self) -> int:
        return self.local.stream


def _engine(
    gpu: FakeGpu, contexts: int, graphs: int = 4, outputs: int = 1, profiles=((1, 2, 8),)
) -> tuple[Engine, FakeSession, Streams]:
    session, streams = FakeSession(profiles, gpu=gpu, outputs=outputs), Streams()
    streams.local.stream = 1
    return Engine.over(session, CPU, streams, contexts=contexts, graphs=graphs), session, streams


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    contexts=st.integers(1, 3),
    graphs=st.integers(0, 2),
    two=st.booleans(),
    calls=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans()), min_size=1, max_size=40),
)
def test_any_order_that_the_events_allow_gives_the_same_results(seed, contexts, graphs, two, calls):
    gpu = FakeGpu(seed)
    gpu.at_once = False
    engine, session, streams = _engine(gpu, contexts, graphs, 2, ((1, 2, 2), (1, 4, 4)) if two else ((1, 4, 4),))
    kept = []
    bound = {}
    for number, (stream, batch, in_place) in enumerate(calls):
        streams.local.stream = stream
        if in_place:
            # one bound call a stream and shape: the caller orders its own tensors by using one stream
            if (stream, batch) not in bound:
                x = torch.zeros(batch, 4)
                bound[stream, batch] = x, engine.bind(x)
            x, step = bound[stream, batch]
            result = torch.empty(batch, 4)
            gpu.put(stream, "work", lambda x=x, number=number: x.fill_(number))
            step()
            y = step.outputs["y"]
            gpu.put(stream, "work", lambda result=result, y=y: result.copy_(y))
            kept.append((torch.full((batch, 4), float(number)), result, None))
        else:
            x = torch.full((batch, 4), float(number)) + torch.arange(batch)[:, None]
            out = engine(x)
            kept.append((x, out["y"], out["z"]))
    gpu.run()
    for x, y, z in kept:
        assert torch.equal(y, 2 * x + 1)
        assert z is None or torch.equal(z, x.sum(1))
    assert engine.contexts <= contexts * (1 + two)
    bound.clear()
    engine.close()
    assert not session.open


def test_one_stream_needs_one_context_from_however_many_threads():
    engine, _, streams = _engine(FakeGpu(), contexts=4)

    def call(number: int) -> bool:
        streams.local.stream = 5
        x = torch.full((1 + number % 4, 4), float(number))
        return torch.equal(engine(x), 2 * x + 1)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(400)))
    assert engine.contexts == 1


def test_streams_that_overlap_get_contexts_of_their_own_up_to_the_limit():
    gpu = FakeGpu()
    gpu.at_once = False
    engine, session, streams = _engine(gpu, contexts=3)
    kept = []
    for _ in range(3):
        for stream in (1, 2, 3, 4, 5):
            streams.local.stream = stream
            x = torch.full((2, 4), float(stream))
            kept.append((x, engine(x)))
    assert engine.contexts == 3
    assert session.open == 3
    gpu.run()
    for x, y in kept:
        assert torch.equal(y, 2 * x + 1)


def test_streams_one_after_the_other_share_a_context():
    engine, _, streams = _engine(FakeGpu(), contexts=4)
    for stream in range(20):
        streams.local.stream = stream
        engine(torch.zeros(2, 4))
    assert engine.contexts == 1


def test_threads_on_streams_of_their_own():
    engine, session, streams = _engine(FakeGpu(), contexts=4, graphs=3)
    started = threading.Barrier(8)

    def calls(thread: int) -> int:
        streams.local.stream = thread
        started.wait()
        right = 0
        for number in range(200):
            x = torch.full((1 + (thread + number) % 8, 4), float(1000 * thread + number))
            right += torch.equal(engine(x), 2 * x + 1)
        return right

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(calls, range(8))) == 1600
    assert engine.contexts <= 4
    engine.close()
    assert session.closed


def test_where_no_further_context_can_be_had_the_first_must_do():
    gpu = FakeGpu()
    gpu.at_once = False
    engine, session, streams = _engine(gpu, contexts=4)
    session.fail_open = True
    kept = []
    for stream in (1, 2, 3):
        streams.local.stream = stream
        x = torch.full((2, 4), float(stream))
        kept.append((x, engine(x)))
    gpu.run()
    assert all(torch.equal(y, 2 * x + 1) for x, y in kept)
    assert engine.contexts == 1


def test_closing_while_threads_call_gives_results_or_says_closed():
    engine, session, streams = _engine(FakeGpu(), contexts=2)
    begun = threading.Event()

    def calls(thread: int) -> str:
        streams.local.stream = thread
        for number in range(100_000):
            x = torch.full((1 + number % 3, 4), float(number))
            try:
                y = engine(x)
            except ConfigError as error:
                return error.what
            assert torch.equal(y, 2 * x + 1)
            begun.set()
        return "never closed"

    with ThreadPoolExecutor(3) as pool:
        said = [pool.submit(calls, thread) for thread in range(3)]
        begun.wait(10)
        engine.close()
        assert {one.result() for one in said} == {"the engine was closed"}
    assert session.closed


def test_a_context_that_opens_while_the_engine_closes_is_closed():
    gpu = FakeGpu()
    gpu.at_once = False
    engine, session, streams = _engine(gpu, contexts=2)
    x = torch.zeros(2, 4)
    y = engine(x)  # kept: the work that waits for the GPU writes there
    opening, go_on = threading.Event(), threading.Event()
    open_context = session.open_context

    def slowly(profile, on_layer=None):
        opening.set()
        go_on.wait(10)
        return open_context(profile, on_layer)

    session.open_context = slowly

    def call() -> None:
        streams.local.stream = 2
        with pytest.raises(ConfigError, match="closed"):
            engine(torch.zeros(2, 4))

    thread = threading.Thread(target=call)
    thread.start()
    assert opening.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._lanes._closed:
        time.sleep(0.001)
    go_on.set()
    thread.join(10)
    closing.join(10)
    assert not thread.is_alive()
    assert session.open == 0
    assert torch.equal(y, 2 * x + 1)


def test_each_profile_has_contexts_of_its_own_which_threads_wait_for():
    engine, session, streams = _engine(FakeGpu(), contexts=2, profiles=((1, 2, 2), (3, 4, 4), (5, 6, 8)))
    assert engine.contexts == 1
    started = threading.Barrier(6)
    open_context = session.open_context

    def slowly(profile, on_layer=None):
        time.sleep(0.05)
        return open_context(profile, on_layer)

    session.open_context = slowly

    def calls(thread: int) -> int:
        streams.local.stream = thread
        started.wait()
        right = 0
        for number in range(60):
            x = torch.full((1 + (thread + number) % 8, 4), float(number))
            right += torch.equal(engine(x), 2 * x + 1)
        return right

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(calls, range(6))) == 360
    assert 3 <= engine.contexts <= 6


def test_a_profile_without_memory_for_its_first_context_fails_alone():
    engine, session, _ = _engine(FakeGpu(), contexts=2, profiles=((1, 2, 2), (3, 4, 4)))
    session.fail_open = True
    for _ in range(2):
        with pytest.raises(ArtifactError, match="no context"):
            engine(torch.zeros(4, 4))
        assert torch.equal(engine(torch.zeros(2, 4)), torch.ones(2, 4))
    session.fail_open = False
    assert torch.equal(engine(torch.zeros(4, 4)), torch.ones(4, 4))


def test_a_call_that_does_not_end_keeps_what_it_runs_on(monkeypatch, caplog):
    monkeypatch.setattr("trtforge.runtime.lanes._CLOSING_S", 0.05)
    engine, session, _ = _engine(FakeGpu(), contexts=1)
    lane = engine._lanes.acquire(1, 0)
    engine.close()
    lane.lock.release()
    assert session.open
    assert not session.closed
    assert "does not end" in caplog.text


def test_where_no_further_context_can_be_had_lanes_may_change_places_meanwhile():
    class Slow(list):  # type: ignore[type-arg]
        def remove(self, lane) -> None:
            super().remove(lane)
            removed.set()
            time.sleep(0.05)

    removed, failing = threading.Event(), threading.Event()
    engine, session, streams = _engine(FakeGpu(), contexts=2)
    lanes = engine._lanes
    lanes._lanes[0] = Slow(lanes._lanes[0])

    def open_context(profile, on_layer=None):
        failing.set()
        assert removed.wait(10)
        raise ArtifactError("no context")

    session.open_context = open_context

    def call(stream: int) -> bool:
        streams.local.stream = stream
        x = torch.full((2, 4), float(stream))
        return torch.equal(engine(x), 2 * x + 1)

    with ThreadPoolExecutor(2) as pool:
        with lanes._lanes[0][0].lock:  # busy, so that one more is opened
            first = pool.submit(call, 2)
            assert failing.wait(10)
            second = pool.submit(call, 3)
            assert removed.wait(10)
        assert first.result(10)
        assert second.result(10)


def test_contexts_are_counted_while_another_thread_adds_a_profile():
    engine, _, streams = _engine(FakeGpu(), contexts=1, profiles=((1, 2, 2), (3, 4, 4)))

    def call() -> None:
        streams.local.stream = 2
        engine(torch.zeros(4, 4))

    adding = threading.Thread(target=call)

    class Adding(list):  # type: ignore[type-arg]
        def _add(self) -> None:
            if adding.ident is None:
                adding.start()
                adding.join(0.1)

        def __len__(self) -> int:
            self._add()
            return super().__len__()

        def __iter__(self):
            self._add()
            return super().__iter__()

    engine._lanes._lanes[0] = Adding(engine._lanes._lanes[0])
    assert engine.contexts in (1, 2)
    adding.join(10)
    assert engine.contexts == 2
