"""The plugin as a new user meets it: a small repository of its own, and `python -m pytest` in it."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cases"))

from plugin_repository import CONFIG, MODEL, Repository, make_repository, with_outlier

from trtforge.converter.compare_artifacts import Allowance
from trtforge.converter.engine_case import EngineCase
from trtforge.runtime.errors import ArtifactError


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path)


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


@pytest.mark.parametrize("fails", [False, True])
def test_running_an_engine_leaves_none_behind(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's memory, and the process's kind of TF32, stay taken until a runner is closed."""
    left: list[str] = []

    class Runner:
        def __init__(self, *_: object, version_compatible: bool, **__: object) -> None:
            assert version_compatible
            left.append("open")

        def run(self, feeds: object) -> object:
            if fails:
                raise ArtifactError("the engine failed while it ran")
            return feeds

        def close(self) -> None:
            left.remove("open")

    artifact = SimpleNamespace(
        status="validated",
        engine=Path("model.engine"),
        facts={"engine": {"backend": "tensorrt", "tf32": False}},
        build_options=SimpleNamespace(version_compatible=True),
    )
    monkeypatch.setattr(EngineCase, "artifact", artifact)
    monkeypatch.setattr("trtforge.runtime.trt.execute.EngineRunner", Runner)
    case = EngineCase("a::b", Path("a"), "b", cast("Any", None), Allowance(), strict=True)
    with pytest.raises(ArtifactError) if fails else nullcontext():
        case.run({})
    assert left == []
