"""`trtforge doctor` on whole and broken machines: libraries are really absent, or really broken, in its process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import run

from trtforge.converter import doctor
from trtforge.converter.inventory import REQUIRED
from trtforge.runtime.device import DeviceFacts
from trtforge.runtime.trt.backend import Backend, capabilities_of

ROOT = Path(__file__).parents[2]

# Where path finders don't find a name, it is not installed, for this process and for its children.
ABSENT = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


def machine(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment of a machine without some modules, where what lies in `folder` comes first."""
    (folder / "sitecustomize.py").write_text(ABSENT.format(names=without))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}


def test_fine_machine_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    env = machine(tmp_path) | {"TMPDIR": str(tmp_path / "temporary")}
    done = run(tmp_path, "doctor", "--json", env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert set(found) == {
        "trtforge", "python", "driver", "gpus", "why_no_gpu", "packages", "tensorrt", "caches", "temporary",
        "c_compiler", "cuda_home", "auto", "trial", "problems",
    }  # fmt: skip
    assert found["problems"] == []
    assert found["gpus"] == []
    assert found["why_no_gpu"]
    assert set(found["packages"]) == set(REQUIRED)
    assert all(package["installed"] and Path(package["path"]).exists() for package in found["packages"].values())
    assert "CPUExecutionProvider" in found["packages"]["onnxruntime"]["providers"]
    assert found["packages"]["torch"]["sees_gpu"] is False
    flavour = found["tensorrt"][found["auto"]["name"]]
    assert flavour["version"] == found["auto"]["version"]
    assert flavour["libraries"]
    assert all(Path(library).is_file() for library in flavour["libraries"])
    assert found["auto"]["capabilities"]["int8_conv"] in (True, False)
    assert found["temporary"]["free_bytes"] > 0
    assert found["trial"]["status"] in ("built", "portable")
    assert found["trial"]["measured"]["sqnr_db"] > 80
    # torch keeps a cache of its own there
    assert [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("trtforge")] == []


def test_missing_tensorrt(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", "--json", env=machine(tmp_path, without=("tensorrt", "tensorrt_rtx")))
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert found["auto"] is None
    assert {name: flavour["installed"] for name, flavour in found["tensorrt"].items()} == {
        "tensorrt": False, "tensorrt-rtx": False,
    }  # fmt: skip
    (problem,) = found["problems"]
    assert problem["what"] == "no TensorRT is installed"
    assert "pip install 'trtforge[rtx]'" in problem["fix"]
    assert found["trial"] == {"status": "not tried", "why": "no TensorRT is installed"}


def test_missing_torch_and_onnx_are_told_without_them_in_plain_lines(tmp_path: Path) -> None:
    done = run(tmp_path, "doctor", env=machine(tmp_path, without=("torch", "onnx")))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "problem: torch is not installed\n  fix: pip install 'torch>=2.9'\n" in done.stdout
    assert "problem: onnx is not installed\n  fix: pip install 'onnx>=1.19'\n" in done.stdout
    assert "INT8 Conv" in done.stdout
    assert not set("│┃━") & set(done.stdout)
    assert "all that is needed works" not in done.stdout


def test_broken_tensorrt_library(tmp_path: Path) -> None:
    """The full TensorRT, installed over RTX: the library that its module loads is cut short."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "libnvinfer.so.10").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    (tmp_path / "tensorrt" / "__init__.py").write_text(
        "import ctypes, os\nctypes.CDLL(os.path.join(os.path.dirname(__file__), 'libnvinfer.so.10'))\n"
    )
    info = tmp_path / "tensorrt-10.14.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.14.1\n")
    done = run(tmp_path, "doctor", "--json", env=machine(tmp_path, without=("torch",)))
    assert done.returncode == 3
    _, problem = json.loads(done.stdout)["problems"]
    assert problem["what"].startswith("TensorRT 10.14.1 is installed but does not load: ")
    assert "libnvinfer.so.10" in problem["what"]
    assert problem["fix"].startswith("pip install --force-reinstall 'trtforge[tensorrt]'")


def test_a_library_that_crashes_when_it_loads(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    done = run(tmp_path, "doctor", "--json", env=machine(tmp_path, without=("torch",)))
    assert done.returncode == 3
    _, problem = json.loads(done.stdout)["problems"]
    assert problem["what"].startswith("onnxruntime is installed but does not load: ")
    assert "SIGSEGV" in problem["what"]


def test_oldest_versions_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    asked = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)",$', project, re.MULTILINE))
    assert {name: asked[name] for name, _ in REQUIRED.values()} == dict(REQUIRED.values())
    assert all(importlib.util.find_spec(module) for module in REQUIRED)


@pytest.mark.parametrize(
    ("backend", "version", "device", "fix"),
    [
        ("tensorrt-rtx", "1.7.1", "9.0", "pip install 'tensorrt-rtx<1.7'"),
        ("tensorrt-rtx", "1.7.1", "7.0", "pip install 'trtforge[tensorrt]'"),
        ("tensorrt-rtx", "1.6.1", "9.0", None),
    ],
)
def test_a_gpu_that_the_backend_refuses(
    monkeypatch: pytest.MonkeyPatch, backend: str, version: str, device: str, fix: str | None
) -> None:
    here: Any = DeviceFacts("GPU", device, 132, "13.0", 80 << 30)
    monkeypatch.setattr(doctor, "device_facts", lambda: here)
    found = doctor._device_problems(Backend(backend, "tensorrt_rtx", version, capabilities_of(backend, version)))
    if fix is None:
        assert found == []
    else:
        (problem,) = found
        assert problem.fix.startswith(fix)
        assert problem.exit_code == 5
        assert f"compute capability {device}" in problem.what
