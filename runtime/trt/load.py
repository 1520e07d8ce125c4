"""From a plan file to a live engine: refused before a byte of it is deserialised where it cannot fit this machine."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from trtforge.runtime.device import DeviceFacts, device_facts
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.backend import Backend, import_backend
from trtforge.runtime.trt.dtypes import dtype_name
from trtforge.runtime.trt.header import read_rtx_header
from trtforge.runtime.trt.messages import BuildLog, make_logger
from trtforge.runtime.trt.options import DEFAULT_LOAD, HardwareCompatibility, LoadOptions
from trtforge.runtime.trt.plugins import load_plugins
from trtforge.runtime.trt.tf32 import Tf32Hold

__all__ = ["OpenEngine", "ProfileShapes", "check_fit", "loads_version"]

ProfileShapes = Mapping[str, tuple[tuple[int, ...], ...]]
"""The min, opt and max shape of each input in one optimization profile."""


class OpenEngine:
    """A deserialised engine and what it says of itself. A CUDA context must be current in the calling thread.

    Deserialising a plan can run code that is in it: load only engines whose origin and hash are known.

    Args:
        path: The plan file; `check_fit` it first.
        backend: What built it.
        tf32: Whether it was built with TF32 allowed.
        options: How it was built, and how much of its weights may stay on the GPU.

    Attributes:
        trt: TensorRT's Python module.
        log: What its logger said; one for the whole process.
        engine: The `ICudaEngine`; None after `close`.
        inputs: In the engine's order; engines forget the names of dimensions, so they are called `name[axis]`.
        outputs: In the engine's order.
        profiles: For each optimization profile the shapes by input name; of an input in `host_inputs` the values.
        host_inputs: The inputs whose values decide shapes: they stay in the host's memory.

    Raises:
        MissingDependencyError: the backend does not load.
        ArtifactError: the plan cannot be read or deserialised, an output of it lives on the host, or an engine of the
            other kind of TF32 lives in this process.
        BuildError: a plugin library does not load.
        ConfigError: a budget for weights that were not built to stream.
    """

    def __init__(self, path: Path, backend: Backend, *, tf32: bool, options: LoadOptions = DEFAULT_LOAD) -> None:
        self.path = path
        self.backend = backend
        self.trt = import_backend(backend)
        self.log, logger = _runtime_logger(self.trt)
        self.log.errors.clear()
        self.engine: Any = None
        self._runtime: Any = None
        self._tf32 = Tf32Hold(tf32)
        try:
            self._open(logger, options)
        except BaseException:
            self.close()  # whoever keeps the error keeps this object
            raise

    def _open(self, logger: Any, options: LoadOptions) -> None:
        load_plugins(self.trt, logger, options.plugins)
        # The runtime stays referenced as long as the engine lives: TensorRT does not see to it.
        try:
            self._runtime = self.trt.Runtime(logger)
        except TypeError as error:  # the bindings' word for a null pointer
            raise self.refused("finds no runtime") from error
        if options.version_compatible:
            # The plan brings a lean runtime, which is code: the artifact's hashes vouch for it.
            self._runtime.engine_host_code_allowed = True
        self.engine = self._runtime.deserialize_cuda_engine(_read(self.path))
        if self.engine is None:
            raise self.refused("does not load")
        if options.weight_budget_mib is not None:
            self._limit_weights(options.weight_budget_mib << 20)
        self.host_inputs: frozenset[str] = frozenset()
        self.inputs, self.outputs = self._describe()
        self.profiles: tuple[ProfileShapes, ...] = tuple(
            {spec.name: tuple(self._range(spec, number)) for spec in self.inputs}
            for number in range(self.engine.num_optimization_profiles)
        )

    def eager_config(self) -> Any:
        """An `IRuntimeConfig` of TensorRT-RTX: the first call with new shapes waits for the kernels made for them.

        Else calls begin with general kernels, and a thread puts others in their place at any time later: those in a
        captured graph would be the slow ones, and what a proof has seen is not what runs afterwards. Where shapes are
        fixed it makes no difference.
        """
        config = self.engine.create_runtime_config()
        strategies = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config

    def close(self) -> None:
        """Drops the engine, then the runtime; its contexts must be gone."""
        self.engine = None
        self._runtime = None
        self._tf32.release()

    def refused(self, what: str) -> ArtifactError:
        """An error that says `what` the engine did, and why according to TensorRT's log."""
        return ArtifactError(
            f"the engine {self.path} {what} with {self.backend}",
            why="; ".join(self.log.errors[-5:]),
            fix="build the engine again on this machine, with this release",
        )

    def _limit_weights(self, budget_bytes: int) -> None:
        """Before any context is made: TensorRT refuses a budget afterwards."""
        streamable = self.engine.streamable_weights_size
        if not streamable:
            raise ConfigError(
                f"{self.path} has no weights to stream, and a budget of {budget_bytes >> 20} MiB is asked for",
                why="it was built without weight streaming",
                fix="load it without weight_budget_mib, or build it with target: {weight_streaming: true}",
            )
        try:
            self.engine.weight_streaming_budget_v2 = min(budget_bytes, streamable)
        except RuntimeError as error:
            raise self.refused(f"takes no weight budget of {budget_bytes} bytes") from error

    def _describe(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for number in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(number)
            is_input = self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT
            if self.engine.get_tensor_location(name) != self.trt.TensorLocation.DEVICE:
                if not is_input:
                    raise ArtifactError(
                        f"the output {name!r} of {self.path} lives on the host: it is a shape",
                        fix="leave it out of the model's outputs, and build again",
                    )
                self.host_inputs |= {name}
            shape = tuple(
                size if size >= 0 else f"{name}[{axis}]" for axis, size in enumerate(self.engine.get_tensor_shape(name))
            )
            spec = TensorSpec(name, dtype_name(self.engine.get_tensor_dtype(name)), shape)
            (inputs if is_input else outputs).append(spec)
        return tuple(inputs), tuple(outputs)

    def _range(self, spec: TensorSpec, profile: int) -> list[tuple[int, ...]]:
        if spec.name in self.host_inputs:
            # Number first, then name: the other way round than its neighbour below, and than its own signature says.
            return [tuple(ends) for ends in self.engine.get_tensor_profile_values(profile, spec.name)]
        fixed = tuple(size for size in spec.shape if isinstance(size, int))
        if len(fixed) == len(spec.shape):  # profiles leave inputs of fixed shape out
            return [fixed] * 3
        return [tuple(shape) for shape in self.engine.get_tensor_profile_shape(spec.name, profile)]


def check_fit(
    engine: Path,
    backend: Backend,
    *,
    version: str | None = None,
    device: Mapping[str, Any] | None = None,
    options: LoadOptions = DEFAULT_LOAD,
) -> DeviceFacts:
    """Compares a plan file with this machine, without TensorRT.

    Args:
        engine: The plan file.
        backend: What is installed here.
        version: The release that built it, where that is known.
        device: `{"name", "compute_capability", "sm_count"}` of the GPU it was built on, where that is known. A plan of
            full TensorRT is tied to that model, unless it was built for a family; one of TensorRT-RTX compiles itself
            for the GPU at hand.
        options: How it was built.

    Returns:
        The GPU here.

    Raises:
        ArtifactError: corrupt, built by another release, for another GPU, or there is no GPU that it can run on.
    """
    rebuild = "build the engine again with this release, or install the one that built it"
    if backend.name == "tensorrt-rtx":
        header = read_rtx_header(engine)
        version = header.version
    if version is not None and not loads_version(version, backend.version, compatible=options.version_compatible):
        title = str(backend).removesuffix(f" {backend.version}")
        newer = f"{title} loads a version-compatible engine on the release that built it and later ones of its major"
        raise ArtifactError(
            f"the engine {engine} was built by {title} {version}, and {backend.version} is installed",
            why=newer if options.version_compatible else f"{title} loads only what the very same release built",
            fix=f"{rebuild}: pip install {backend.name}=={version}",
        )
    here = device_facts()
    if here is None:
        raise ArtifactError("an engine runs on a GPU alone, and there is none here", fix="run this on the target")
    if not backend.capabilities.runs_on(here.compute_capability):
        raise ArtifactError(
            f"{backend} does not run on {here.name} (compute capability {here.compute_capability})",
            fix="use another GPU or another release of the backend",
        )
    if backend.name == "tensorrt" and device:
        _check_device(engine, device, here, options.hardware_compatibility)
    return here


def loads_version(built: str, installed: str, *, compatible: bool) -> bool:
    """Whether an engine of the release `built` loads on `installed`.

    Args:
        built: The release that built it, as "10.14.1.48".
        installed: The one that is here.
        compatible: It was built version-compatible: later releases of its major load it, and 11 what 10 built ("Engine
            Portability" in NVIDIA's support matrix of 11.4.1).
    """
    if built == installed or not compatible:
        return built == installed
    was, here = (tuple(int(number) for number in re.findall(r"\d+", text)) for text in (built, installed))
    return was < here and (was[0] == here[0] or (was[0], here[0]) == (10, 11))


def _check_device(engine: Path, built_on: Mapping[str, Any], here: DeviceFacts, family: HardwareCompatibility) -> None:
    if family == "ampere_plus" and int(here.compute_capability.partition(".")[0]) >= 8:
        return
    if family == "same_compute_capability" and built_on.get("compute_capability") == here.compute_capability:
        return
    facts = {"name": here.name, "compute_capability": here.compute_capability, "sm_count": here.sm_count}
    differing = [name for name, value in facts.items() if name in built_on and built_on[name] != value]
    if differing:
        was = ", ".join(f"{name} {built_on[name]}" for name in differing)
        found = ", ".join(f"{name} {facts[name]}" for name in differing)
        raise ArtifactError(
            f"the engine {engine} was built on another GPU: {was}; here: {found}",
            why="a plan of TensorRT is tied to the GPU's model and its number of multiprocessors"
            if family == "none"
            else f"it was built with hardware_compatibility: {family}",
            fix="build the engine on this GPU, or use the tensorrt-rtx backend",
        )


@functools.cache
def _runtime_logger(trt: ModuleType) -> tuple[BuildLog, Any]:
    # TensorRT keeps the first logger of a process for good and ignores every later one.
    log = BuildLog(no_gpu=False, on_node=lambda _: None)
    return log, make_logger(trt, log)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read the engine {path}: {error.strerror}", fix="copy the artifact whole"
        ) from error
