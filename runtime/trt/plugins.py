"""Plugin libraries: native code of the user's that adds operators to TensorRT, where the backend takes such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trtforge.runtime.errors import ArtifactError, BuildError, ConfigError
from trtforge.runtime.publish import hash_file

__all__ = ["PluginLibrary", "check_plugins", "load_plugins", "match_plugins"]


@dataclass(frozen=True, slots=True)
class PluginLibrary:
    """What a manifest records of a library that an engine needs: its file's name and its SHA-256 in hex."""

    name: str
    sha256: str

    @classmethod
    def of_file(cls, path: Path) -> PluginLibrary:
        """Reads and hashes a library."""
        return cls(path.name, hash_file(path))


def check_plugins(paths: Sequence[Path]) -> None:
    """Raises `ConfigError` for a path that is no file."""
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"plugins: there is no file {path}", fix="give the path of the shared library")


def match_plugins(needed: Sequence[PluginLibrary], given: Sequence[Path], engine: Path) -> tuple[Path, ...]:
    """The given libraries, as far as the engine needs them, in the order in which they were loaded for its build.

    An artifact names the native code that it needs, and does not bring it: who loads it says where that lies.

    Raises:
        ConfigError: a path is no file, or a library is none that the engine needs.
        ArtifactError: one is missing, or is another one than the engine was built and proved with.
    """
    check_plugins(given)
    found = {PluginLibrary.of_file(path): path for path in given}
    if unknown := [path for library, path in found.items() if library.name not in {need.name for need in needed}]:
        raise ConfigError(
            f"{engine} needs no plugin library {unknown[0].name}",
            why=f"it needs {', '.join(need.name for need in needed) or 'none'}",
            fix="leave it out",
        )
    for need in needed:
        if need not in found:
            other = next((path for library, path in found.items() if library.name == need.name), None)
            raise ArtifactError(
                f"{engine} needs the plugin library {need.name}"
                if other is None
                else f"{other} is not the plugin library that {engine} was proved with",
                why=f"its SHA-256 begins with {need.sha256[:16]}",
                fix="name it: load(plugins=[…]), or --plugin of `trtforge validate` and `trtforge build`",
            )
    return tuple(found[need] for need in needed)


def load_plugins(trt: ModuleType, logger: Any, paths: Sequence[Path]) -> None:
    """Registers TensorRT's own plugins and those of the libraries, for this process; a second time changes nothing.

    Raises:
        BuildError: a library does not load, or another one was loaded from its path.
    """
    if not paths:
        return
    trt.init_libnvinfer_plugins(logger, "")
    registry = trt.get_plugin_registry()
    for path in paths:
        try:
            library = PluginLibrary.of_file(path)
        except OSError as error:
            raise _unloadable(path, str(error)) from error
        loaded, _ = _LOADED.get(path.resolve(), (None, None))
        if loaded is not None and loaded != library:
            raise BuildError(
                f"the plugin library {path} changed after this process loaded it",
                why="its operators are registered once a process",
                fix="load the engine in a process of its own",
            )
        if loaded is not None:
            continue
        # Gives None where it cannot; some releases raise.
        try:
            handle = registry.load_library(str(path))
        except (RuntimeError, OSError) as error:
            raise _unloadable(path, str(error)) from error
        if handle is None:
            raise _unloadable(path, "TensorRT's log has the reason")
        _LOADED[path.resolve()] = library, handle


_LOADED: dict[Path, tuple[PluginLibrary, Any]] = {}


def _unloadable(path: Path, why: str) -> BuildError:
    return BuildError(
        f"the plugin library {path} does not load",
        why=why,
        fix="build it against this TensorRT and CUDA, and see what `ldd` says is missing",
    )
