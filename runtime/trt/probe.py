"""One installed TensorRT, loaded: whether it starts, and which files of it the process then holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtforge.runtime.child import Emit
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import MissingDependencyError
from trtforge.runtime.trt.backend import find_backend, import_backend
from trtforge.runtime.trt.messages import BuildLog, make_logger

__all__ = ["probe_task"]

_LIBRARY = re.compile(r"/[^/]*(nvinfer|tensorrt)[^/]*\.so[^/]*$")


def probe_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's side of `probe("trt.probe", {"backend": name})`.

    Returns:
        `{"version", "module", "libraries"}`: the module's own version, its file, and its shared libraries' paths.

    Raises:
        MissingDependencyError: it does not load, or makes no builder.
    """
    backend = find_backend(args["backend"])
    trt = import_backend(backend)
    log = BuildLog(no_gpu=device_facts() is None, on_node=lambda node: None)
    logger = make_logger(trt, log)
    try:
        trt.Builder(logger)
    except TypeError as error:  # the bindings' word for a null pointer
        raise MissingDependencyError(f"{backend} loads and does not start: {'; '.join(log.errors[-3:])}") from error
    return {"version": trt.__version__, "module": str(trt.__file__), "libraries": _loaded_libraries()}


def _loaded_libraries() -> list[str]:
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/")}
    return sorted(path for path in paths if _LIBRARY.search(path))
