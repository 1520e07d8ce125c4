"""ONNX file to engine. Parsing and building happen in a child process, since both can crash natively."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trtforge.runtime.child import ChildCrashError, Emit, OnEvent, run_child
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import ArtifactError, BuildError, ConfigError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt import failures
from trtforge.runtime.trt.backend import Backend, find_backend, import_backend
from trtforge.runtime.trt.header import read_rtx_header
from trtforge.runtime.trt.messages import BuildLog, make_logger
from trtforge.runtime.trt.network import NetworkSource, define_network
from trtforge.runtime.trt.onnx_scan import OnnxScan, scan_onnx
from trtforge.runtime.trt.options import DEFAULT_BUILD, BuildOptions, check_options, set_options
from trtforge.runtime.trt.parse import (
    NodeError,
    allow_decomposition,
    check_network,
    network_specs,
    node_errors,
)
from trtforge.runtime.trt.plugins import load_plugins
from trtforge.runtime.trt.profiles import Shapes, add_profiles
from trtforge.runtime.trt.tf32 import set_build_tf32
from trtforge.runtime.trt.timing_cache import keep_timings, use_timings

__all__ = ["BuildRequest", "BuiltEngine", "Shapes", "build_engine", "build_task"]

_EVENTS_PER_SECOND = 10


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One engine to build.

    Attributes:
        onnx: The ONNX file; its external data lie beside it.
        engine: Where the engine goes; replaced in one step, and only by a finished one.
        backend: "auto", "tensorrt" or "tensorrt-rtx".
        profiles: Optimization profiles: min, opt and max shape by input name; empty for a network of fixed shapes.
        values: For each profile the min, opt and max values by name of the inputs whose values decide shapes.
        tf32: Whether float32 matrix products may round their inputs to TF32 (10 bits of mantissa).
        compute_capabilities: Targets of an engine built ahead of time ("8.9"); empty: this GPU, or the backend's
            portable default without one.
        options: Switches of the builder.
        network: What defines the network in place of the ONNX file, which then only says what it has to equal.
    """

    onnx: Path
    engine: Path
    backend: str
    profiles: tuple[Mapping[str, Shapes], ...]
    tf32: bool
    compute_capabilities: tuple[str, ...] = ()
    options: BuildOptions = DEFAULT_BUILD
    values: tuple[Mapping[str, Shapes], ...] = ()
    network: NetworkSource | None = None


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine on disk, not yet proved.

    Attributes:
        path: The file.
        sha256: Of its bytes, in hex.
        size_bytes: Its length.
        backend: "tensorrt" or "tensorrt-rtx".
        version: Of the backend; the only one that is sure to load it.
        inputs, outputs: As the network sees them.
        compute_capabilities: What it runs on: targets, or this GPU.
        warnings: What the parser and builder complained of, without noise.
        seconds: "parse" and "build", inside the child; "total" with the child's start and the checks before it.
    """

    path: Path
    sha256: str
    size_bytes: int
    backend: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    compute_capabilities: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


def build_engine(request: BuildRequest, on_event: OnEvent | None = None) -> BuiltEngine:
    """Builds in a child process and waits for it.

    Args:
        request: What to build.
        on_event: Called with `{"event": "progress", "stage": "build", "phase", "done", "total"}` at most ten times a
            second; phases nest, and each counts its own steps.

    Raises:
        MissingDependencyError: the backend is not installed.
        ConfigError: a target or option that the backend does not have.
        BuildError: TensorRT could not parse or build it, would have built a broken engine, or crashed natively.
        ArtifactError: the engine cannot be written.
        KeyboardInterrupt: once the child has been stopped; nothing is left behind.
    """
    started = time.perf_counter()
    backend = find_backend(request.backend)
    targets = _targets(request, backend)
    scan = scan_onnx(request.onnx)
    partial = request.engine.with_name(f".{request.engine.name}.{os.getpid()}.partial")
    doing = ["starting"]

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "doing":
            doing[0] = event["what"]
        elif on_event is not None:
            on_event(event)

    args = {
        "onnx": str(request.onnx.absolute()),
        "engine": str(partial.absolute()),
        "backend": backend.name,
        "profiles": _to_json(request.profiles),
        "values": _to_json(request.values),
        "tf32": request.tf32,
        "targets": targets,
        "options": request.options.to_json(),
        "network": request.network and request.network.to_json(),
    }
    try:
        answer = run_child("trt.build", args, on_event=watch)
        if "failure" in answer:
            raise _failure(backend, request, answer["failure"], scan)
        capabilities = _built_for(backend, partial)
        _move(partial, request.engine)
    except ChildCrashError as error:
        if not error.signal:  # a Python traceback: our own bug
            raise
        raise failures.crashed(backend, request.onnx, doing[0], error, scan) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return BuiltEngine(
        path=request.engine,
        sha256=answer["sha256"],
        size_bytes=answer["size_bytes"],
        backend=backend.name,
        version=answer["version"],
        inputs=tuple(TensorSpec.from_json(spec) for spec in answer["inputs"]),
        outputs=tuple(TensorSpec.from_json(spec) for spec in answer["outputs"]),
        compute_capabilities=capabilities,
        warnings=tuple(answer["warnings"]),
        seconds={**answer["seconds"], "total": time.perf_counter() - started},
    )


def build_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's side of `build_engine`; imports neither torch nor onnx.

    Returns:
        The facts of `BuiltEngine`, or `{"failure": {"kind": "parse" | "build" | "inconsistent", …}}`.
    """
    set_build_tf32(args["tf32"])
    backend = find_backend(args["backend"])
    trt = import_backend(backend)
    log = BuildLog(no_gpu=device_facts() is None, on_node=lambda node: emit("doing", what=f"parsing the node {node}"))
    # All of these stay referenced to the end: TensorRT's objects do not keep each other alive (SIGSEGV).
    logger = make_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the bindings' word for a null pointer
        raise BuildError(
            f"{backend} does not start on this machine",
            why="; ".join(log.errors[-3:]),
            fix="check the GPU and its driver with nvidia-smi, or use another release of the backend",
        ) from error
    load_plugins(trt, logger, [Path(path) for path in args["options"]["plugins"]])
    network = builder.create_network(_creation_flags(trt, backend))
    started = time.perf_counter()
    parser, kept = None, None  # both live to the end: weights are read as late as the build
    if source := args.get("network"):
        emit("doing", what=f"defining the network {source['reference']}")
        kept = define_network(trt, network, NetworkSource.from_json(source))
    else:
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(args["onnx"]) or parser.num_errors:
            nodes = [error.to_json() for error in node_errors(parser)]
            return {"failure": {"kind": "parse", "nodes": nodes, "log": log.errors}}
    parse_seconds = time.perf_counter() - started
    values: Sequence[Mapping[str, Shapes]] = args.get("values", [])
    check_network(trt, network, backend, deciding=values[0] if values else ())
    allow_decomposition(trt, network)
    inputs, outputs = network_specs(network)
    config = _configure(trt, builder, args)
    timings = args["options"]["timing_cache"]
    warnings = use_timings(config, Path(timings)) if timings else []
    add_profiles(builder, config, inputs, args["profiles"], values)
    monitor = _make_monitor(trt, emit)
    config.progress_monitor = monitor
    emit("doing", what="building")
    started = time.perf_counter()
    # Returns None on failure, and never raises.
    plan = builder.build_serialized_network(network, config)
    build_seconds = time.perf_counter() - started
    del parser, kept
    if log.inconsistent:
        return {"failure": {"kind": "inconsistent", "ends": log.inconsistent}}
    if plan is None:
        return {"failure": {"kind": "build", "log": log.errors}}
    if timings:
        keep_timings(config, Path(timings))
    size, sha256 = _write(Path(args["engine"]), plan)
    return {
        "sha256": sha256,
        "size_bytes": size,
        "version": trt.__version__,
        "inputs": [spec.to_json() for spec in inputs],
        "outputs": [spec.to_json() for spec in outputs],
        "warnings": [*warnings, *log.warnings],
        "seconds": {"parse": parse_seconds, "build": build_seconds},
    }


def _to_json(profiles: Sequence[Mapping[str, Shapes]]) -> list[dict[str, list[list[int]]]]:
    return [{name: [list(end) for end in ends] for name, ends in profile.items()} for profile in profiles]


def _targets(request: BuildRequest, backend: Backend) -> list[str]:
    """What to set in the builder: names of compute capabilities, "CURRENT" for this GPU, or nothing at all."""
    known = backend.capabilities.targets
    check_options(request.options, backend)
    if unknown := [target for target in request.compute_capabilities if target not in known]:
        raise ConfigError(
            f"{backend} cannot build for compute capability {', '.join(unknown)}",
            why="" if known else "the full TensorRT builds for the GPU of this machine alone",
            fix=f"choose from {', '.join(known)}"
            if known
            else "leave compute_capabilities out and build on the target",
        )
    device = device_facts()
    if backend.capabilities.needs_gpu_to_build and device is None:
        raise BuildError(
            f"{backend} needs a GPU to build, and there is none here",
            fix="run `trtforge build` on the target, or use the backend tensorrt-rtx, which builds ahead of time",
        )
    if request.compute_capabilities:
        return list(request.compute_capabilities)
    here = known and device is not None and backend.capabilities.runs_on(device.compute_capability)
    return ["CURRENT"] if here else []


def _built_for(backend: Backend, engine: Path) -> tuple[str, ...]:
    device = device_facts()
    named = read_rtx_header(engine).compute_capabilities if backend.name == "tensorrt-rtx" else ()
    # Built for the GPU at hand, of a kind that the header has no bit for.
    return named or ((device.compute_capability,) if device is not None else ())


def _failure(backend: Backend, request: BuildRequest, failure: Mapping[str, Any], scan: OnnxScan) -> BuildError:
    onnx = request.onnx
    if request.network is not None:
        return failures.network_failed(backend, request.network.reference, failure)
    if failure["kind"] == "parse":
        nodes = [NodeError.from_json(node) for node in failure["nodes"]]
        return failures.parse_failed(backend, onnx, nodes, failure["log"], scan)
    if failure["kind"] == "inconsistent":
        return failures.inconsistent(backend, onnx, failure["ends"], scan)
    return failures.build_failed(backend, onnx, failure["log"], scan)


def _move(partial: Path, engine: Path) -> None:
    try:
        partial.replace(engine)
    except OSError as error:
        raise _unwritable(engine, error) from error


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"cannot write the engine {path}: {error.strerror}", fix="free space or give permission there, or use --output"
    )


def _creation_flags(trt: ModuleType, backend: Backend) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(kinds.STRONGLY_TYPED)
    if backend.capabilities.explicit_batch_flag and hasattr(kinds, "EXPLICIT_BATCH"):
        flags |= 1 << int(kinds.EXPLICIT_BATCH)
    return flags


def _configure(trt: ModuleType, builder: Any, args: Mapping[str, Any]) -> Any:
    config = builder.create_builder_config()
    # On by default: fp32 must switch it off, not merely leave it alone. RTX goes by `set_build_tf32` instead.
    (config.set_flag if args["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    # The engine inspector then names the ONNX nodes and types of each layer.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    set_options(trt, config, BuildOptions.from_json(args["options"]))
    targets: Sequence[str] = args["targets"]
    if targets:
        config.num_compute_capabilities = len(targets)
        for number, target in enumerate(targets):
            name = target if target == "CURRENT" else "SM" + target.replace(".", "")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
    return config


def _make_monitor(trt: ModuleType, emit: Emit) -> Any:
    report = _throttled(emit)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.totals.get(phase_name, step + 1)
            report(phase_name, min(step + 1, total), total)
            return True  # False would cancel; a parent that is interrupted stops this process instead

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()


def _throttled(emit: Emit) -> Callable[[str, int, int], None]:
    last = float("-inf")

    def report(phase: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 1 / _EVENTS_PER_SECOND:
            last = now
            emit("progress", stage="build", phase=phase, done=done, total=total)

    return report


def _write(path: Path, plan: Any) -> tuple[int, str]:
    view = memoryview(plan)
    try:
        path.write_bytes(view)
    except OSError as error:
        raise _unwritable(path, error) from error
    return view.nbytes, hashlib.sha256(view).hexdigest()
