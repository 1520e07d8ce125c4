"""Which TensorRT is there, and everything in which the supported ones differ: one table."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from trtforge.runtime.errors import ConfigError, MissingDependencyError
from trtforge.runtime.suggest import nearest

__all__ = ["BACKENDS", "Backend", "Capabilities", "capabilities_of", "find_backend", "import_backend", "pip_line"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one release of one TensorRT takes and does.

    Attributes:
        needs_gpu_to_build: Building ahead of time, on a machine without a GPU, is impossible.
        explicit_batch_flag: `NetworkDefinitionCreationFlag` still has EXPLICIT_BATCH (ignored there since 10.0).
        strongly_typed_flag: STRONGLY_TYPED must be asked for; where it is the only kind the bit is still accepted.
        targets: Compute capabilities that an engine can be built for ahead of time; empty: only the GPU at hand.
        min_device: The lowest compute capability that engines run on.
        refused_devices: Compute capabilities above it that the runtime nevertheless refuses.
        max_opset: The highest ONNX opset that is taken well (23: the operator `Attention` is fused).
        bf16: bfloat16 tensors and layers.
        int8_matmul, int8_conv, fp8: Explicit Q/DQ around these builds.
        half_quantized_products: Quantized products with float16 scales and output are right. TensorRT-RTX 1.6 on an
            H100 gives NaN for them (FP8 and INT8 MatMul, FP8 Conv), and the right numbers with float32 ones.
        doomed_operators: ONNX operators that `supports_operator` approves and that then fail to parse or build.
        rewritten_operators: ONNX operators that its parser lacks (of the Scatter ones: a reduction), and that the
            converter expresses through others.
        plugins: Plugins can be registered.
        timing_cache: A timing cache changes build time; a compiler without tactic timing has no use for one.
        version_compatible: VERSION_COMPATIBLE engines load on later releases.
        hardware_compatibility: Families of GPUs, rather than this model, that an engine can be built for.
        weight_streaming: WEIGHT_STREAMING is taken at build.
        refit: REFIT and STRIP_PLAN are taken at build.
        tiling: `tiling_optimization_level` is there.
    """

    needs_gpu_to_build: bool
    explicit_batch_flag: bool
    strongly_typed_flag: bool
    targets: tuple[str, ...]
    min_device: str
    refused_devices: frozenset[str]
    max_opset: int
    bf16: bool
    int8_matmul: bool
    int8_conv: bool
    fp8: bool
    half_quantized_products: bool
    doomed_operators: frozenset[str]
    rewritten_operators: frozenset[str]
    plugins: bool
    timing_cache: bool
    version_compatible: bool
    hardware_compatibility: tuple[str, ...]
    weight_streaming: bool
    refit: bool
    tiling: bool

    def runs_on(self, compute_capability: str) -> bool:
        """Whether engines are known not to be refused on a GPU of this compute capability ("8.9")."""
        if compute_capability in self.refused_devices:
            return False
        return _numbers(compute_capability) >= _numbers(self.min_device)


@dataclass(frozen=True, slots=True)
class Backend:
    """One installed TensorRT: `name` is "tensorrt" or "tensorrt-rtx", `module` what Python imports."""

    name: str
    module: str
    version: str
    capabilities: Capabilities

    def __str__(self) -> str:
        return f"{_TITLES[self.name]} {self.version}"


BACKENDS = ("tensorrt", "tensorrt-rtx")
"""In the order in which `auto` prefers them."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_PIP = {
    "tensorrt": "pip install 'trtforge[tensorrt]' --extra-index-url https://pypi.nvidia.com",
    "tensorrt-rtx": "pip install 'trtforge[rtx]'",
}
# The metapackage first; what NVIDIA's containers and system packages install may lack it.
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12"),
}

_REWRITTEN = frozenset({"DFT", "Col2Im", "ScatterElements", "ScatterND"})
"""No parser of these releases has them."""

_RTX_1_5 = Capabilities(
    needs_gpu_to_build=False,
    explicit_batch_flag=False,
    strongly_typed_flag=True,
    targets=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    min_device="7.5",
    refused_devices=frozenset(),
    max_opset=23,
    bf16=True,
    int8_matmul=True,
    int8_conv=False,
    fp8=True,
    half_quantized_products=False,
    # RTX has no plugin for NonZero, and no kernel for NonMaxSuppression.
    doomed_operators=frozenset({"NonZero", "NonMaxSuppression"}),
    rewritten_operators=_REWRITTEN,
    plugins=False,
    timing_cache=False,
    version_compatible=False,
    hardware_compatibility=(),  # the builder keeps NONE, whatever is set
    weight_streaming=True,
    refit=False,
    tiling=True,
)
_RTX_1_7 = replace(_RTX_1_5, int8_conv=True, refused_devices=frozenset({"9.0"}))
# Fused attention came to the full TensorRT with IAttention, in 10.14.
_TRT_10_8 = Capabilities(
    needs_gpu_to_build=True,
    explicit_batch_flag=True,
    strongly_typed_flag=True,
    targets=(),
    min_device="7.5",
    refused_devices=frozenset(),
    max_opset=20,
    bf16=True,
    int8_matmul=True,
    int8_conv=True,
    fp8=True,
    half_quantized_products=True,
    doomed_operators=frozenset(),
    rewritten_operators=_REWRITTEN,
    plugins=True,
    timing_cache=True,
    version_compatible=True,
    hardware_compatibility=("ampere_plus",),
    weight_streaming=True,
    refit=True,
    tiling=True,
)
# SAME_COMPUTE_CAPABILITY is younger than 10.8; which release brought it is not established.
_TRT_10_14 = replace(_TRT_10_8, max_opset=23, hardware_compatibility=("ampere_plus", "same_compute_capability"))
# 11.0 knows strongly typed networks only; the bit that asks for them is still accepted.
_TRT_11 = replace(_TRT_10_14, explicit_batch_flag=False, strongly_typed_flag=False)

_TABLE: dict[str, tuple[tuple[str, Capabilities], ...]] = {
    "tensorrt": (("10.8", _TRT_10_8), ("10.14", _TRT_10_14), ("11.0", _TRT_11)),
    "tensorrt-rtx": (("1.5", _RTX_1_5), ("1.7", _RTX_1_7)),
}
"""From which version on each row holds; a release newer than the last row is taken for the last row."""


def capabilities_of(name: str, version: str) -> Capabilities:
    """The row of the table for a backend and version, whether or not it is installed here.

    Raises:
        MissingDependencyError: the version is older than the oldest supported one.
    """
    found = None
    for since, row in _TABLE[name]:
        if _numbers(version) >= _numbers(since):
            found = row
    if found is None:
        raise MissingDependencyError(
            f"{_TITLES[name]} {version} is installed; the oldest that works is {_TABLE[name][0][0]}",
            why="older ones lack strongly typed networks or parts of the builder's interface",
            fix=_PIP[name].replace("pip install", "pip install --upgrade"),
        )
    return found


def find_backend(name: str = "auto") -> Backend:
    """The installed TensorRT, found without importing it.

    Args:
        name: "tensorrt", "tensorrt-rtx", or "auto": the full `tensorrt` where it is installed, else `tensorrt-rtx`.

    Raises:
        ConfigError: another name.
        MissingDependencyError: it is not installed, or too old.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"backend {name!r} is unknown", fix=nearest(name, ("auto", *BACKENDS)))
    for candidate in BACKENDS if name == "auto" else (name,):
        version = _installed_version(candidate)
        if version is not None:
            return Backend(candidate, _MODULES[candidate], version, capabilities_of(candidate, version))
    if name == "auto":
        raise MissingDependencyError(
            "no TensorRT is installed", fix=f"{_PIP['tensorrt-rtx']}   or   {_PIP['tensorrt']}"
        )
    raise MissingDependencyError(f"{_TITLES[name]} is not installed", fix=_PIP[name])


def pip_line(name: str) -> str:
    """The command that installs a backend."""
    return _PIP[name]


def import_backend(backend: Backend) -> ModuleType:
    """The Python module itself; called in child processes, and where engines run.

    Raises:
        MissingDependencyError: it is installed but does not load (a library of CUDA or of its own is missing).
    """
    try:
        return importlib.import_module(backend.module)
    except (ImportError, OSError) as error:  # ctypes raises OSError for a missing shared library
        raise MissingDependencyError(
            f"{backend} is installed but does not load: {error}",
            fix=_PIP[backend.name].replace("pip install", "pip install --force-reinstall"),
        ) from error


def _installed_version(name: str) -> str | None:
    spec = importlib.util.find_spec(_MODULES[name])
    # A mere folder `tensorrt/` in the user's repository is a namespace package, without an origin.
    if spec is None or spec.origin is None:
        return None
    for distribution in _DISTRIBUTIONS[name]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    written = re.search(r'__version__ = "([\d.]+)', Path(spec.origin).read_text(encoding="utf-8"))
    return written.group(1) if written else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
