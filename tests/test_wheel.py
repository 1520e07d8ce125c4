"""What is compiled knows nothing of Python: one wheel a platform, with or without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("trtforge", "calibration", "converter", "runtime", "validation")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.parametrize("compiler", ["cc", "false"])
def test_one_wheel_serves_every_python(tmp_path: Path, compiler: str) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel")
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    for name in PARTS:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"CC": compiler}, capture_output=True, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert "-py3-none-linux_" in wheel.name
    compiled = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert len(compiled) == (2 if compiler == "cc" else 0)
