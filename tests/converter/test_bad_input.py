"""What users hand in that is wrong, through the command line: the exit code, and what they are told."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
import safetensors.torch
import torch
from tiny_models import TINY, entry, write_tiny

import trtforge
from trtforge.converter import cli
from trtforge.converter.manifest import write_manifest

FACTORY = """
import torch
def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
def broken():
    return helper()
def helper():
    raise RuntimeError("the user's own words")
"""


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def state(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict()
    change(found)
    return found


def rename(found: dict[str, torch.Tensor]) -> None:
    found["1.scale"] = found.pop("1.bias")


def poison(found: dict[str, torch.Tensor]) -> None:
    found["0.weight"][1, 1] = float("inf")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    (tmp_path / "bad_input_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


def factory(name: str = "net", **source: Any) -> dict[str, Any]:
    model = entry(source={"factory": f"bad_input_models:{name}", **source})
    return {**model, "inputs": {"input": {"shape": ["n", 3]}}}


def checkpoint(path: Path) -> None:
    safetensors.torch.save_file(state(rename), path / "keys.safetensors")
    safetensors.torch.save_file(state(poison), path / "inf.safetensors")
    torch.save({"0.weight": Evil()}, path / "evil.pt")
    proto = onnx.parser.parse_model(TINY)
    for weight in proto.graph.initializer:  # only raw bytes are kept outside
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save_model(proto, path / "cut.onnx", save_as_external_data=True, location="cut.bin", size_threshold=0)
    os.truncate(path / "cut.bin", 30)


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        (entry(dims={"n": "many"}), 2, ["tiny.yaml:1: models.tiny.dims"]),
        (entry(dims={"n": [4, 2, 1]}), 2, ["tiny.yaml:1: tiny: dimension 'n'", "min <= opt <= max"]),
        (factory(checkpoint="kays.safetensors"), 2, ["does not exist", "did you mean 'keys.safetensors'"]),
        (factory(checkpoint="keys.safetensors"), 2, ["1 missing keys (1.bias)", "1 unexpected keys (1.scale)"]),
        (factory(checkpoint="evil.pt"), 2, ["holds more than tensors, and is not unpickled", "fix: save"]),
        (factory(checkpoint="inf.safetensors"), 2, ["1 weights hold NaN or Inf: 0.weight"]),
        (factory("nett"), 2, ["bad_input_models has no 'nett'", "did you mean 'net'"]),
        (factory("broken"), 2, ["Traceback in your code:", "in helper", "RuntimeError: the user's own words"]),
        (entry(source={"onnx": "cut.onnx"}), 3, ["cut.bin has 30 bytes, the weight 'w' ends at byte 64", "fix:"]),
    ],
)  # fmt: skip
def test_bad_model(call: Callable[..., Any], tmp_path: Path, model: dict[str, Any], code: int, said: list[str]) -> None:
    write_tiny(tmp_path, {"tiny": model})
    checkpoint(tmp_path)
    got, err = call("convert", "tiny.yaml")
    assert got == code, err
    for text in said:
        assert text in err
    assert "trtforge/" not in err
    assert "Traceback (most recent call last)" not in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "artifacts").exists() or os.listdir(tmp_path / "artifacts") == []


def test_a_file_without_its_version(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("models: {}\n")
    code, err = call("convert", "old.yaml")
    assert code == 2
    assert "version is missing; write `version: 1`" in err


@pytest.mark.parametrize("exported", [False, True])
def test_a_module_with_nan(exported: bool, tmp_path: Path) -> None:
    x, module = torch.zeros(2, 3), torch.nn.Linear(3, 4)
    with torch.no_grad():
        module.weight[0, 0] = torch.nan
    model = torch.export.export(module, (x,)) if exported else module
    with pytest.raises(trtforge.ConfigError, match="1 weights hold NaN or Inf: weight"):
        trtforge.convert(model, x, tmp_path / "nan")


@pytest.mark.parametrize(
    ("precision", "fix"),
    [
        ("float16", "'fp16'"),
        ("half", "'fp16'"),
        ("bfloat16", "'bf16'"),
        ("autoo", "'auto'"),
        ("x", "one of: auto, bf16"),
    ],
)
def test_a_precision_by_another_name(precision: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(trtforge.ConfigError, match=f"precision is '{precision}'") as caught:
        trtforge.convert(torch.nn.Linear(3, 4), torch.zeros(2, 3), tmp_path / "out", precision=precision)
    assert fix in caught.value.fix


def test_yaml_that_would_run_code(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text("version: 1\nmodels: !!python/object/apply:os.mkdir [ran]\n")
    code, err = call("convert", "evil.yaml")
    assert code == 2
    assert "evil.yaml:2: this is not valid YAML" in err
    assert not (tmp_path / "ran").exists()


def test_another_artifact_s_manifest_and_another_version_s_engine(call: Callable[..., Any], tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for name in ("one", "two"):
        trtforge.convert(tmp_path / "tiny.onnx", None, tmp_path / name, dims={"n": (1, 2, 4)})
    engine, manifest = tmp_path / "two" / "model.engine", tmp_path / "two" / "manifest.json"
    if not engine.exists():
        pytest.skip("no engine is built here")
    shutil.copy(tmp_path / "one" / "manifest.json", manifest)
    code, err = call("validate", "two")
    assert code == 5
    assert "manifest.json is not the one that was published with manifest.sha256" in err
    shutil.copy(tmp_path / "one" / "manifest.sha256", tmp_path / "two")
    code, err = call("validate", "two")
    assert code == 5
    assert "was altered" in err or "is missing" in err or "is not in" in err

    # An engine whose header names another release, in an artifact that is otherwise whole.
    target = tmp_path / "one"
    data = bytearray((target / "model.engine").read_bytes())
    data[24:28] = struct.pack("4B", 1, 2, 3, 4)
    (target / "model.engine").write_bytes(data)
    facts = json.loads((target / "manifest.json").read_text())
    kept = {key: value for key, value in facts.items() if key not in ("schema", "status", "name", "files")}
    kept["engine"]["version"] = "1.2.3.4"
    write_manifest(target, "built", "one", kept)
    with pytest.raises(trtforge.ArtifactError, match=r"was built by .* 1\.2\.3\.4") as caught:
        trtforge.load(target, allow_unvalidated=True)
    assert "pip install" in caught.value.fix
    assert caught.value.exit_code == 5
