"""A GPU that never was, at the seam below lanes: work waits in streams until something lets it run, in any order.

Memory is real (torch CPU tensors at their addresses), so a buffer that is overwritten too early, or read before it was
written, shows as a wrong number. The "engine" computes y = 2x + 1 and, with a second output, z = sum(x) a row.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
from collections import deque

import numpy as np

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.lanes import replay_in_steps
from trtforge.runtime.specs import TensorSpec

Work = tuple[str, object]


class FakeGpu:
    """Streams of queued work and events between them; `run` executes it, choosing among what may run next at random."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.streams: dict[int, deque[Work]] = {}
        self.recorded: dict[int, int] = {}
        self.reached: dict[int, int] = {}
        self.handles = 1000
        self.at_once = True

    def handle(self) -> int:
        with self.lock:
            self.handles += 1
            return self.handles

    def put(self, stream: int, kind: str, what: object) -> None:
        with self.lock:
            self.streams.setdefault(stream, deque()).append((kind, what))
            if self.at_once:
                self.run()

    def record(self, event: int, stream: int) -> None:
        with self.lock:
            number = self.recorded[event] = self.recorded.get(event, 0) + 1
            self.put(stream, "record", (event, number))

    def wait(self, stream: int, event: int) -> None:
        with self.lock:
            if number := self.recorded.get(event, 0):
                self.put(stream, "wait", (event, number))

    def is_done(self, event: int) -> bool:
        return self.reached.get(event, 0) >= self.recorded.get(event, 0)

    def run(self, until: int | None = None) -> None:
        """All of it; or, as little as chance allows, until an event is done."""
        with self.lock:
            while until is None or not self.is_done(until):
                ready = [stream for stream, queue in self.streams.items() if queue and self._may(queue[0])]
                if not ready:
                    break
                kind, what = self.streams[self.random.choice(ready)].popleft()
                if kind == "work":
                    what()
                elif kind == "record":
                    event, number = what
                    self.reached[event] = max(self.reached.get(event, 0), number)
            assert until is not None or not any(self.streams.values()), "the streams wait for each other"

    def _may(self, work: Work) -> bool:
        kind, what = work
        return kind != "wait" or self.reached.get(what[0], 0) >= what[1]


class FakeGraph:
    def __init__(self, context: FakeContext, addresses, shaped) -> None:
        self.context, self.addresses, self.shaped = context, tuple(addresses), shaped

    def launch(self, stream: int) -> None:
        self.context.session.launches += 1
        gpu, work = self.context.session.gpu, self.context.work(self.addresses, self.shaped)
        for step in work:
            gpu.put(stream, "work", step)


class FakeContext:
    def __init__(self, session: FakeSession, profile: int, on_layer) -> None:
        self.session, self.profile, self.on_layer = session, profile, on_layer
        self.gpu = session.gpu
        self.stream = self.gpu.handle()
        self.done, self.fork, self.join = (self.gpu.handle() for _ in range(3))
        self.shaped = None
        self.ran_at = None
        self.scratch = np.zeros(1 << 16, np.float32)
        self.closed = False

    def set_shapes(self, inputs):
        self._alone()
        if self.session.fail_shapes:
            raise ArtifactError("shapes fail")
        least, _, most = self.session.profiles[self.profile]["x"]
        assert all(a <= b <= c for a, b, c in zip(least, inputs[0], most, strict=True))
        self.shaped = tuple(tuple(shape) for shape in inputs)
        self.ran_at = None
        self.session.shapings += 1
        return self.session.output_shapes(self.shaped)

    def work(self, addresses, shaped):
        """Two steps, with the context's own memory between them: runs that overlap spoil each other."""
        shape = shaped[0]
        count = math.prod(shape)

        def first() -> None:
            self.scratch[:count] = _at(addresses[0], count)

        def second() -> None:
            _at(addresses[1], count)[:] = 2 * self.scratch[:count] + 1
            if len(addresses) > 2:
                _at(addresses[2], shape[0])[:] = self.scratch[:count].reshape(shape[0], -1).sum(1)

        return first, second

    def run(self, addresses, stream):
        self._alone()
        if self.session.fail_runs:
            self.session.fail_runs -= 1
            raise ArtifactError("the run fails")
        self.gpu.record(self.fork, stream)
        self.gpu.wait(self.stream, self.fork)
        for step in self.work(tuple(addresses), self.shaped):
            self.gpu.put(self.stream, "work", step)
        self.gpu.record(self.join, self.stream)
        self.gpu.wait(stream, self.join)
        self.ran_at = (self.shaped, tuple(addresses))
        self.session.runs += 1
        if self.on_layer:
            self.on_layer("first", 0.25)
            self.on_layer("second", 0.75)

    def capture(self, addresses, *, wait):
        self._alone()
        assert self.ran_at == (self.shaped, tuple(addresses)), "captured before it ran"
        if not self.session.capturable:
            return None
        self.session.captures += 1
        return FakeGraph(self, addresses, self.shaped)

    def make_replay(self, graph, inputs, inside, sizes):
        return replay_in_steps(self, graph, inputs, inside, sizes)

    def copy(self, target, source, size_bytes, stream):
        self.session.gpu.put(stream, "work", lambda: ctypes.memmove(target, source, size_bytes))

    def begin(self, stream):
        self._alone()
        self.gpu.wait(stream, self.done)

    def end(self, stream):
        self.gpu.record(self.done, stream)

    def is_idle(self):
        return self.gpu.is_done(self.done)

    def finish(self):
        self.gpu.run(until=self.done)

    def close(self):
        assert not self.closed
        assert self.gpu.is_done(self.done), "closed while it works"
        self.closed = True
        self.session.open -= 1

    def _alone(self) -> None:
        assert not self.closed
        assert self.session.entered.__dict__.get("yes"), "a thread that was not entered"


class FakeSession:
    """`profiles` are (min, opt, max) batches of an input x [batch, *tail]."""

    def __init__(self, profiles=((1, 2, 8),), tail=(4,), outputs=1, gpu=None) -> None:
        self.gpu = gpu or FakeGpu()
        self.inputs = (TensorSpec("x", "float32", ("x[0]", *tail)),)
        self.outputs = (TensorSpec("y", "float32", ("y[0]", *tail)), TensorSpec("z", "float32", ("z[0]",)))[:outputs]
        self.profiles = tuple({"x": tuple((batch, *tail) for batch in batches)} for batches in profiles)
        self.host_inputs = frozenset()
        self.alignment = 64  # what torch gives on the CPU
        self.entered = threading.local()
        self.capturable = True
        self.fail_shapes = self.fail_open = False
        self.fail_runs = self.runs = self.launches = self.captures = self.shapings = self.open = self.changes = 0
        self.closed = False

    def output_shapes(self, shapes):
        return (shapes[0], shapes[0][:1])[: len(self.outputs)]

    def open_context(self, profile, on_layer=None):
        if self.fail_open:
            raise ArtifactError("no context")
        self.open += 1
        return FakeContext(self, profile, on_layer)

    def enter_thread(self):
        self.entered.yes = True

    def kernels_changed(self):
        self.changes += 1

    def close(self):
        assert not self.open, "contexts are open"
        self.closed = True


def _at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
