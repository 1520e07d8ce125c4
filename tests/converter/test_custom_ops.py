"""A user's own operators, translated by a table of theirs: from YAML and from Python, to a proved engine."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
from tiny_models import run, write_tiny

import trtforge

CASES = Path(__file__).parents[1] / "cases" / "custom_ops.py"


def write(folder: Path, table: str | None) -> None:
    shutil.copy(CASES, folder / "own_ops.py")
    write_tiny(folder, {
        "own": {
            "source": {"factory": "own_ops:net"},
            "dims": {"batch": [1, 2, 4]},
            "inputs": {"x": {"shape": ["batch", 4]}},
            **({"custom_ops": f"own_ops:{table}"} if table else {}),
        }
    })  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("own_ops_in_process", CASES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def from_python(cases: ModuleType, table: Any, out: Path) -> trtforge.Artifact:
    import torch

    return trtforge.convert(
        cases.net(), torch.randn(2, 4), out, dims={"n": (1, 2, 4)}, inputs={"x": ("n", 4)}, custom_ops=table
    )


def test_python_gives_an_engine_of_plain_onnx(cases: ModuleType, tmp_path: Path) -> None:
    artifact = from_python(cases, cases.table, tmp_path / "own")
    assert artifact.status in ("built", "validated")
    model = onnx.load(artifact.path / "reference.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert list(model.functions) == []
    assert {"Sigmoid", "Sqrt"} <= {node.op_type for node in model.graph.node}


def test_yaml_and_its_module_in_the_recipe(tmp_path: Path) -> None:
    write(tmp_path, "table")
    done = run(tmp_path, "convert", "tiny.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"]["own"]["status"] in ("built", "validated")
    manifest = json.loads((tmp_path / "artifacts" / "own" / "manifest.json").read_text())
    assert "own_ops.py" in manifest["recipe"]["files"]
    assert '"unchanged"' in run(tmp_path, "convert", "tiny.yaml", "--json").stdout
    with (tmp_path / "own_ops.py").open("a") as file:
        file.write("# another translation\n")
    assert '"unchanged"' not in run(tmp_path, "convert", "tiny.yaml", "--json").stdout


def test_a_translation_that_is_wrong_is_not_proved(cases: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(trtforge.ParityError):
        from_python(cases, cases.wrong_translation, tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("no_dict", "custom_ops is list, not a dict"),
        ("unknown", "did you mean 'trtforge_test::swish'"),
        ("number", "the translation of trtforge_test.swish.default is int, not a function"),
        ("untyped", "does not say what it returns"),
        ("raising", 'the translation of trtforge_test.root.default raised KeyError: "the translation\'s own key"'),
    ],
)
def test_wrong_tables(cases: ModuleType, tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(trtforge.ConfigError) as caught:
        from_python(cases, getattr(cases, table), tmp_path / "own")
    assert said in str(caught.value)
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_all_missing_translations_are_listed(cases: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(trtforge.ExportError) as caught:
        from_python(cases, cases.empty, tmp_path / "own")
    assert "2 operators have no translation to ONNX" in str(caught.value)
    assert "trtforge_test.swish.default at " in str(caught.value)
    assert "trtforge_test.root.default at " in str(caught.value)
    assert "custom_ops" in caught.value.fix
    with pytest.raises(trtforge.ExportError) as caught:
        from_python(cases, {"trtforge_test::swish": cases.swish_to_onnx}, tmp_path / "own")
    assert "1 operators have" in str(caught.value)
    assert "trtforge_test.root.default" in str(caught.value)


def test_a_raising_translation_shows_the_user_s_lines_alone(tmp_path: Path) -> None:
    write(tmp_path, "raising")
    done = run(tmp_path, "convert", "tiny.yaml")
    assert done.returncode == 2, done.stderr
    assert "Traceback in your code:" in done.stderr
    assert 'own_ops.py", line' in done.stderr
    assert "in raises" in done.stderr
    assert "site-packages" not in done.stderr
    assert "/trtforge/" not in done.stderr.replace(str(tmp_path), "")


def test_an_unknown_table_and_an_onnx_source(tmp_path: Path) -> None:
    write(tmp_path, "tabel")
    done = run(tmp_path, "convert", "tiny.yaml")
    assert done.returncode == 2
    assert "did you mean 'table'" in done.stderr
    write_tiny(tmp_path, {"tiny": {"source": {"onnx": "tiny.onnx"}, "custom_ops": "own_ops:table"}})
    done = run(tmp_path, "convert", "tiny.yaml")
    assert done.returncode == 2
    assert "the source is an ONNX file" in done.stderr
