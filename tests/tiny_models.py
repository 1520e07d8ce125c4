"""Conversions that take two seconds: a one-layer ONNX, the YAML around it, and the command line in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.parser

TINY = """<ir_version: 8, opset_import: ["" : 18]>
g (float[n,4] x) => (float[n,4] y) <float[4,4] w = {1,2,3,4,0.5,6,7,8,9,1,1,2,3,4,5,6}> {
  h = MatMul(x, w)
  y = Tanh(h)
}"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def entry(**more: Any) -> dict[str, Any]:
    return {
        "source": {"onnx": "tiny.onnx"},
        "dims": {"n": [1, 2, 4]},
        "inputs": {"x": {"shape": ["n", 4]}},
        **more,
    }


def write_tiny(folder: Path, models: Mapping[str, Any] | None = None, **top: Any) -> Path:
    """`tiny.onnx` and `tiny.yaml` in `folder`; by default with one model `tiny`."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.parser.parse_model(TINY), folder / "tiny.onnx")
    path = folder / "tiny.yaml"
    path.write_text(json.dumps({"version": 1, "models": models or {"tiny": entry()}, **top}))
    return path


def start(folder: Path, *args: str, **more: Any) -> subprocess.Popen[str]:
    env = {**ENVIRONMENT, **more.pop("env", {})}
    command = more.pop("command", [sys.executable, "-P", "-m", "trtforge"] if sys.version_info >= (3, 11) else [sys.executable, "-m", "trtforge"])  # fmt: skip  # noqa: E501
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *args], cwd=folder, stdout=pipe, stderr=pipe, text=True, env=env, **more)


def run(folder: Path, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    with start(folder, *args, **more) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"it did not happen within {seconds} s")


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(number) for number in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
