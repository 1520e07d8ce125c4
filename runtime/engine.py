"""An engine as its users call it: torch tensors in, torch tensors out, on the GPU."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trtforge.runtime.bound import Bound
from trtforge.runtime.engine_device import byte_size, current_gpu_stream, lane_opener, no_memory
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.feeds import (
    aligned_addresses,
    arrange,
    check_output,
    check_tensor,
    choose_profile,
    fetch_tensor,
    torch_dtype,
)
from trtforge.runtime.lanes import Lane, Lanes, Plan, Session, Shape
from trtforge.runtime.layer_times import LayerTimes
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.torch_runner import from_torch

if TYPE_CHECKING:
    from typing_extensions import Self

    from trtforge.runtime.trt.options import LoadOptions

__all__ = ["Engine"]

_log = logging.getLogger("trtforge.engine")

_PLANS_KEPT = 1024


class Engine:
    """An engine, loaded on the first visible GPU and ready to be called.

        y = engine(x)                        # one output: the tensor
        out = engine(ids=ids, mask=mask)     # several outputs: a dict by name

    Tensors must be on the engine's device, contiguous and of the input's dtype; a wrong one is an error with the fix.
    The call is put on the caller's current CUDA stream, like a torch operation, and returns without waiting for the
    GPU. Outputs are tensors of their own, which no later call overwrites. Where any input is a numpy array, it is
    copied to the GPU, and the outputs are numpy arrays; anything else with DLPack is shared.

    Shapes choose their optimization profile by themselves. The first call with new shapes may compile; the second
    captures a CUDA graph, which all further calls with these shapes replay. Any number of threads may call. Calls on
    one stream follow each other; calls on several streams overlap, on up to `contexts` execution contexts a profile.

    While a graph is captured CUDA lets no thread wait for the whole device: `torch.cuda.synchronize()` fails then.
    Where threads run beside each other, wait for streams or events, or call each shape twice before the threads start.

    Args:
        path: The plan file.
        backend: "tensorrt" or "tensorrt-rtx": what built it.
        version: The release that built it.
        device: The GPU that it was built on, `{"name", "compute_capability", "sm_count"}`, where that is known.
        digest: The plan file's SHA-256 in hex, where the caller knows it.
        contexts: How many execution contexts each profile may have; each takes the engine's scratch memory.
        graphs: How many CUDA graphs each context keeps; 0 for none.
        tf32: Whether the engine was built with TF32 allowed. Engines with and without it cannot live in one process at
            a time: TensorRT has one switch for all.
        options: How it was built, and how much of its weights may stay on the GPU.

    Raises:
        MissingDependencyError: the backend is not installed.
        ArtifactError: the engine is corrupt, was built by another release, or is not for this GPU; or one of the other
            kind of TF32 is loaded.
    """

    def __init__(
        self,
        path: Path,
        *,
        backend: str,
        version: str,
        device: Mapping[str, Any] | None = None,
        digest: str = "",
        contexts: int = 4,
        graphs: int = 32,
        tf32: bool = False,
        options: LoadOptions | None = None,
    ) -> None:
        from trtforge.runtime.trt.options import LoadOptions
        from trtforge.runtime.trt.session import EngineSession

        options = options or LoadOptions()
        session = EngineSession(path, backend, version, device, digest, tf32=tf32, options=options)
        try:
            self._start(session, torch.device("cuda", 0), current_gpu_stream, contexts, graphs)
        except BaseException:
            session.close()  # whoever keeps the error keeps the session
            raise

    @classmethod
    def over(
        cls,
        session: Session,
        device: torch.device,
        current_stream: Callable[[], int],
        *,
        contexts: int = 4,
        graphs: int = 32,
    ) -> Engine:
        """An engine over any session.

        Args:
            session: What runs; closed with the engine.
            device: Where tensors have to be.
            current_stream: The handle of the stream that the calling thread's work goes to.
            contexts: As in the constructor.
            graphs: As in the constructor.
        """
        engine = cls.__new__(cls)
        engine._start(session, device, current_stream, contexts, graphs)
        return engine

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Runs the engine.

        Args:
            inputs: By position, in the order of `inputs`.
            named: By name.

        Returns:
            The output where there is one, else a dict by name.

        Raises:
            ConfigError: an input is missing, unknown, of a wrong dtype or shape, on another device, or not contiguous.
            ArtifactError: the GPU failed or has no memory left; the next call is not affected by the latter.
        """
        tensors, host = self._collect(inputs, named, copy=False)
        outputs = self._run(tensors)
        return self._named(self._to_host(outputs) if host else outputs)

    def run(self, feeds: Mapping[str, Any], *, copy: bool = False) -> dict[str, Any]:
        """Runs the engine on inputs by name.

        Args:
            feeds: Inputs by name, as the call takes them.
            copy: Copy what is on another device or not contiguous, and count that in `copies`. Dtypes never change.

        Returns:
            All outputs by name, also where there is one.

        Raises:
            TrtForgeError: as the call.
        """
        tensors, host = self._collect((), feeds, copy=copy)
        outputs = self._run(tensors)
        return dict(zip(self._output_names, self._to_host(outputs) if host else outputs, strict=True))

    def bind(self, *inputs: Any, out: Any = None, **named: Any) -> Bound:
        """A call without copies, on tensors that stay: fill the inputs in place, call the result, read the outputs.

            step = engine.bind(x, out=y)
            x.copy_(batch)
            step()                           # y holds the result, in the stream's order

        Runs once, so that `out` holds the results for what the inputs hold now.

        Args:
            inputs: As the call takes them; torch tensors on the device, at addresses that are multiples of 256 (what
                torch allocates is).
            out: The output, a sequence in order, or a dict by name; None: made here.
            named: Inputs by name; one called `out` has to be given by position.

        Raises:
            TrtForgeError: as the call; or a tensor in `out` does not fit.
        """
        tensors, host = self._collect(inputs, named, copy=False)
        if host:
            raise ConfigError(
                "numpy arrays cannot be bound", fix="give torch tensors on the GPU, which stay where they are"
            )
        if self._deciding:
            names = ", ".join(self._inputs[place].name for place in sorted(self._deciding))
            raise ConfigError(
                f"the engine cannot be bound: the values of {names} decide shapes",
                why="a bound call keeps its shapes",
                fix="call the engine; each set of values that comes back has a CUDA graph of its own",
            )
        stream = self._enter()
        shapes = tuple([tensor.shape for tensor in tensors])
        known = self._plans.get(shapes)
        lane = self._lanes.acquire(stream, known.profile if known else self._profile_for(shapes))
        try:
            plan = known or self._make_plan(lane, shapes)
            outputs = self._check_out(out, plan)
            addresses = aligned_addresses(
                (*self._inputs, *self._outputs), (*tensors, *outputs), self._session.alignment
            )
            replay = lane.bind(plan, addresses, stream)
        except torch.OutOfMemoryError as error:
            raise no_memory(self._device) from error
        finally:
            lane.lock.release()
        self._session.kernels_changed()
        return Bound(self._enter, lane, plan, replay, tensors, outputs, self._named(outputs))

    @contextlib.contextmanager
    def profile(self) -> Iterator[LayerTimes]:
        """Times the layers of all calls that this thread makes inside; these wait for the GPU and use no graph.

            with engine.profile() as p:
                engine(x)
            print(p)

        Raises:
            ArtifactError: there is no memory for another execution context.
        """
        self._enter()
        times = LayerTimes()
        lanes = Lanes(lane_opener(self._session, self._device, 0, times.add), 1)
        before, self._thread.lanes = self._thread.lanes, lanes
        try:
            yield times
        finally:
            self._thread.lanes = before
            lanes.close()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In order; engines forget the names of dimensions, so a dynamic one is called `name[axis]`."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In order; see `inputs`."""
        return self._outputs

    @property
    def profiles(self) -> tuple[Mapping[str, tuple[Shape, ...]], ...]:
        """For each optimization profile the min, opt and max shape by input name."""
        return self._session.profiles

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self._device

    @property
    def copies(self) -> int:
        """How many tensors were copied between devices or into order, for numpy or because `copy` was asked for."""
        return self._copies

    @property
    def contexts(self) -> int:
        """How many execution contexts there are."""
        return len(self._lanes)

    @property
    def graphs(self) -> int:
        """How many CUDA graphs are kept, those of `bind` apart."""
        return self._lanes.graphs

    def close(self) -> None:
        """Waits for what runs and frees the GPU's memory; further calls are refused. Happens by itself with the last
        reference, too.
        """
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, session: Session, device: torch.device, current_stream: Callable[[], int], contexts: int, graphs: int
    ) -> None:
        if contexts < 1 or graphs < 0:
            raise ConfigError(f"contexts={contexts}, graphs={graphs}", fix="give 1 or more contexts, 0 or more graphs")
        self._session = session
        self._device = device
        self._current_stream = current_stream
        self._inputs, self._outputs = session.inputs, session.outputs
        # The places of inputs whose values decide shapes: for planning, their values are their shapes.
        self._deciding = frozenset(i for i, spec in enumerate(session.inputs) if spec.name in session.host_inputs)
        self._output_names = [spec.name for spec in session.outputs]
        self._input_dtypes = [torch_dtype(spec.dtype) for spec in session.inputs]
        self._output_dtypes = [torch_dtype(spec.dtype) for spec in session.outputs]
        self._plans: dict[tuple[Shape, ...], Plan] = {}
        self._copies = 0
        self._changing = threading.Lock()
        self._thread = _Thread()
        self._lanes = Lanes(lane_opener(session, device, graphs), contexts)
        # Holds no reference to the engine; at exit, too, so that what was compiled is kept.
        self._finalizer = weakref.finalize(self, _close, self._lanes, session)

    def _collect(
        self, inputs: Sequence[Any], named: Mapping[str, Any], *, copy: bool
    ) -> tuple[list[torch.Tensor], bool]:
        if named or len(inputs) != len(self._inputs):
            inputs = arrange(self._inputs, inputs, named)
        host = False
        tensors = []
        for place, (value, spec, dtype) in enumerate(zip(inputs, self._inputs, self._input_dtypes, strict=True)):
            tensor = value
            device = _HOST if place in self._deciding else self._device
            if not isinstance(value, torch.Tensor):
                tensor, copied = fetch_tensor(value, device)
                host = host or (isinstance(value, np.ndarray) and device is not _HOST)
                self._count(copied and device is not _HOST)
            if check_tensor(tensor, spec, dtype, device, copy=copy):
                tensor = tensor.to(device).contiguous()
                self._count(1)
            tensors.append(tensor)
        return tensors, host

    def _run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        stream = self._enter()
        shapes = tuple([tensor.shape for tensor in tensors]) if not self._deciding else self._extents(tensors)
        known = self._plans.get(shapes)
        lanes = self._thread.lanes
        lane = (self._lanes if lanes is None else lanes).acquire(
            stream, known.profile if known else self._profile_for(shapes)
        )
        try:
            plan = known or self._make_plan(lane, shapes)
            outputs = self._make_outputs(plan)
            lane.call(
                plan, [tensor.data_ptr() for tensor in tensors], [tensor.data_ptr() for tensor in outputs], stream
            )
        except torch.OutOfMemoryError as error:
            raise no_memory(self._device) from error
        finally:
            lane.lock.release()
        if known is None:
            self._session.kernels_changed()
        return outputs

    def _enter(self) -> int:
        stream = self._current_stream()
        if not self._thread.entered:
            self._session.enter_thread()
            self._thread.entered = True
        return stream

    def _profile_for(self, shapes: tuple[Shape, ...]) -> int:
        return choose_profile(self._session.profiles, self._inputs, [tuple(shape) for shape in shapes])

    def _make_plan(self, lane: Lane, shapes: tuple[Shape, ...]) -> Plan:
        inputs = tuple(tuple(shape) for shape in shapes)
        outputs = lane.output_shapes(inputs)
        sizes = [
            0 if place in self._deciding else byte_size(shape, dtype)
            for place, (shape, dtype) in enumerate(zip(inputs, self._input_dtypes, strict=True))
        ]
        sizes += [byte_size(shape, dtype) for shape, dtype in zip(outputs, self._output_dtypes, strict=True)]
        with self._changing:
            plan = self._plans.setdefault(inputs, Plan(lane.profile, inputs, outputs, tuple(sizes)))
            if len(self._plans) > _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
        return plan

    def _extents(self, tensors: Sequence[torch.Tensor]) -> tuple[Shape, ...]:
        return tuple(
            tuple(tensor.flatten().tolist()) if place in self._deciding else tuple(tensor.shape)
            for place, tensor in enumerate(tensors)
        )

    def _make_outputs(self, plan: Plan) -> list[torch.Tensor]:
        return [
            torch.empty(shape, dtype=dtype, device=self._device)
            for shape, dtype in zip(plan.outputs, self._output_dtypes, strict=True)
        ]

    def _check_out(self, out: Any, plan: Plan) -> list[torch.Tensor]:
        if out is None:
            return self._make_outputs(plan)
        if isinstance(out, torch.Tensor):
            out = [out]
        given, named = ((), out) if isinstance(out, Mapping) else (out, {})
        tensors = arrange(self._outputs, given, named, kind="output")
        for tensor, spec, dtype, shape in zip(tensors, self._outputs, self._output_dtypes, plan.outputs, strict=True):
            check_output(tensor, spec, dtype, shape, self._device)
        return tensors

    def _named(self, outputs: Sequence[Any]) -> Any:
        return outputs[0] if len(outputs) == 1 else dict(zip(self._output_names, outputs, strict=True))

    def _to_host(self, outputs: Sequence[torch.Tensor]) -> list[Any]:
        self._count(len(outputs))
        return [from_torch(tensor) for tensor in outputs]

    def _count(self, copies: int) -> None:
        if copies:
            with self._changing:
                self._copies += copies


_HOST = torch.device("cpu")


class _Thread(threading.local):
    entered: bool = False
    lanes: Lanes | None = None


def _close(lanes: Lanes, session: Session) -> None:
    session.enter_thread()  # the garbage collector runs in any thread
    if lanes.close():
        session.close()
    else:  # to destroy an engine under a context that runs may end the process
        _log.warning("a call of an engine that was closed does not end: the engine's memory is not freed")
