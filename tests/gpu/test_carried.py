"""Artifacts that a machine without a GPU made, brought here: the target gives them their engine and their proof.

`$TRTFORGE_CARRIED` names a folder of them, as make_carried.py makes it: `portable` ones, made for a TensorRT that was
not there, and `built` ones, by the release of TensorRT-RTX that is installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trtforge
from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import ArtifactError

CARRIED = Path(os.environ.get("TRTFORGE_CARRIED", "/nonexistent"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.skipif(not CARRIED.is_dir(), reason="needs the artifacts of make_carried.py in $TRTFORGE_CARRIED"),
    pytest.mark.filterwarnings("default"),
]

# Neither torch nor the model's code: whoever imports them fails.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["example_models"] = None
from trtforge.converter.cli import main
sys.argv[0] = "trtforge"
main()
"""


def _command(*arguments: str, cwd: Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments, "--json"],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(folder.name for folder in CARRIED.iterdir()) if CARRIED.is_dir() else [])
def test_a_carried_artifact_becomes_validated_and_loads(name: str, tmp_path: Path) -> None:
    import torch

    place = tmp_path / name
    shutil.copytree(CARRIED / name, place)
    before = trtforge.open_artifact(place)
    assert before.status in ("portable", "built")
    with pytest.raises(ArtifactError):
        before.load()
    command = ["validate"] if before.status == "built" else ["build", "--backend", "auto"]
    _command(*command, str(place), cwd=tmp_path)
    after = trtforge.open_artifact(place)
    assert after.status == "validated"
    assert after.facts["measured"]["stage"] == "engine"
    assert after.facts["graphs"] == before.facts["graphs"]
    assert after.facts["device"]["name"] == torch.cuda.get_device_name(0)
    if before.status == "built":
        assert after.facts["engine"]["sha256"] == before.facts["engine"]["sha256"]
    engine = after.load()
    (spec,) = after.inputs
    result = engine(torch.randn(3, *spec.shape[1:], device="cuda"))
    assert result.shape[0] == 3
    assert bool(torch.isfinite(result).all())
