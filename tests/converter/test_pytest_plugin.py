"""The plugin as a new user meets it: a small repository of its own, and `python -m pytest` in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

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

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text, encoding="utf-8")

    def pytest(self, *options: str, code: int | None = None) -> str:
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-ra", *options],
            cwd=self.path,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
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


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((name, module),) = re.findall(r'entry-points\.pytest11\]\n(\w+) = "([\w.]+)"\n', project)
    site = tmp_path / "site"
    # An environment that installed an older trtforge lacks the entry point; pytest loads one of a name once.
    if not any(found.name == name for found in entry_points(group="pytest11")):
        info = site / "trtforge_plugin-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trtforge-plugin\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    found = Repository(tmp_path / "repository", site)
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


def test_a_user_without_engines_pays_nothing(repository: Repository) -> None:
    repository.write("test_engines.py", "")
    repository.write(
        "test_own.py",
        "import sys\nimport validation\n\n\ndef test_own():\n"
        "    heavy = {'torch', 'numpy', 'onnx_ir', 'onnxruntime', 'pydantic', 'yaml', 'tensorrt_rtx', 'typer'}\n"
        "    assert not heavy & set(sys.modules)\n"
        "    assert 'trtforge.converter.pytest_plugin' in sys.modules\n"
        "    assert not [name for name in sys.modules if name.startswith('trtforge.validation')]\n"
        '    assert validation.NAME == "the user\'s validation"\n',
    )
    assert "1 passed" in repository.pytest(code=0)


def with_outlier(text: str) -> str:
    """One bias so large that half precision loses the rest."""
    return text.replace("        self.second", "        self.first.bias.data[0] = 3e4\n        self.second")


def test_changed_weights_fail_with_their_cause(repository: Repository) -> None:
    repository.write("pytest.ini", "[pytest]\nfilterwarnings = error\nengine_proof = onnxruntime\n")
    made = repository.pytest("--engine-baseline=update", code=0)
    assert "3 passed" in made
    assert "1 entry of engine-baseline.json changed: configs/net.yaml::net" in made
    entry = repository.baseline["engines"]["configs/net.yaml::net"]
    assert list(entry["proof"]) == ["export", "precision"]
    assert entry["operators"] == {"Gemm": 2, "Relu": 1}

    repository.write("my_models.py", with_outlier(MODEL.replace("SEED", "0")))
    worse = repository.pytest(code=1)
    assert "configs/net.yaml::net: regression against engine-baseline.json" in worse
    assert "<-- worse" in worse
    assert "likely cause: weights changed" in worse
    assert "FAILED test_engines.py::test_net" in worse
    assert "Traceback" not in worse


@pytest.mark.slow
def test_life_of_a_baseline(repository: Repository) -> None:
    skipped = repository.pytest(code=0)
    assert "no GPU here to run the engine; --engine-proof=onnxruntime" in skipped
    assert "1 passed, 2 skipped" in skipped
    missing = repository.pytest("--engine-proof=onnxruntime", code=1)
    assert "engine-baseline.json has no entry for it; run `pytest --engine-baseline=update`" in missing

    repository.write("pytest.ini", "[pytest]\nfilterwarnings = error\nengine_proof = onnxruntime\n")
    repository.pytest("--engine-baseline=update", code=0)
    text = (repository.path / "engine-baseline.json").read_text()
    again = repository.pytest("--engine-baseline=update", code=0)
    assert "engine-baseline.json is as it was" in again
    assert (repository.path / "engine-baseline.json").read_text() == text
    assert "3 passed" in repository.pytest(code=0)

    repository.write("my_models.py", MODEL.replace("SEED", "1"))
    other = repository.pytest("-k", "test_net", code=1)
    assert "it is another engine than the baseline's; its figures are within what is allowed" in other
    assert "weights changed" in other
    repository.pytest("--engine-baseline=update", code=0)
    assert "3 passed" in repository.pytest(code=0)

    repository.write(
        "my_models.py",
        "# a comment changes the exporter's bytes, not the graph\n"
        + MODEL.replace("SEED", "1").replace("torch.relu(self.first(x))", "torch.tanh(self.first(x))"),
    )
    graph = repository.pytest("-k", "test_net", code=1)
    assert "graph changed" in graph
    assert "Relu 1 -> 0, Tanh 0 -> 1" in graph
    assert "weights changed" not in graph
    repository.pytest("--engine-baseline=update", code=0)
    assert "3 passed" in repository.pytest(code=0)

    data = repository.baseline
    entry = data["engines"]["configs/net.yaml::net"]
    entry["versions"]["onnxruntime"] = "1.0"
    entry["proof"]["precision"]["outputs"]["y"]["sqnr_db"] = 89.0
    repository.write("engine-baseline.json", json.dumps(data, indent=2))
    version = repository.pytest("-k", "test_net", code=1)
    assert "likely cause: version changed: onnxruntime 1.0 ->" in version
    repository.pytest("--engine-baseline=update", code=0)
    assert "3 passed" in repository.pytest(code=0)


def test_broken_baseline_is_explained(repository: Repository) -> None:
    repository.write("engine-baseline.json", "{\n<<<<<<< HEAD\n")
    broken = repository.pytest("-k", "test_net", "--engine-proof=onnxruntime", code=1)
    assert "engine-baseline.json is not JSON" in broken
    assert "merge conflict" in broken
    assert "Traceback" not in broken


def test_every_model_of_a_file_is_a_test(repository: Repository) -> None:
    repository.write("configs/net.yaml", CONFIG.replace("    precision: fp16\n", "matrix: {precision: [fp32, bf16]}\n"))
    listed = repository.pytest("--collect-only", "test_engines.py", code=0)
    names = ("test_net[net-fp32]", "test_net[net-bf16]", "test_again[net-fp32]", "test_again[net-bf16]")
    assert all(name in listed for name in names)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("'configs/nett.yaml'", "there is no configs/nett.yaml"),
        ("'configs/net.yaml', model='nett'", "has no model 'nett'"),
        ("", "write @pytest.mark.engine('configs/x.yaml', model='name')"),
        ("'configs/net.yaml', modle='net'", "write @pytest.mark.engine('configs/x.yaml', model='name')"),
    ],
)
def test_wrong_marks_are_explained(repository: Repository, mark: str, words: str) -> None:
    repository.write("test_engines.py", f"import pytest\n\n@pytest.mark.engine({mark})\ndef test_it(): pass\n")
    out = repository.pytest("test_engines.py", code=2)
    assert words in out
    assert "Traceback" not in out
