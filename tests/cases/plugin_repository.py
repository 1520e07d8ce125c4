"""A small repository of a user's own, with an engine under test: what the tests of the plugin start pytest in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]

MODEL = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.second(hidden)


def net():
    return Net()
"""

CONFIG = """\
version: 1
models:
  net:
    source: {factory: 'my_models:net'}
    dims: {batch: [1, 4, 16]}
    inputs: {x: {shape: [batch, 16]}}
    outputs: [y]
    precision: fp16
"""

TEST = """\
import pytest


@pytest.mark.engine("configs/net.yaml", model="net")
def test_net(engine_case):
    assert engine_case.artifact.status in ("built", "portable", "validated")


@pytest.mark.engine("configs/net.yaml")
def test_again():
    pass
"""


@dataclass
class Repository:
    """A user's repository, and a folder that makes the installed metadata name the plugin."""

    path: Path
    site: Path
    gpu: bool = False

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")

    def pytest(self, *options: str, code: int | None = None) -> str:
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
        hidden = {} if self.gpu else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # Not what this pytest, or a worker of pytest-xdist, told its own children.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-ra", *options],
            cwd=self.path,
            env={**environment, "PYTHONPATH": path, **hidden},
            capture_output=True,
            text=True,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def baseline(self) -> dict:
        return json.loads((self.path / "engine-baseline.json").read_text(encoding="utf-8"))


def make_repository(tmp_path: Path, *, gpu: bool = False) -> Repository:
    """The repository, its plugin registered as an installation registers it; `gpu`: pytest in it sees the GPU."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((name, module),) = re.findall(r'entry-points\.pytest11\]\n(\w+) = "([\w.]+)"\n', project)
    site = tmp_path / "site"
    # An environment that installed an older trtforge lacks the entry point; pytest loads one of a name once.
    if not any(found.name == name for found in entry_points(group="pytest11")):
        info = site / "trtforge_plugin-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trtforge-plugin\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    found = Repository(tmp_path / "repository", site, gpu)
    found.write("my_models.py", MODEL.replace("SEED", "0"))
    found.write("configs/net.yaml", CONFIG)
    found.write("test_engines.py", TEST)
    found.write("pytest.ini", "[pytest]\nfilterwarnings = error\naddopts = --strict-markers\n")
    # Names as common as ours: the plugin must neither import them nor shadow them.
    for package in ("validation", "converter", "runtime", "calibration"):
        found.write(f"{package}/__init__.py", f"NAME = 'the user\\'s {package}'\n")
    found.write(
        "test_own.py", "import converter, validation\n\ndef test_own():\n    assert validation.NAME.endswith('ion')\n"
    )
    return found


def with_outlier(text: str) -> str:
    """One bias so large that half precision loses the rest."""
    return text.replace("        self.second", "        self.first.bias.data[0] = 3e4\n        self.second")
