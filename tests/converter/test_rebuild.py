"""`trtforge build DIR`: an engine for a portable artifact, or a new one, without torch or sources."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

import trtforge
from trtforge.runtime.errors import ArtifactError

WEIGHTS = ", ".join(str((k % 7 - 3) / 8) for k in range(32))
TEXT = f"""<ir_version: 10, opset_import: ["": 20]>
g (float[n,8] x) => (float[n,4] y) <float[8,4] w = {{{WEIGHTS}}}> {{ h = MatMul(x, w) y = Tanh(h) }}"""

# torch is not there: whoever imports it fails.
CODE = """
import sys
sys.modules["torch"] = None
from trtforge.converter.cli import main
sys.argv = ["trtforge", "build", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made for a TensorRT that is not installed here."""
    folder = tmp_path_factory.mktemp("portable")
    onnx.save(onnx.parser.parse_model(TEXT), folder / "model.onnx")
    (folder / "models.yaml").write_text(
        "version: 1\nmodels:\n  small:\n    source: {onnx: model.onnx}\n    dims: {n: [1, 4, 8]}\n"
        "    inputs: {x: {shape: [n, 8]}}\n    precision: fp16\n    target: {backend: tensorrt}\n"
    )
    _run("-m", "trtforge", "convert", str(folder / "models.yaml"), "--output", str(folder / "out"))
    artifact = trtforge.open_artifact(folder / "out/small")
    assert artifact.status == "portable"
    assert artifact.engine is None
    return artifact.path


def _run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_portable_artifact_gets_an_engine_without_torch(portable: Path, tmp_path: Path) -> None:
    said = _run("-c", CODE, str(portable), "--backend", "tensorrt-rtx", "--output", str(tmp_path / "built"), "--json")
    assert json.loads(said.stdout)["models"]["small"]["status"] == "built"
    built = trtforge.open_artifact(tmp_path / "built")
    assert built.engine is not None
    assert built.facts["engine"]["backend"] == "tensorrt-rtx"
    assert built.facts["graphs"] == trtforge.open_artifact(portable).facts["graphs"]
    assert trtforge.open_artifact(portable).status == "portable"
    # Once more, in place: the engine is replaced, and the bytes of a deterministic builder are the same.
    before = built.facts["engine"]["sha256"]
    _run("-c", CODE, str(built.path), "--backend", "tensorrt-rtx")
    assert trtforge.open_artifact(built.path).facts["engine"]["sha256"] == before


def test_the_backend_it_was_made_for_is_missing(portable: Path) -> None:
    said = _run("-c", CODE, str(portable), code=3)
    assert "pip install" in said.stderr


def test_an_altered_artifact_is_not_built(portable: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(portable, copy)
    data = bytearray((copy / "reference.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "reference.onnx").write_bytes(data)
    said = _run("-c", CODE, str(copy), "--backend", "tensorrt-rtx", code=5)
    assert "reference.onnx" in said.stderr


def test_a_portable_artifact_says_how_to_get_an_engine(portable: Path) -> None:
    with pytest.raises(ArtifactError, match="trtforge build"):
        trtforge.open_artifact(portable).load()
