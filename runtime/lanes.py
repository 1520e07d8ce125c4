"""Lanes: each an execution context with the buffers and CUDA graphs that belong to it, for one call at a time.

Knows neither torch nor TensorRT: it works with addresses, sizes in bytes and stream handles. `Session` and `Context`
are the one seam below it: a test puts a fake there, and everything above runs without a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.specs import TensorSpec

__all__ = [
    "Allocate",
    "Buffer",
    "Context",
    "Graph",
    "Lane",
    "Lanes",
    "OnLayer",
    "Plan",
    "Replay",
    "Session",
    "Shape",
    "replay_in_steps",
]

Shape = tuple[int, ...]

OnLayer = Callable[[str, float], None]
"""Receives the name and the time, in ms, of each layer of each run."""

Replay = Callable[[Sequence[int], int], None]
"""Runs a captured graph on the contents of the caller's addresses, inputs then outputs, in a stream's order: waits for
the context's earlier work, copies in, launches, copies out, and is the context's work from there on. Where the graph
was captured at the caller's addresses they are left out, and nothing is copied.
"""

_SIGHTINGS_KEPT = 1024
_CLOSING_S = 30.0


class Graph(Protocol):
    """One run of a context at fixed addresses and shapes, recorded; its memory is freed with the last reference."""

    def launch(self, stream: int) -> None:
        """Puts the run on the stream."""
        ...


class Context(Protocol):
    """One execution context, in one optimization profile. One thread at a time; several contexts run at once.

    Work that touches the context's memory stands between `begin` and `end`, so that it never overlaps on the GPU with
    the context's earlier work, whatever the streams. Addresses come in the order of the session's inputs, then outputs.
    """

    def set_shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """Prepares a run and says the outputs' shapes."""
        ...

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """Runs once, in the stream's order; the host does not wait."""
        ...

    def capture(self, addresses: Sequence[int], *, wait: bool) -> Graph | None:
        """Records a run without running it; it must have run before, since `set_shapes`, at these addresses.

        None where that cannot be, or not now; `wait` makes it wait until it can be now.
        """
        ...

    def make_replay(self, graph: Graph, inputs: int, inside: Sequence[int], sizes: Sequence[int]) -> Replay:
        """What `replay_in_steps` gives, or the same faster.

        Args:
            graph: Of this context; the replay keeps it.
            inputs: How many of the addresses are inputs.
            inside: Where it was captured, inputs then outputs; none to copy nothing.
            sizes: Bytes at each of them.
        """
        ...

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copies memory, in the stream's order."""
        ...

    def begin(self, stream: int) -> None:
        """Later work of the stream waits for the context's earlier work."""
        ...

    def end(self, stream: int) -> None:
        """What the stream holds so far is the context's work."""
        ...

    def is_idle(self) -> bool:
        """Whether the context's work is done."""
        ...

    def finish(self) -> None:
        """The host waits for the context's work."""
        ...

    def close(self) -> None:
        """Frees it; its work is done."""
        ...


class Session(Protocol):
    """A loaded engine, from which contexts are made. Thread safe."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def profiles(self) -> tuple[Mapping[str, tuple[Shape, ...]], ...]:
        """For each optimization profile the min, opt and max shape by input name."""
        ...

    @property
    def host_inputs(self) -> frozenset[str]:
        """Inputs whose values decide shapes. Wherever a shape of theirs is asked for, their values are meant: two calls
        with other values are as two with other shapes. Their addresses are of no account.
        """
        ...

    @property
    def alignment(self) -> int:
        """Bytes of which every address must be a multiple."""
        ...

    def open_context(self, profile: int, on_layer: OnLayer | None = None) -> Context:
        """A new context in a profile; with `on_layer` each of its runs waits for the GPU and reports its layers."""
        ...

    def enter_thread(self) -> None:
        """To be called in each thread before anything else of the session or its contexts."""
        ...

    def kernels_changed(self) -> None:
        """Shapes ran for the first time, so that the runtime may have compiled something worth keeping."""
        ...

    def close(self) -> None:
        """Frees it; its contexts are closed."""
        ...


class Buffer(Protocol):
    """Memory of the device."""

    def data_ptr(self) -> int: ...


Allocate = Callable[[int], Buffer]
"""Memory of this many bytes, aligned as TensorRT wants it; freed with the last reference."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a call with certain input shapes takes; two of them are the same only if they are one object.

    Attributes:
        profile: The optimization profile.
        inputs: Shapes, in order.
        outputs: Shapes, in order.
        sizes: Bytes of each input, then of each output.
    """

    profile: int
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    sizes: tuple[int, ...]


class Lane:
    """A context, its buffers, and a captured graph for each of the shapes that came back. The caller holds `lock`.

    A shape that is seen once runs without a graph, since a capture costs more than it saves then; when it comes again
    it is captured, and from the third time on replayed. A graph fixes addresses, so callers' tensors are copied to and
    from buffers of the lane, which grow with the shapes; that drops the graphs, which are captured anew.

    Args:
        context: Owned by the lane.
        profile: The context's.
        allocate: Makes the buffers.
        graph_limit: How many graphs are kept; the one used longest ago goes first.
    """

    def __init__(self, context: Context, profile: int, allocate: Allocate, graph_limit: int) -> None:
        self.lock = threading.Lock()
        self.context = context
        self.profile = profile
        self.stream: int | None = None
        self.closed = False
        self._allocate = allocate
        self._graph_limit = graph_limit
        self._buffers: list[Buffer] = []
        self._room: list[int] = []
        self._addresses: tuple[int, ...] = ()
        self._graphs: OrderedDict[Plan, Replay] = OrderedDict()
        self._sighted: OrderedDict[Plan, None] = OrderedDict()
        self._shaped: Sequence[Shape] | None = None

    @property
    def graphs(self) -> int:
        """How many graphs are kept."""
        return len(self._graphs)

    def output_shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """What the engine makes of inputs of these shapes."""
        self._shaped = None
        shapes = self.context.set_shapes(inputs)
        self._shaped = inputs
        return shapes

    def call(self, plan: Plan, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
        """Runs on the contents of `inputs` into `outputs`, both addresses, in the stream's order."""
        if replay := self._graphs.get(plan):
            self._graphs.move_to_end(plan)
            replay([*inputs, *outputs], stream)
            return
        self._make_room(plan)
        self._set_shapes(plan)
        context, sizes, addresses = self.context, plan.sizes, self._addresses
        first_output = len(inputs)
        context.begin(stream)
        try:
            for source, target, size in zip(inputs, addresses, sizes, strict=False):
                context.copy(target, source, size, stream)
            context.run(addresses, stream)
            for target, source, size in zip(outputs, addresses[first_output:], sizes[first_output:], strict=True):
                context.copy(target, source, size, stream)
        finally:
            context.end(stream)
        if self._came_back(plan) and (graph := context.capture(addresses, wait=False)):
            self._keep(plan, context.make_replay(graph, first_output, addresses, sizes))

    def bind(self, plan: Plan, addresses: Sequence[int], stream: int) -> Replay | None:
        """Runs once at the caller's addresses and captures that; None where nothing can be captured."""
        self.run_at(plan, addresses, None, stream)
        graph = self.context.capture(addresses, wait=True) if self._graph_limit else None
        return self.context.make_replay(graph, 0, (), ()) if graph else None

    def run_at(self, plan: Plan, addresses: Sequence[int], replay: Replay | None, stream: int) -> None:
        """Runs at the caller's addresses, by their graph where there is one."""
        if replay:
            replay((), stream)
            return
        self._set_shapes(plan)
        self.context.begin(stream)
        try:
            self.context.run(addresses, stream)
        finally:
            self.context.end(stream)

    def close(self) -> None:
        """Waits for the lane's work and frees everything."""
        if not self.closed:
            self.closed = True
            self.context.finish()
            self._graphs.clear()
            self._buffers.clear()
            self.context.close()

    def _set_shapes(self, plan: Plan) -> None:
        # Replays leave the context's shapes as they are, so they are known.
        if self._shaped != plan.inputs:
            self.output_shapes(plan.inputs)

    def _make_room(self, plan: Plan) -> None:
        if self._buffers and all(have >= need for have, need in zip(self._room, plan.sizes, strict=True)):
            return
        # The old buffers go back to an allocator that knows nothing of what other streams still do with them.
        self.context.finish()
        self._graphs.clear()
        old = self._room or [0] * len(plan.sizes)
        # By doubling, so that shapes that grow step by step do not drop the graphs at each step.
        room = [have if have >= need else max(need, 2 * have, 1) for have, need in zip(old, plan.sizes, strict=True)]
        self._buffers, self._room, self._addresses = [], [], ()
        buffers = [self._allocate(size) for size in room]
        self._buffers, self._room = buffers, room
        self._addresses = tuple(buffer.data_ptr() for buffer in buffers)

    def _came_back(self, plan: Plan) -> bool:
        if not self._graph_limit:
            return False
        if plan in self._sighted:
            self._sighted.move_to_end(plan)
            return True
        self._sighted[plan] = None
        if len(self._sighted) > _SIGHTINGS_KEPT:
            self._sighted.popitem(last=False)
        return False

    def _keep(self, plan: Plan, replay: Replay) -> None:
        self._graphs[plan] = replay
        if len(self._graphs) > self._graph_limit:
            dropped, _ = self._graphs.popitem(last=False)
            self._sighted.pop(dropped, None)


class Lanes:
    """All lanes of an engine: concurrent callers get different ones, up to a limit; beyond it they take turns.

    A lane keeps its optimization profile: a change would make TensorRT set its context up anew, under its graphs' feet.

    Args:
        open_lane: Makes one more for a profile.
        limit: How many there may be of each profile.
    """

    def __init__(self, open_lane: Callable[[int], Lane], limit: int) -> None:
        self._open_lane = open_lane
        self._limit = limit
        self._changed = threading.Condition()
        self._full: set[int] = set()
        self._opening: set[int] = set()
        self._closed = False
        # The first at once: an engine that gives no context should fail when it is loaded.
        self._lanes: dict[int, list[Lane]] = {0: [open_lane(0)]}

    def __len__(self) -> int:
        return len(self._all())

    @property
    def graphs(self) -> int:
        """How many graphs all lanes keep."""
        return sum(lane.graphs for lane in self._all())

    def acquire(self, stream: int, profile: int) -> Lane:
        """A lane for one call on a stream, locked; the caller releases `lock`.

        Of the profile's lanes the one that this stream used last; else, where one more may be opened, one without work
        or a new one; else of those that no call holds the one chosen longest ago. Calls on one stream follow each other
        on the GPU anyway, so they share a lane, whatever threads they come from.

        Raises:
            ConfigError: the engine was closed.
            ArtifactError: there is no memory for the first lane of a profile.
        """
        lane = self._choose(stream, profile) or self._open(stream, profile)
        lane.lock.acquire()
        if lane.closed:
            lane.lock.release()
            raise _closed()
        return lane

    def close(self) -> bool:
        """Waits for all calls and frees everything; further ones are refused.

        Returns:
            Whether all is freed. If not, a call still holds a lane, and what the lane runs on must be left alone.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # Not for ever, here and below: at the interpreter's exit a daemon thread may hold things for good.
            freed = self._changed.wait_for(lambda: not self._opening, timeout=_CLOSING_S)
        for lane in self._all():
            if lane.lock.acquire(timeout=_CLOSING_S):
                try:
                    lane.close()
                finally:
                    lane.lock.release()
            else:
                freed = False
        return freed

    def _all(self) -> list[Lane]:
        with self._changed:
            return [lane for lanes in self._lanes.values() for lane in lanes]

    def _choose(self, stream: int, profile: int) -> Lane | None:
        """A lane that is there; None: the caller has to open one."""
        with self._changed:
            while not self._closed:
                lanes = self._lanes.setdefault(profile, [])
                lane = next((lane for lane in lanes if lane.stream == stream), None)
                if lane is None and profile not in self._opening and self._may_open(profile, lanes):
                    lane = next((lane for lane in lanes if not lane.lock.locked() and lane.context.is_idle()), None)
                    if lane is None:
                        self._opening.add(profile)
                        return None
                if lane is None and lanes:
                    # Whether it has work left is not asked here: the driver's answer costs every caller its turn.
                    lane = next((lane for lane in lanes if not lane.lock.locked()), lanes[0])
                    lanes.remove(lane)
                    lanes.append(lane)
                if lane is not None:
                    lane.stream = stream
                    return lane
                self._changed.wait()  # another thread opens the profile's first
        raise _closed()

    def _may_open(self, profile: int, lanes: Sequence[Lane]) -> bool:
        return not lanes or (len(lanes) < self._limit and profile not in self._full)

    def _open(self, stream: int, profile: int) -> Lane:
        # Not under the lock: it can take seconds, and other streams' calls go on meanwhile.
        lane = None
        try:
            lane = self._open_lane(profile)
        except ArtifactError:
            with self._changed:  # a list whose lanes change places is empty for a moment
                if not self._lanes[profile]:
                    raise
        finally:
            with self._changed:
                self._opening.discard(profile)
                self._changed.notify_all()
                if lane is None:
                    self._full.add(profile)  # no memory, most likely: what there is must do
                elif self._closed:
                    lane.close()
                else:
                    lane.stream = stream
                    self._lanes[profile].append(lane)
        with self._changed:
            return lane or self._lanes[profile][0]


def replay_in_steps(context: Context, graph: Graph, inputs: int, inside: Sequence[int], sizes: Sequence[int]) -> Replay:
    """A replay that is made of the context's own steps; arguments are as of `Context.make_replay`."""
    into = list(zip(inside[:inputs], sizes[:inputs], strict=True))
    out_of = list(zip(inside[inputs:], sizes[inputs:], strict=True))

    def replay(outside: Sequence[int], stream: int) -> None:
        context.begin(stream)
        try:
            for (target, size), source in zip(into, outside, strict=False):
                context.copy(target, source, size, stream)
            graph.launch(stream)
            for (source, size), target in zip(out_of, outside[inputs:], strict=True):
                context.copy(target, source, size, stream)
        finally:
            context.end(stream)

    return replay


def _closed() -> ConfigError:
    return ConfigError("the engine was closed", fix="load it again")
