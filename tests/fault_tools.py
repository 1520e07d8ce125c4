"""What the tests of faults share: an older artifact that has to stay whole, and a look for processes left over."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import entry, run, wait_for, write_tiny

__all__ = ["GPU", "convert", "made", "no_orphans", "standing", "tree"]

# The driver's word for a GPU, so that an engine is run here; the child that would run it finds none.
GPU = """
import trtforge.runtime.device as device
device.list_devices = lambda: (device.DeviceFacts("NVIDIA Fake", {capability!r}, 132, "13.0", 1 << 36),)
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_tiny(folder)
    done = run(folder, "convert", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "artifacts" / "tiny"


@pytest.fixture
def standing(made: Path, tmp_path: Path) -> Path:
    """`tmp_path` with an older artifact, and a file that asks for another precision."""
    shutil.copytree(made, tmp_path / "artifacts" / "tiny")
    write_tiny(tmp_path, {"tiny": entry(precision="fp16")})
    return tmp_path


@contextlib.contextmanager
def no_orphans() -> Iterator[dict[str, str]]:
    """Gives an environment; afterwards no process has it any more."""
    mark = f"TRTFORGE_TEST_MARK={uuid.uuid4()}"
    yield dict([mark.split("=")])

    def living() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in path.read_bytes():
                    found.append(path.parent.name)
        return found

    wait_for(lambda: not living(), 20)


def convert(folder: Path, *args: str, driver: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
    with no_orphans() as env:
        env |= more.pop("env", {})
        if driver:
            more["command"] = [sys.executable, "-c", *driver]
        return run(folder, "convert", "tiny.yaml", *args, env=env, **more)
