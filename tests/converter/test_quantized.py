"""INT8 and FP8 through the front door: calibrated, proved and built; and `trtforge calibrate`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import trtforge
from trtforge.converter import cli
from trtforge.converter.batch import convert_all, select_models
from trtforge.converter.package import publish_proved
from trtforge.runtime.trt.backend import find_backend

CASES = Path(__file__).parents[1] / "cases" / "case_models.py"


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5)
    return torch.nn.Sequential(*layers)


def batches(count: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((4, 16)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_model_is_calibrated_proved_and_built(tmp_path: Path, precision: str) -> None:
    artifact = trtforge.convert(
        network(),
        torch.zeros(4, 16),
        tmp_path / "small",
        precision=precision,
        dims={"batch": (1, 4, 8)},
        inputs={"input": ("batch", 16)},
        calibration=batches(),
        validation=batches(2),
    )
    assert artifact.status in ("built", "validated")
    facts = artifact.facts
    assert precision in facts["used_precisions"]
    assert (facts["calibration"]["tensors"], facts["calibration"]["samples"]) == (3, 32)
    assert 10 < facts["measured"]["sqnr_db"] < 60  # it is quantized, and still itself
    ranges = json.loads((artifact.path / "calibration.json").read_text())
    assert ranges["made_from"]["graph"] == facts["graphs"]["reference"]


ENCODER = """
version: 1
models:
  encoder:
    source: {factory: 'example_models:encoder', kwargs: {layers: 4}}
    dims: {batch: [1, 2, 4], seq: [16, 64, 128]}
    inputs:
      ids: {dtype: int64, shape: [batch, seq], values: [0, 30521]}
      mask: {dtype: bool, shape: [batch, seq], values: true}
    outputs: [hidden, pooled]
    precision: int8
    calibration: {loader: 'example_models:token_batches', method: max, rounding: false, bias_correction: false}
"""


@pytest.mark.slow
def test_smoothing_leaves_an_encoder_right_at_other_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrated at length 128, run at 16: 32.7 dB without smoothing, 26.5 where a prediction of 4 dB sufficed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "configs"))
    file = tmp_path / "encoder.yaml"
    file.write_text(ENCODER)
    (outcome,) = convert_all(select_models(file, "encoder"), tmp_path / "out")
    assert outcome.facts["measured"]["sqnr_db"] > 32


def test_quantizing_without_data_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(trtforge.ConfigError, match="no calibration data"):
        trtforge.convert(network(), torch.zeros(4, 16), tmp_path / "small", precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_exception_of_a_loader_arrives_as_it_is(tmp_path: Path) -> None:
    def broken():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        trtforge.convert(network(), torch.zeros(4, 16), tmp_path / "small", precision="int8", calibration=broken())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(CASES, tmp_path)
    (tmp_path / "case_data.py").write_text(
        "import numpy as np\n"
        "def images():\n"
        "    rng = np.random.default_rng(0)\n"
        "    for _ in range(6):\n"
        "        yield rng.standard_normal((4, 3, 16, 16)).astype(np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    model = {
        "source": {"factory": "case_models:healthy"},
        "dims": {"batch": [1, 4, 8]},
        "inputs": {"input": {"shape": ["batch", 3, 16, 16]}},
        "precision": "int8",
        "calibration": {"loader": "case_data:images"},
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({"version": 1, "models": {"small": model}}))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["trtforge", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_calibrate_in_shards_cache_and_sensitivity(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def calibrate(*words: str) -> int:
        return run(monkeypatch, "calibrate", str(config), *words)

    assert calibrate("-o", "whole.json", "--export-cache", "trt.cache") == 0
    for number in (1, 2, 3):
        assert calibrate("-o", f"part{number}.json", "--shard", f"{number}/3") == 0
    assert calibrate("-o", "merged.json", *(w for n in (3, 1, 2) for w in ("--merge", f"part{n}.json"))) == 0
    assert Path("merged.json").read_bytes() == Path("whole.json").read_bytes()
    assert Path("trt.cache").read_text().startswith("TRT-100300-EntropyCalibration2\n")
    capsys.readouterr()
    assert calibrate("-o", "imported.json", "--import-cache", "trt.cache", "--json") == 0
    assert json.loads(capsys.readouterr().out)["imported"]["missing"] == []
    assert calibrate("-o", "whole.json", "--sensitivity", "1", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["reused"]
    assert len(facts["sensitivity"]["layers"]) == 2
    plan = trtforge.PrecisionPlan.load(Path(facts["plan"]))
    assert [rule.origin for rule in plan.rules] == ["sensitivity"]
    assert calibrate("-o", "x.json", "--shard", "4/3") == 2


def test_ranges_of_another_graph_are_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "calibrate", str(config), "-o", "ranges.json") == 0
    data = json.loads(config.read_text())
    data["models"]["small"]["calibration"] = {"ranges": "ranges.json"}
    config.write_text(json.dumps(data))
    if find_backend("auto").capabilities.int8_conv:
        assert run(monkeypatch, "convert", str(config)) == 0
    ranges = json.loads(Path("ranges.json").read_text())
    ranges["made_from"]["graph"] = "0" * 64
    Path("ranges.json").write_text(json.dumps(ranges))
    assert run(monkeypatch, "convert", str(config)) == 3


def test_unproved_engine_is_never_packaged(tmp_path: Path) -> None:
    """The invariant itself: reports that are missing, or of another graph, stop the publishing."""
    artifact = trtforge.convert(network(), torch.zeros(4, 16), tmp_path / "small")
    from trtforge.converter.reporting import read_report
    from trtforge.validation.golden import GoldenSet
    from trtforge.validation.proof import Proof

    report = read_report(artifact.path)
    golden = GoldenSet.load(artifact.path / "proof")
    staged = tmp_path / "staged"
    shutil.copytree(artifact.path, staged)
    facts = {k: v for k, v in artifact.facts.items() if k not in ("schema", "status", "name", "files")}
    other = {**facts, "graphs": {"reference": "0" * 64, "model": "0" * 64}}
    with pytest.raises(trtforge.ParityError, match="another graph"):
        publish_proved(staged, tmp_path / "out", "small", other, report.proof, golden)
    with pytest.raises(trtforge.ParityError, match="not proved"):
        publish_proved(staged, tmp_path / "out", "small", facts, Proof(()), golden)
    assert not (tmp_path / "out").exists()
