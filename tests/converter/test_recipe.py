"""What makes a model unchanged, and everything that makes it changed again."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_models import ENVIRONMENT, run

from trtforge.converter import recipe
from trtforge.converter.config import ConversionConfig, read_config
from trtforge.converter.manifest import write_manifest
from trtforge.converter.recipe import find_unchanged
from trtforge.runtime.device import DeviceFacts

FILES = {
    "recipe_factory.py": "from recipe_parts.layers import Net\ndef net(table): return Net()\n",
    "recipe_data.py": "import numpy, recipe_late\ndef real(folder): return [numpy.ones((2, 4), 'float32')]\n",
    "recipe_late.py": "",
    "recipe_parts/__init__.py": "",
    "recipe_parts/layers.py": "import torch\ndef Net(): return torch.nn.Linear(4, 4)\n",
    "recipe_parts/unused.py": "",
    "table.csv": "1,2",
    "pictures/a.txt": "a",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    torch.manual_seed(0)
    safetensors.torch.save_file(torch.nn.Linear(4, 4).state_dict(), folder / "w.safetensors")
    source = {"factory": "recipe_factory:net", "kwargs": {"table": "table.csv"}, "checkpoint": "w.safetensors"}
    data = {"loader": "recipe_data:real", "kwargs": {"folder": "pictures"}}
    model = {"source": source, "dims": {"n": [1, 2, 4]}, "inputs": {"input": {"shape": ["n", 4]}}, "validation": data}
    (folder / "m.yaml").write_text(json.dumps({"version": 1, "models": {"m": model}}))
    done = run(folder, "convert", "m.yaml", env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The whole project, moved to another place: that alone changes nothing."""
    copy = tmp_path / "moved"
    shutil.copytree(made, copy)
    return copy


def config(folder: Path) -> ConversionConfig:
    (found,) = read_config(folder / "m.yaml")
    return found


def changed(folder: Path, found: ConversionConfig | None = None) -> str:
    manifest, reason = find_unchanged(found or config(folder), folder / "artifacts" / "m")
    assert (manifest is None) == bool(reason)
    return reason


def test_every_file_of_the_user_s_is_recorded_and_nothing_else(folder: Path) -> None:
    facts = json.loads((folder / "artifacts" / "m" / "manifest.json").read_text())["recipe"]
    assert sorted(facts["files"]) == [
        "pictures", "recipe_data.py", "recipe_factory.py", "recipe_late.py", "recipe_parts/__init__.py",
        "recipe_parts/layers.py", "table.csv", "w.safetensors",
    ]  # fmt: skip
    assert changed(folder) == ""


def test_neither_times_nor_files_that_nobody_imported_count(folder: Path) -> None:
    (folder / "recipe_parts" / "unused.py").write_text("x = 1")
    for path in folder.rglob("*.*"):
        if "pictures" not in path.parts:
            os.utime(path, (1e9, 1e9))
    assert changed(folder) == ""


MODULES = ("recipe_factory.py", "recipe_late.py", "recipe_parts/layers.py", "recipe_data.py")


@pytest.mark.parametrize("name", [*MODULES, "table.csv", "w.safetensors"])
def test_one_byte_of_a_file_counts(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([(data[-1] if data else 0) ^ 1]))
    assert changed(folder) == f"{name} changed"
    (folder / name).unlink()
    assert changed(folder).startswith(f"{name} is gone")


def test_a_folder_counts_by_names_sizes_and_times(folder: Path) -> None:
    (folder / "pictures" / "b.txt").write_text("b")
    assert changed(folder) == "pictures changed"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.update(precision="fp16"),
        lambda model: model["source"]["kwargs"].update(table="tables.csv"),
        lambda model: model.update(dims={"n": [1, 2, 5]}),
        lambda model: model["validation"].update(tolerance={"sqnr_db": 41}),
    ],
)
def test_the_entry_counts(folder: Path, change: Callable[[Any], None]) -> None:
    data = json.loads((folder / "m.yaml").read_text())
    change(data["models"]["m"])
    (folder / "m.yaml").write_text(json.dumps(data))
    assert changed(folder) == "its entry in the file changed"


def test_another_model_in_the_file_does_not_count(folder: Path) -> None:
    data = json.loads((folder / "m.yaml").read_text())
    data["models"]["n"] = data["models"]["m"]
    (folder / "m.yaml").write_text(json.dumps(data, indent=3))
    assert changed(folder, read_config(folder / "m.yaml")[0]) == ""


def test_versions_our_code_and_the_gpu_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recipe.versions()
    monkeypatch.setattr(recipe, "versions", lambda: {**real, "torch": "9.9"})
    assert changed(folder) == f"versions changed (torch {real['torch']} to 9.9)"
    monkeypatch.undo()
    monkeypatch.setattr(recipe, "_own_code", lambda: "other")
    assert changed(folder) == "trtforge's own code changed"
    monkeypatch.undo()
    h100 = DeviceFacts("NVIDIA H100", "9.0", 132, "13.0", 1 << 36)
    monkeypatch.setattr("trtforge.runtime.device.device_facts", lambda: h100)
    assert changed(folder) == "the GPU changed"
    monkeypatch.undo()
    assert changed(folder, replace(config(folder), target=replace(config(folder).target, backend="tensorrt"))) != ""


def test_an_artifact_that_is_altered_failed_or_from_python_is_converted_again(folder: Path) -> None:
    target = folder / "artifacts" / "m"
    (target.parent / "m.failed").mkdir()
    assert changed(folder) == "it failed since"
    (target.parent / "m.failed").rmdir()
    data = (target / "report.html").read_bytes()
    (target / "report.html").write_bytes(data[:-1])
    assert "report.html was altered" in changed(folder)
    (target / "report.html").write_bytes(data)
    facts = json.loads((target / "manifest.json").read_text())
    drop = ("schema", "status", "name", "files")
    kept = {key: value for key, value in facts.items() if key not in drop}
    write_manifest(target, "failed", "m", kept)
    assert changed(folder) != ""
    write_manifest(target, "built", "m", {**kept, "recipe": None})
    assert changed(folder) == "it was not made from a file of models"
    shutil.rmtree(target)
    assert find_unchanged(config(folder), target) == (None, "")


def test_a_folder_of_too_many_files_is_never_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_MOST_FILES", 2)
    for number in range(3):
        (tmp_path / str(number)).touch()
    assert recipe._fingerprint(tmp_path) == ""
    assert "recipe_factory" not in sys.modules
