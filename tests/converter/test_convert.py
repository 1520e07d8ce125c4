"""The whole chain on small models: what is published, what is refused with which exit code, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trtforge
from trtforge.converter import cli

CASES = Path(__file__).parents[1] / "cases" / "case_models.py"

STRICT = {"tolerance": {"sqnr_db": 200}}
NO_SUCH_OP = {"op": "Cnv", "precision": "fp32"}
TF32_OF_ONE = {"default": "fp16", "rules": [{"op": "Conv", "precision": "tf32"}]}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, in `tmp_path`; gives exit code, stdout and stderr."""
    shutil.copy(CASES, tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def write(name: str, *, factory: str, shape: str = "[batch, 4]", **more: Any) -> Path:
    model = {
        "source": {"factory": f"case_models:{factory}"},
        "dims": {"batch": [1, 4, 8]},
        "inputs": {"x": {"shape": [d if not d.isdigit() else int(d) for d in shape.strip("[]").split(", ")]}},
        **more,
    }
    path = Path(f"{name}.yaml")
    path.write_text(json.dumps({"version": 1, "models": {name: model}}))  # JSON is YAML
    return path


def healthy(name: str = "ok", **more: Any) -> Path:
    config = write(name, factory="healthy", shape="[batch, 3, 16, 16]", **more)
    text = config.read_text().replace('"inputs": {"x"', '"inputs": {"input"')
    config.write_text(text)
    return config


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_healthy_model_is_published_with_its_proof(run: Run, tmp_path: Path, precision: str) -> None:
    code, out, err = run("convert", str(healthy(precision=precision)), "--json")
    assert code == 0, err
    (entry,) = json.loads(out)["models"].values()
    assert entry["status"] in ("built", "validated")
    artifact = trtforge.open_artifact(entry["artifact"])
    assert artifact.engine is not None
    assert artifact.facts["measured"]["sqnr_db"] > 30
    assert {r["verdict"] for r in json.loads((artifact.path / "report.json").read_text())["reports"]} == {"passed"}
    assert os.listdir(tmp_path / "artifacts") == ["ok"]
    assert run("validate", entry["artifact"])[0] == 0
    assert json.loads(run("inspect", entry["artifact"], "--json")[1])["precision"] == precision


def test_one_altered_byte_in_any_file_is_exit_5(run: Run, tmp_path: Path) -> None:
    assert run("convert", str(healthy(precision="fp16")))[0] == 0
    folder = tmp_path / "artifacts" / "ok"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
        code, _, err = run("validate", str(folder))
        assert code == 5, path
        assert "Traceback" not in err
        with pytest.raises(trtforge.ArtifactError):
            trtforge.load(folder)
        path.write_bytes(data)
    assert run("validate", str(folder))[0] == 0


@pytest.mark.parametrize(
    ("factory", "shape", "more", "code", "said"),
    [
        ("healthy", "[batch, 3, 16, 16]", {"precision": "fp16", "validation": STRICT}, 4, "SQNR"),
        ("Zero", "[batch, 4]", {}, 4, "not proved"),
        ("Branch", "[batch, 4]", {}, 3, "case_models.py"),
        ("Frozen", "[batch, 4]", {"dims": {"batch": [2, 8, 16]}}, 3, "dimension 'batch' froze at 8"),
        ("Unsupported", "[batch, 4]", {}, 3, "Unique"),
        ("Raises", "[batch, 4]", {}, 3, "the user's own key"),
        ("raising_factory", "[batch, 4]", {}, 2, "the factory's own error"),
        ("not_a_module", "[batch, 4]", {}, 2, "int"),
        ("helthy", "[batch, 4]", {}, 2, "did you mean 'healthy'"),
        ("healthy", "[batch, 4]", {"precision": "fp17"}, 2, "did you mean"),
        ("healthy", "[batch, 4]", {"source": {"factory": "case_modls:healthy"}}, 2, "case_models"),
        ("healthy", "[batch, 4]", {"source": {"factory": "case_models:healthy", "checkpoint": "no.pt"}}, 2, "no.pt"),
        ("healthy", "[batch, 4]", {"precision": {"default": "fp16", "rules": [NO_SUCH_OP]}}, 2, "Conv"),
        ("healthy", "[batch, 4]", {"precision": TF32_OF_ONE}, 2, "whole engine"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_its_exit_code_and_leaves_nothing(
    run: Run, tmp_path: Path, factory: str, shape: str, more: dict[str, Any], code: int, said: str
) -> None:
    config = write("bad", factory=factory, shape=shape, **more)
    if factory == "healthy":
        config.write_text(config.read_text().replace('"inputs": {"x"', '"inputs": {"input"').replace('"batch", 4]', '"batch", 3, 16, 16]'))  # fmt: skip  # noqa: E501
    got, _, err = run("convert", str(config))
    assert got == code, err
    assert said in err
    assert "trtforge/" not in err.replace(str(tmp_path), "")  # our own frames are nobody's business
    left = set(os.listdir(tmp_path / "artifacts")) if (tmp_path / "artifacts").exists() else set()
    assert left == ({"bad.failed"} if code == 4 else set())


def test_failed_artifact_is_kept_for_inspection_and_never_loaded(run: Run, tmp_path: Path) -> None:
    config = healthy("strict", precision="fp16", validation={"tolerance": {"sqnr_db": 200}})
    assert run("convert", str(config))[0] == 4
    failed = tmp_path / "artifacts" / "strict.failed"
    assert json.loads(run("inspect", str(failed), "--json")[1])["status"] == "failed"
    with pytest.raises(trtforge.ArtifactError, match="never loaded"):
        trtforge.load(failed, allow_unvalidated=True)
    assert run("validate", str(failed))[0] == 5
    assert run("convert", str(healthy("strict", precision="fp16")))[0] == 0
    assert os.listdir(tmp_path / "artifacts") == ["strict"]


def test_older_artifact_survives_a_failure(run: Run, tmp_path: Path) -> None:
    assert run("convert", str(healthy()))[0] == 0
    before = trtforge.open_artifact(tmp_path / "artifacts" / "ok").facts
    assert run("convert", str(write("ok", factory="Zero")))[0] == 4
    assert trtforge.open_artifact(tmp_path / "artifacts" / "ok").facts == before


def test_batch_goes_on_after_a_failure_and_exits_with_the_worst(run: Run, tmp_path: Path) -> None:
    good = json.loads(healthy("good").read_text())
    good["models"]["bad"] = json.loads(write("bad", factory="Branch").read_text())["models"]["bad"]
    good["models"] = {"bad": good["models"]["bad"], "good": good["models"]["good"]}
    Path("both.yaml").write_text(json.dumps(good))
    code, out, _ = run("convert", "both.yaml", "--json")
    models = json.loads(out)["models"]
    assert code == 3
    assert [m["status"] for m in models.values()] == ["failed", "built"]
    assert models["bad"]["error"]["type"] == "ExportError"
    assert models["bad"]["error"]["stage"] == "export"


def test_unknown_key_is_exit_2_with_its_line(run: Run) -> None:
    path = healthy()
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1).replace('"dims"', '"dimz"'))
    code, _, err = run("convert", str(path))
    assert code == 2
    assert "ok.yaml:8:" in err
    assert "did you mean 'dims'" in err


def test_only_selects_and_names_the_nearest(run: Run) -> None:
    code, _, err = run("convert", str(healthy()), "--only", "okay")
    assert code == 2
    assert "did you mean 'ok'" in err


def test_import_in_a_repository_with_names_like_ours(tmp_path: Path) -> None:
    for name in ("validation", "calibration", "converter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the repository\\'s own {name}')")
    (tmp_path / "runtime.py").write_text("raise ImportError('the repository\\'s own runtime')")
    shutil.copy(CASES, tmp_path)
    code = (
        "import trtforge, torch, case_models\n"
        "a = trtforge.convert(case_models.healthy(), torch.zeros(2, 3, 16, 16), 'out', dims={'b': (1, 2, 4)},"
        " inputs={'input': ('b', 3, 16, 16)})\n"
        "print(a.status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("built", "validated"), done.stderr


def test_front_door_loads_nothing_heavy() -> None:
    code = "import sys, trtforge, trtforge.converter.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "tensorrt", "tensorrt_rtx", "onnxruntime", "onnx_ir", "onnx", "numpy", "polygraphy", "matplotlib"}
    assert not heavy & set(done.stdout.split())


def test_every_public_name_exists() -> None:
    assert all(getattr(trtforge, name) is not None for name in trtforge.__all__)
