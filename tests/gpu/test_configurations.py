"""Shipped configurations, validated by really running on a GPU; figures go to `$TRTFORGE_RESULTS` where it is set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trtforge
from trtforge.converter.artifact import Artifact
from trtforge.converter.batch import convert_all, select_models
from trtforge.runtime.device import device_facts, gpu_present
from trtforge.runtime.errors import BuildError
from trtforge.runtime.trt.backend import find_backend

ROOT = Path(__file__).parents[2]
MODELS = ("digits", "resnet50", "vit_b_16", "bilstm", "encoder")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]


def note(artifact: Artifact, seconds: dict[str, float]) -> None:
    place = os.environ.get("TRTFORGE_RESULTS")
    if not place:
        return
    facts = artifact.facts
    line = {
        "name": artifact.name,
        "status": artifact.status,
        "measured": facts["measured"],
        "device": facts["device"],
        "engine": facts["engine"] and {k: facts["engine"][k] for k in ("backend", "version", "size")},
        "versions": facts["versions"],
        "seconds": seconds,
        "reports": [
            [r["candidate"]["stage"], r["verdict"], [o["pooled"]["sqnr_db"] for o in r["outputs"]]]
            for r in json.loads((artifact.path / "report.json").read_text())["reports"]
        ],
    }  # fmt: skip
    with Path(place).open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session")
def digits_weights() -> None:
    if not (ROOT / "examples/digits/digits.safetensors").exists():
        subprocess.run([sys.executable, str(ROOT / "examples/digits/train.py")], check=True)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_configuration_is_validated(model: str, precision: str, tmp_path: Path, digits_weights: None) -> None:
    if precision == "tf32":
        text = (ROOT / f"configs/{model}.yaml").read_text().replace("[fp32, fp16, bf16]", "[tf32]")
        config = ROOT / f"configs/_{model}_tf32.yaml"
        config.write_text(text)
    else:
        config = ROOT / f"configs/{model}.yaml"
    (outcome,) = convert_all(select_models(config, f"{model}-{precision}"), tmp_path)
    if precision == "tf32":
        config.unlink()
    if outcome.error is not None:
        raise outcome.error
    assert outcome.status == "validated"
    assert outcome.path is not None
    artifact = trtforge.open_artifact(outcome.path)
    device = device_facts()
    assert device is not None
    assert artifact.facts["device"]["name"] == device.name
    note(artifact, outcome.seconds)


@pytest.mark.parametrize("name", ["digits_int8/digits-fp8", "encoder_int8/encoder-int8", "encoder_int8/encoder-fp8"])
def test_quantized_configuration_is_validated(name: str, tmp_path: Path, digits_weights: None) -> None:
    config, _, model = name.partition("/")
    (outcome,) = convert_all(select_models(ROOT / f"configs/{config}.yaml", model), tmp_path)
    if outcome.error is not None:
        raise outcome.error
    assert outcome.status == "validated"
    assert outcome.path is not None
    note(trtforge.open_artifact(outcome.path), outcome.seconds)


def test_int8_convolutions_are_refused_where_the_release_has_none(tmp_path: Path, digits_weights: None) -> None:
    backend = find_backend("auto")
    if backend.capabilities.int8_conv:
        pytest.skip(f"{backend} builds them")
    (outcome,) = convert_all(select_models(ROOT / "configs/digits_int8.yaml", "digits-int8"), tmp_path)
    assert isinstance(outcome.error, BuildError)
    assert "1.7" in str(outcome.error)
    assert list(tmp_path.iterdir()) == []
