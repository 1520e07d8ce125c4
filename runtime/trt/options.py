"""How an engine is built beyond its graph: options, which backend takes which, and the builder's switches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.trt.backend import Backend
from trtforge.runtime.trt.plugins import check_plugins

__all__ = [
    "DEFAULT_BUILD",
    "DEFAULT_LOAD",
    "BuildOptions",
    "HardwareCompatibility",
    "LoadOptions",
    "Tiling",
    "check_options",
    "set_options",
]

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
Tiling = Literal["none", "fast", "moderate", "full"]

_LEVELS = range(6)


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Switches of TensorRT's builder; the defaults leave each as it is.

    Attributes:
        optimization_level: 0 to 5; None: the backend's default.
        workspace_mib: Most scratch memory that a layer may take, MiB; None: all of the GPU's.
        tiling: How hard the builder looks for tilings that keep data in L2; None: the backend's default.
        timing_cache: A file that keeps measured timings between builds; made where it is not there yet.
        version_compatible: The engine loads on later releases, with a runtime of its own inside.
        hardware_compatibility: The family of GPUs that it loads on: "none" is the very model that built it.
        weight_streaming: Weights may stay in the host's memory, as far as a budget at load says.
        refit: Weights can be replaced in the engine.
        plugins: Libraries of native code with operators for TensorRT, loaded in this order.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    tiling: Tiling | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    weight_streaming: bool = False
    refit: bool = False
    plugins: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All attributes by name, paths as text."""
        cache, plugins = self.timing_cache, [str(path) for path in self.plugins]
        return {**asdict(self), "timing_cache": cache and str(cache), "plugins": plugins}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BuildOptions:
        """The inverse of `to_json`; what is left out, in a manifest of older days, has its default."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        cache = known.get("timing_cache")
        plugins = tuple(Path(path) for path in known.get("plugins", ()))
        return cls(**{**known, "timing_cache": cache and Path(cache), "plugins": plugins})


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What has to be known of an engine's build, or is wanted of it, as it is loaded.

    Attributes:
        version_compatible: It was built to load on later releases: its plan holds code that loading runs.
        hardware_compatibility: The family of GPUs that it was built for.
        weight_budget_mib: How much of its weights may stay on the GPU, MiB, where it was built with weight streaming;
            None: all of them.
        plugins: Libraries of native code that it was built with.
    """

    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    weight_budget_mib: int | None = None
    plugins: tuple[Path, ...] = ()


DEFAULT_BUILD = BuildOptions()
DEFAULT_LOAD = LoadOptions()


def check_options(options: BuildOptions, backend: Backend) -> None:
    """Compares what is asked for with what the backend has.

    Raises:
        ConfigError: a value that no backend knows; or an option that this one lacks, saying which backend has it.
    """
    level = options.optimization_level
    if level is not None and level not in _LEVELS:
        raise ConfigError(f"optimization level {level} is not 0 to 5", fix="leave it out for the default")
    for name, kind in (("tiling", Tiling), ("hardware_compatibility", HardwareCompatibility)):
        value = getattr(options, name)
        if value is not None and value not in get_args(kind):
            raise ConfigError(f"{name} {value!r} is unknown", fix=f"choose from {', '.join(get_args(kind))}")
    has = backend.capabilities
    if options.hardware_compatibility not in ("none", *has.hardware_compatibility):
        targets = "name its GPUs under compute_capabilities" if has.targets else "leave it out"
        raise ConfigError(
            f"{backend} has no hardware_compatibility: {options.hardware_compatibility}",
            why=_RTX_HARDWARE if has.targets else f"it has {', '.join(has.hardware_compatibility)}",
            fix=f"{targets}, or use backend: tensorrt (10.14 or newer)",
        )
    lacking = {
        "timing_cache": options.timing_cache is not None and not has.timing_cache,
        "version_compatible": options.version_compatible and not has.version_compatible,
        "weight_streaming": options.weight_streaming and not has.weight_streaming,
        "refit": options.refit and not has.refit,
        "tiling": options.tiling is not None and not has.tiling,
        "plugins": bool(options.plugins) and not has.plugins,
    }
    for name in (name for name, lacks in lacking.items() if lacks):
        raise ConfigError(
            f"{backend} has no {name}",
            why=_WHY_RTX.get(name, "") if backend.name == "tensorrt-rtx" else "",
            fix=f"leave {name} out of the target, or use backend: tensorrt"
            + (", or express the operator through ONNX's own: `custom_ops`" if name == "plugins" else ""),
        )
    check_plugins(options.plugins)


_WHY_RTX = {
    "timing_cache": "it times nothing while it builds: its timing cache does nothing since 1.2",
    "version_compatible": "it ships no lean runtime to put into the engine",
    "plugins": "it has no registry that a library could add operators to",
    "refit": "its builder fails with the flag where there is no GPU, and it was not shown to work with one",
}
_RTX_HARDWARE = "its builder keeps NONE whatever is set; an engine is compiled for the GPU at hand when it loads"


def set_options(trt: ModuleType, config: Any, options: BuildOptions) -> None:
    """Sets what differs from the defaults in an `IBuilderConfig`; the timing cache is `timing_cache`'s business.

    Every backend goes the same way: `check_options` has refused what this one lacks.
    """
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.tiling is not None:
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, options.tiling.upper())
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    for name in ("version_compatible", "weight_streaming", "refit"):
        if getattr(options, name):
            config.set_flag(getattr(trt.BuilderFlag, name.upper()))
