"""Runs an engine on the GPU of this process, on numpy arrays: for proofs, not for speed."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trtforge.runtime.child import ChildCrashError, Emit, OnEvent, run_child
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.suggest import nearest
from trtforge.runtime.tensors import group_samples, load_tensors, save_tensors
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.cuda import Cuda, DeviceBuffer
from trtforge.runtime.trt.load import OpenEngine, ProfileShapes, check_fit
from trtforge.runtime.trt.options import LoadOptions

__all__ = ["EngineRunner", "inspect_engine", "inspect_task", "run_engine", "run_task", "time_engine", "time_task"]

_ROUND = 20
_PROFILE_FIX = "choose sizes inside the profile, or build the engine with wider `dims`"


class EngineRunner:
    """One engine on the first visible GPU. A `Runner`; `close` it (or `contextlib.closing`) to free the GPU's memory.

    Not for several threads at once. Deserialising a plan can run code that is in it: load only engines whose origin and
    hash are known.

    Args:
        engine: The plan file.
        backend: "auto", "tensorrt" or "tensorrt-rtx": what built it.
        tf32: Whether it was built with TF32 allowed.
        version_compatible: Whether it was built to load on later releases.
        plugins: Libraries that it was built with.

    Raises:
        MissingDependencyError: the backend is not installed.
        ArtifactError: there is no GPU; the engine is corrupt, was built by another release, or is not for this GPU.
    """

    def __init__(
        self,
        engine: Path,
        backend: str = "auto",
        *,
        tf32: bool = False,
        version_compatible: bool = False,
        plugins: Sequence[Path] = (),
    ) -> None:
        found = find_backend(backend)
        check_fit(engine, found)
        options = LoadOptions(version_compatible=version_compatible, plugins=tuple(plugins))
        self._cuda = Cuda()
        self._buffers: dict[str, DeviceBuffer] = {}
        self._opened = OpenEngine(engine, found, tf32=tf32, options=options)
        self._log = self._opened.log
        # As `session` makes them: a proof is of the kernels that will run.
        self._config = (self._opened.eager_config(),) if found.name == "tensorrt-rtx" else ()
        self._context: Any = self._opened.engine.create_execution_context(*self._config)
        if self._context is None:
            refused = self._opened.refused("gives no execution context")
            self.close()  # whoever keeps the error keeps this object
            raise refused
        self._inputs, self._outputs = self._opened.inputs, self._opened.outputs
        self._profile = 0
        self._inputs_in_use: dict[str, Array] = {}  # copies read them until the stream is waited for

    @property
    def name(self) -> str:
        """`"tensorrt"` or `"tensorrt-rtx"`."""
        return self._opened.backend.name

    @property
    def version(self) -> str:
        """The version of the backend."""
        return self._opened.backend.version

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the engine's order; engines forget the names of dimensions, so they are called `name[axis]`."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the engine's order; see `inputs`."""
        return self._outputs

    @property
    def profiles(self) -> tuple[ProfileShapes, ...]:
        """For each optimization profile the min, opt and max shape by input name."""
        return self._opened.profiles

    def run(self, feeds: Tensors, *, profile: int | None = None) -> dict[str, Array]:
        """Outputs by name for one set of inputs; waits for the GPU.

        Args:
            feeds: Arrays by input name.
            profile: The optimization profile to run in; None: the one in use, or else the first that holds the shapes.

        Raises:
            ConfigError: an input is missing, unknown, of another dtype, or outside the profiles.
            ArtifactError: the GPU failed while it ran.
        """
        results = self._bind(feeds, profile)
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._opened.refused("failed while it ran")
        for name, result in results.items():
            self._cuda.copy_out(result, self._buffers[name])
        # What was bound is read and written until here.
        self._cuda.synchronize()
        return results

    def time(self, feeds: Tensors, *, seconds: float = 1.0) -> float:
        """Milliseconds of one execution, the median over rounds of 20 that are enqueued back to back; no copies.

        Args:
            feeds: Arrays by input name, copied to the GPU once.
            seconds: How long to measure; a fifth of it is spent before, on warming up.
        """
        self._bind(feeds, None)
        self._cuda.synchronize()
        found: list[float] = []
        start = time.perf_counter()
        while time.perf_counter() - start < 1.2 * seconds or len(found) < 3:
            before = time.perf_counter()
            for _ in range(_ROUND):
                if not self._context.execute_async_v3(self._cuda.stream):
                    raise self._opened.refused("failed while it ran")
            self._cuda.synchronize()
            after = time.perf_counter()
            if after - start > 0.2 * seconds:
                found.append((after - before) / _ROUND)
        return 1e3 * statistics.median(found)

    def _bind(self, feeds: Tensors, profile: int | None) -> dict[str, Array]:
        """Copies inputs to the GPU and gives every tensor its memory; returns arrays for the outputs."""
        arrays = self._check_feeds(feeds)
        self._inputs_in_use = arrays
        self._cuda.make_current()
        self._log.errors.clear()
        self._select_profile(arrays, profile)
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, array.shape):
                raise ConfigError(
                    f"the engine refuses shape {list(array.shape)} for input {name!r}",
                    why="; ".join(self._log.errors[-3:]),
                    fix=_PROFILE_FIX,
                )
            if name in self._opened.host_inputs:
                if not self._context.set_tensor_address(name, array.ctypes.data):
                    raise self._opened.refused(f"refuses the values of {name!r}")
                continue
            buffer = self._buffer(name, array.nbytes)
            self._cuda.copy_in(buffer, array)
        if missing := self._context.infer_shapes():
            raise ConfigError(
                f"the engine cannot infer its shapes from these inputs; missing: {', '.join(missing)}",
                why="; ".join(self._log.errors[-3:]),
                fix=_PROFILE_FIX,
            )
        return {spec.name: self._make_output(spec) for spec in self._outputs}

    def layers(self) -> Any:
        """What TensorRT made of the network: the engine inspector's JSON, with `Layers` and the tensors in and out."""
        inspector = self._opened.engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._opened.trt.LayerInformationFormat.JSON)
        return json.loads(text)

    def close(self) -> None:
        """Frees the engine and its memory; the runner is of no use afterwards."""
        self._cuda.make_current()
        self._context, self._config = None, ()
        self._opened.close()
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._cuda.close()

    def _check_feeds(self, feeds: Tensors) -> dict[str, Array]:
        names = [spec.name for spec in self._inputs]
        for name in feeds:
            if name not in names:
                raise ConfigError(f"the engine has no input {name!r}", fix=nearest(name, names))
        arrays = {}
        for spec in self._inputs:
            if spec.name not in feeds:
                raise ConfigError(f"input {spec.name!r} is missing", fix=f"give all of {', '.join(names)}")
            array = np.asarray(feeds[spec.name], order="C")
            array = array.astype(array.dtype.newbyteorder("="), copy=False)
            if array.dtype.name != spec.dtype:
                raise ConfigError(
                    f"input {spec.name!r} is {array.dtype.name}, and the engine takes {spec.dtype}",
                    fix=f"convert it with .astype({spec.dtype!r})",
                )
            arrays[spec.name] = array
        return arrays

    def _select_profile(self, arrays: Mapping[str, Array], asked: int | None) -> None:
        profiles = self.profiles
        host = self._opened.host_inputs
        asked_for = {name: _extent(array, by_value=name in host) for name, array in arrays.items()}
        allowed = range(len(profiles)) if asked is None else (asked,)
        fitting = [number for number in allowed if number < len(profiles) and _holds(profiles[number], asked_for)]
        if not fitting:
            given = ", ".join(f"{name} {list(extent)}" for name, extent in asked_for.items())
            ranges = "; ".join(
                f"profile {number}: "
                + ", ".join(f"{name} {list(least)} to {list(most)}" for name, (least, _, most) in profile.items())
                for number, profile in enumerate(profiles)
            )
            which = "no profile of the engine" if asked is None else f"profile {asked} of the engine does not"
            raise ConfigError(f"{which} hold{'s' * (asked is None)} {given}", why=ranges, fix=_PROFILE_FIX)
        # The one in use first: a change of profile makes TensorRT set the context up anew.
        chosen = self._profile if self._profile in fitting else fitting[0]
        if chosen != self._profile:
            if not self._context.set_optimization_profile_async(chosen, self._cuda.stream):
                raise self._opened.refused(f"cannot switch to profile {chosen}")
            self._cuda.synchronize()
            self._profile = chosen

    def _make_output(self, spec: TensorSpec) -> Array:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if any(size < 0 for size in shape):
            raise ArtifactError(
                f"the shape {list(shape)} of output {spec.name!r} depends on values",
                fix="return a tensor of a size that the inputs' shapes decide, with a mask or a count beside it",
            )
        result: Array = np.empty(shape, _numpy_dtype(spec.dtype))
        self._buffer(spec.name, result.nbytes)
        return result

    def _buffer(self, name: str, size_bytes: int) -> DeviceBuffer:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size_bytes < size_bytes:
            if buffer is not None:
                self._cuda.synchronize()
                buffer.free()
            buffer = self._buffers[name] = self._cuda.allocate(size_bytes)
        if not self._context.set_tensor_address(name, buffer.address):
            raise self._opened.refused(f"refuses the memory of {name!r}")
        return buffer


def run_engine(
    engine: Path,
    backend: str,
    feeds: Path,
    outputs: Path,
    on_event: OnEvent | None = None,
    *,
    profiles: Mapping[str, int] | None = None,
    tf32: bool = False,
    version_compatible: bool = False,
    plugins: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs every sample of a file in a child process, since a broken engine can end the process.

    Args:
        engine: The plan file.
        backend: "auto", "tensorrt" or "tensorrt-rtx".
        feeds: Safetensors with keys `<sample>/<input>`; a sample's own name has no slash.
        outputs: Written by the child: safetensors with keys `<sample>/<output>`.
        on_event: Receives `{"event": "progress", "phase": "engine", "done", "total"}` after each sample.
        profiles: The optimization profile of samples, by sample; the others run in any that holds them.
        tf32: Whether the engine was built with TF32 allowed.
        version_compatible: Whether it was built to load on later releases.
        plugins: Libraries that it was built with.

    Returns:
        `{"runner", "version", "device", "samples", "load_seconds", "seconds", "inputs", "outputs"}`; seconds of running
        alone, copies included.

    Raises:
        TrtForgeError: as `EngineRunner` raises.
        ArtifactError: also where the engine ended the child natively.
    """
    args = {
        "feeds": str(feeds),
        "outputs": str(outputs),
        "profiles": dict(profiles or {}),
        **_opening(engine, backend, tf32, version_compatible, plugins),
    }
    return _in_child("trt.run", args, engine, on_event)


def time_engine(
    engine: Path,
    backend: str,
    feeds: Path,
    *,
    tf32: bool = False,
    version_compatible: bool = False,
    plugins: Sequence[Path] = (),
) -> float:
    """Milliseconds of one execution on the first sample named "opt" (or the first), in a child process.

    Arguments are as of `run_engine`.

    Raises:
        TrtForgeError: as `EngineRunner` raises.
        ArtifactError: also where the engine ended the child natively.
    """
    args = {"feeds": str(feeds), **_opening(engine, backend, tf32, version_compatible, plugins)}
    return float(_in_child("trt.time", args, engine, None)["milliseconds"])


def inspect_engine(
    engine: Path,
    backend: str,
    *,
    tf32: bool = False,
    version_compatible: bool = False,
    plugins: Sequence[Path] = (),
) -> dict[str, Any]:
    """`{"inputs", "outputs", "profiles", "layers"}` of an engine, read in a child process; it takes the engine's GPU.

    Arguments are as of `run_engine`.

    Raises:
        TrtForgeError: as `EngineRunner` raises.
    """
    return _in_child("trt.inspect", _opening(engine, backend, tf32, version_compatible, plugins), engine, None)


def run_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's end of `run_engine`: same arguments, JSON-able."""
    tensors, _ = load_tensors(Path(args["feeds"]))
    samples = group_samples(tensors)
    if not samples:
        raise ConfigError(f"{args['feeds']} holds no tensors", fix="record at least one sample `<sample>/<input>`")
    started = time.perf_counter()
    runner = _open(args)
    with contextlib.closing(runner):
        loaded = time.perf_counter()
        results: dict[str, Array] = {}
        seconds = 0.0
        for done, (sample, feeds) in enumerate(samples.items(), 1):
            start = time.perf_counter()
            produced = runner.run(feeds, profile=args["profiles"].get(sample))
            seconds += time.perf_counter() - start
            results.update({f"{sample}/{name}": array for name, array in produced.items()})
            emit("progress", phase="engine", done=done, total=len(samples))
        save_tensors(Path(args["outputs"]), results, {"runner": runner.name, "version": runner.version})
        device = device_facts()
        return {
            "runner": runner.name,
            "version": runner.version,
            "device": device.name if device else "",
            "samples": len(samples),
            "load_seconds": loaded - started,
            "seconds": seconds,
            "inputs": [spec.to_json() for spec in runner.inputs],
            "outputs": [spec.to_json() for spec in runner.outputs],
        }


def time_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's end of `time_engine`: same arguments, JSON-able."""
    samples = group_samples(load_tensors(Path(args["feeds"]))[0])
    chosen = next((name for name in samples if name.rpartition(".")[2] == "opt"), next(iter(samples)))
    with contextlib.closing(_open(args)) as runner:
        kinds = {spec.name: spec.dtype for spec in runner.inputs}
        feeds = {name: array.astype(_numpy_dtype(kinds[name])) for name, array in samples[chosen].items()}
        return {"milliseconds": runner.time(feeds), "sample": chosen}


def inspect_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's end of `inspect_engine`."""
    with contextlib.closing(_open(args)) as runner:
        return {
            "inputs": [spec.to_json() for spec in runner.inputs],
            "outputs": [spec.to_json() for spec in runner.outputs],
            "profiles": [dict(profile) for profile in runner.profiles],
            "layers": runner.layers(),
        }


def _opening(
    engine: Path, backend: str, tf32: bool, version_compatible: bool, plugins: Sequence[Path]
) -> dict[str, Any]:
    return {
        "engine": str(engine),
        "backend": backend,
        "tf32": tf32,
        "version_compatible": version_compatible,
        "plugins": [str(path.absolute()) for path in plugins],
    }


def _open(args: Mapping[str, Any]) -> EngineRunner:
    return EngineRunner(
        Path(args["engine"]),
        args["backend"],
        tf32=args["tf32"],
        version_compatible=args["version_compatible"],
        plugins=[Path(path) for path in args["plugins"]],
    )


def _in_child(task: str, args: Mapping[str, Any], engine: Path, on_event: OnEvent | None) -> dict[str, Any]:
    try:
        return run_child(task, args, on_event=on_event)
    except ChildCrashError as error:
        if not error.signal:  # a Python traceback: our own bug
            raise
        if error.signal == "SIGKILL":
            raise ArtifactError(
                f"the process that ran the engine {engine} was killed (SIGKILL)",
                why="most often memory ran out",
                fix="free memory, or use a larger machine",
            ) from error
        raise ArtifactError(
            f"the engine {engine} ended its process natively ({error.signal})",
            why=error.why,
            fix="build the engine again on this machine, with this release",
        ) from error


def _extent(array: Array, *, by_value: bool) -> tuple[int, ...]:
    """What a profile's range is compared with: the shape, or the values where they decide shapes."""
    return tuple(array.reshape(-1).tolist()) if by_value else array.shape


def _holds(profile: Mapping[str, tuple[tuple[int, ...], ...]], extents: Mapping[str, tuple[int, ...]]) -> bool:
    for name, extent in extents.items():
        least, _, most = profile[name]
        if len(least) != len(extent):
            return False
        if not all(low <= size <= high for low, size, high in zip(least, extent, most, strict=True)):
            return False
    return True


def _numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if name in ("bfloat16", "float8_e4m3fn") else name)
