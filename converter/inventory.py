"""What this machine has of what trtforge stands on. Nothing heavy is imported: libraries are loaded in children."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtforge.runtime.device import list_devices, why_no_gpu
from trtforge.runtime.errors import MissingDependencyError
from trtforge.runtime.probes import probe
from trtforge.runtime.trt.backend import BACKENDS, find_backend
from trtforge.runtime.trt.runtime_cache import cache_folder

__all__ = ["REQUIRED", "take_inventory", "version_of"]

REQUIRED = {
    "torch": ("torch", "2.9"),
    "numpy": ("numpy", "1.26"),
    "ml_dtypes": ("ml_dtypes", "0.5"),
    "onnx": ("onnx", "1.19"),
    "onnx_ir": ("onnx-ir", "0.1.16"),
    "onnxscript": ("onnxscript", "0.5"),
    "onnxruntime": ("onnxruntime", "1.22"),
    "polygraphy": ("polygraphy", "0.49.20"),
    "pydantic": ("pydantic", "2.9"),
    "safetensors": ("safetensors", "0.5"),
}
"""Module: the distribution that brings it, and the oldest version that works, as in pyproject.toml."""

_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)")
_MOST_CACHE_FILES = 100_000


def take_inventory() -> dict[str, Any]:
    """Everything that `trtforge doctor --json` says of the machine but for its judgement."""
    from trtforge import __version__

    packages = {module: _package(module, distribution) for module, (distribution, _) in REQUIRED.items()}
    for module, task in (("torch", "torch.probe"), ("onnxruntime", "onnx.probe")):
        if packages[module]["installed"]:
            packages[module] |= probe(task)
    return {
        "trtforge": {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "machine": platform.machine(),
        },
        "driver": _driver_version(),
        "gpus": [asdict(device) for device in list_devices()],
        "why_no_gpu": why_no_gpu(),
        "packages": packages,
        "tensorrt": {name: _flavour(name) for name in BACKENDS},
        "caches": [_folder(path) for path in _cache_folders()],
        "temporary": _temporary(),
        # Neither is needed: wheels bring CUDA's libraries, and without our one C file numpy counts.
        "c_compiler": next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None),
        "cuda_home": os.environ.get("CUDA_HOME"),
    }


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0]))


def _package(module: str, distribution: str) -> dict[str, Any]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # a mere folder of that name has no origin
        return {"installed": False}
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # onnxruntime-gpu, or one built by hand
        version = None
    return {"installed": True, "version": version, "path": spec.origin}


def _flavour(name: str) -> dict[str, Any]:
    try:
        backend = find_backend(name)
    except MissingDependencyError as error:
        # One that is too old is there, and no use.
        return {"installed": "is not installed" not in error.what, "error": error.what}
    return {"installed": True, "version": backend.version} | probe("trt.probe", {"backend": name})


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = _DRIVER.search(text)
    return found.group(1) if found else None


def _cache_folders() -> list[Path]:
    runtime = cache_folder()
    return [] if runtime is None else [runtime]


def _folder(path: Path) -> dict[str, Any]:
    size, count = 0, 0
    for root, _, names in os.walk(path):
        for name in names[: _MOST_CACHE_FILES - count]:
            try:
                size += Path(root, name).stat().st_size
            except OSError:  # another process tidies up
                continue
            count += 1
    return {"path": str(path), "files": count, "bytes": size}


def _temporary() -> dict[str, Any]:
    try:
        path = tempfile.gettempdir()
        return {"path": path, "free_bytes": shutil.disk_usage(path).free}
    except OSError as error:  # no folder at all can be written
        return {"path": None, "free_bytes": 0, "error": str(error)}
