"""What decides a conversion's result, as hashes in the artifact's manifest: an unchanged model need not run again."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import FAILED_SUFFIX
from trtforge.converter.config import ConversionConfig
from trtforge.converter.manifest import Manifest, read_manifest
from trtforge.runtime.errors import ArtifactError, TrtForgeError
from trtforge.runtime.publish import hash_bytes, hash_file

__all__ = ["Recipe", "find_unchanged", "versions"]

_DISTRIBUTIONS = (
    "trtforge",
    "torch",
    "torchvision",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "polygraphy",
)
_MOST_FILES = 20_000
_PACKAGE = Path(__file__).parents[1]


@dataclass(slots=True)
class Recipe:
    """What one conversion is made from, recorded while it runs.

    Attributes:
        config: The configuration.
        files: SHA-256 by path of what was read: checkpoint, graph with its external data, files and folders that
            `kwargs` name, and every module of the user's own. Relative to the configuration's folder below it.
    """

    config: ConversionConfig
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def record(cls, config: ConversionConfig) -> Recipe:
        """Hashes everything at once: what is edited while the model converts has to count as changed afterwards."""
        recipe = cls(config)
        named = [*_paths_in(config), *_named_in_kwargs(config)]
        for path in [*named, *_external_data(config.source.onnx), *_user_modules()]:
            recipe._add(path)
        return recipe

    def to_json(self) -> dict[str, Any]:
        """The manifest's `recipe`; modules that were imported since `record` are added."""
        for path in _user_modules():
            self._add(path)
        return {**_conditions(self.config), "files": dict(sorted(self.files.items()))}

    def _add(self, path: Path) -> None:
        name = _relative(path, self.config.folder)
        if name not in self.files:
            self.files[name] = _fingerprint(path)


def find_unchanged(config: ConversionConfig, target: Path) -> tuple[Manifest | None, str]:
    """The artifact at `target` where converting again would make the same one; else None, and what changed.

    Every file of the artifact and every file that it was made from is hashed; torch is not imported.

    Args:
        config: What is wanted.
        target: Where its artifact would be.

    Returns:
        The manifest and "", or None and the reason ("" where there is no artifact).
    """
    if not target.is_dir():
        return None, ""
    if target.with_name(target.name + FAILED_SUFFIX).exists():
        return None, "it failed since"
    try:
        manifest = read_manifest(target, check_files=False)
        reason = _difference(config, manifest)
        return (None, reason) if reason else (read_manifest(target), "")
    except (ArtifactError, OSError) as error:
        return None, error.what if isinstance(error, ArtifactError) else str(error)


def versions() -> dict[str, str]:
    """Of what could change the result, where it is installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _difference(config: ConversionConfig, manifest: Manifest) -> str:
    recipe = manifest.facts.get("recipe")
    if manifest.status == "failed" or not isinstance(recipe, dict):
        return "it was not made from a file of models"
    now = json.loads(json.dumps(_conditions(config)))
    for key, value in now.items():
        old = recipe.get(key)
        if value == old:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            changed = sorted(k for k in {*value, *old} if value.get(k) != old.get(k))
            return f"{key} changed ({', '.join(f'{k} {old.get(k)} to {value.get(k)}' for k in changed)})"
        return f"{_TITLES.get(key, key)} changed"
    files: dict[str, str] = recipe.get("files", {})
    paths = [config.folder / name for name in files]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib lets go of the GIL
        for name, digest in zip(files, pool.map(_fingerprint, paths), strict=True):
            if not digest:
                return f"{name} is gone, or holds too many files to compare"
            if digest != files[name]:
                return f"{name} changed"
    return ""


_TITLES = {"entry": "its entry in the file", "trtforge": "trtforge's own code", "device": "the GPU"}


def _conditions(config: ConversionConfig) -> dict[str, Any]:
    """What the entry, the installed versions and the machine contribute."""
    from trtforge.runtime.device import device_facts
    from trtforge.runtime.trt.backend import find_backend

    try:
        backend = str(find_backend(config.target.backend))
    except TrtForgeError as error:
        backend = error.what
    device = device_facts()
    entry = json.dumps(_plain(config, config.folder), sort_keys=True)
    return {
        "entry": hash_bytes(entry.encode("utf-8", "surrogateescape")),
        "trtforge": _own_code(),
        "backend": backend,
        "device": device and f"{device.name}, {device.compute_capability}, CUDA {device.cuda_version}",
        "versions": versions(),
    }


@functools.cache
def _own_code() -> str:
    """SHA-256 over our own sources: in a checkout they change while the version stays."""
    folders = [folder for folder in sorted(_PACKAGE.iterdir()) if folder.is_dir()]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".c", ".j2"))
    return hash_bytes("".join(f"{path.name} {hash_file(path)}\n" for path in files).encode())


def _plain(value: Any, folder: Path) -> Any:
    """A configuration as JSON that does not depend on where its file lies."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.name not in ("folder", "origin")]
        return {name: _plain(getattr(value, name), folder) for name in names}
    if isinstance(value, Path):
        return _relative(value, folder)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, folder) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _relative(path: Path, folder: Path) -> str:
    path = Path(os.path.abspath(folder / path))  # noqa: PTH100  # `resolve` would follow links, which may change
    return path.relative_to(folder).as_posix() if folder.parts and path.is_relative_to(folder) else str(path)


def _paths_in(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        if value.is_file():
            yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            if entry.name not in ("folder", "origin"):
                yield from _paths_in(getattr(value, entry.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths_in(item)


def _named_in_kwargs(config: ConversionConfig) -> Iterator[Path]:
    """Files and folders that an argument of a factory or loader names, from the file's folder or the working one."""
    parts = (config.calibration, config.validation, config.validation.accuracy)
    loaders = [part.loader for part in parts if part is not None]
    for kwargs in [config.source.kwargs, *(loader.kwargs for loader in loaders if loader is not None)]:
        for text in _texts(kwargs):
            for folder in (config.folder, Path.cwd()):
                path = folder / text
                try:
                    found = bool(text.strip("./")) and path.exists()
                except (OSError, ValueError):  # too long for a path, or a NUL in it
                    continue
                if found:
                    yield path
                    break


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _external_data(path: Path | None) -> Iterable[Path]:
    if path is None or not path.is_file():
        return ()
    import onnx

    from trtforge.converter.foreign import external_files

    return external_files(onnx.load(path, load_external_data=False), path)


def _user_modules() -> Iterator[Path]:
    """Source of every imported module that is neither installed, nor the standard library's, nor ours."""
    # Ours by path too: some library knows the entry point by another name.
    installed = [str(Path(folder).resolve()) + os.sep for folder in (*_installed_folders(), str(_PACKAGE))]
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name == "__main__" or name.partition(".")[0] == "trtforge":
            continue
        path = Path(file).resolve()
        if path.is_file() and not str(path).startswith(tuple(installed)):
            yield path


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    standard = Path(os.__file__).parent  # of the base interpreter, also inside a virtual environment
    found = {str(standard), *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))}
    found |= {*site.getsitepackages(), site.getusersitepackages()}
    found |= {entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return tuple(sorted(found))


def _fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder's names, sizes and times. "" where it is gone or holds too much to tell."""
    try:
        if not path.is_dir():
            return hash_file(path)
        lines = []
        for root, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(names):
                facts = (Path(root) / name).stat()
                lines.append(f"{Path(root, name).relative_to(path).as_posix()} {facts.st_size} {facts.st_mtime_ns}")
            if len(lines) > _MOST_FILES:
                return ""
    except OSError:
        return ""
    return hash_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
