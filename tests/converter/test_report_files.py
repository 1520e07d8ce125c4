"""What a report holds beside its proof, `trtforge report`, and the index page of a batch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import trtforge
from trtforge.converter import cli
from trtforge.converter.extras import engine_layers
from trtforge.converter.manifest import read_manifest, write_manifest
from trtforge.converter.pieces import open_onnx, run_with
from trtforge.converter.types import infer_types
from trtforge.runtime.graph import load_graph
from trtforge.validation.bisect import Side
from trtforge.validation.golden import GoldenSet
from trtforge.validation.layers import measure_layers

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((4, 16)).astype(np.float32) for _ in range(4)]
    settings = {"dims": {"batch": (1, 4, 8)}, "inputs": {"input": ("batch", 16)}}
    folder = tmp_path_factory.mktemp("converted")
    trtforge.convert(net, torch.zeros(4, 16), folder / "net", precision="int8", calibration=data, **settings)
    return folder


def test_fp8_weights_that_are_large_are_measured_too(tmp_path: Path) -> None:
    """Taken out of the graph, they would be arrays of a type that onnxruntime's bindings don't know."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
    data = [np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)]
    artifact = trtforge.convert(net, torch.zeros(4, 64), tmp_path / "net", precision="fp8", calibration=data)
    layers = json.loads((artifact.path / "report.json").read_text())["layers"]
    assert [layer["op"] for layer in layers] == ["Gemm", "Relu", "Gemm"]
    assert all(10 < layer["sqnr_db"] < 70 for layer in layers)


@pytest.fixture
def artifact(converted: Path, tmp_path: Path) -> Path:
    shutil.copytree(converted / "net", tmp_path / "all" / "net")
    return tmp_path / "all" / "net"


def test_the_json_holds_layers_and_ranges_and_the_page_shows_them(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    assert [layer["op"] for layer in report["layers"]] == ["Gemm", "Relu", "Gemm"]
    assert all(10 < layer["sqnr_db"] < 70 for layer in report["layers"])
    calibrated = json.loads((artifact / "calibration.json").read_text())["tensors"]
    for entry in report["ranges"]:
        assert entry["amax"] == calibrated[entry["name"]]["amax"]
        assert sum(entry["counts"]) == entry["count"]
        assert len(entry["counts"]) <= 64
        assert entry["width"] * (len(entry["counts"]) - 1) <= entry["peak"] <= entry["width"] * len(entry["counts"])
    page = (artifact / "report.html").read_text()
    assert 'id="layers"' in page
    assert page.count("<figure>") == len(report["ranges"]) == 2
    assert "layers" not in read_manifest(artifact).facts


def test_report_leaves_a_page_that_is_up_to_date(run: Run, artifact: Path) -> None:
    before = (artifact / "manifest.json").read_bytes()
    code, out, err = run("report", str(artifact), "--json")
    assert code == 0, err
    (found,) = json.loads(out)["reports"]
    assert (found["verdict"], found["rewritten"]) == ("passed", False)
    assert Path(found["page"]) == artifact / "report.html"
    assert (artifact / "manifest.json").read_bytes() == before


def test_report_draws_an_old_page_again_and_the_artifact_stays_whole(run: Run, artifact: Path) -> None:
    page = (artifact / "report.html").read_text()
    (artifact / "report.html").write_text("an older trtforge's page")
    own = ("schema", "status", "name", "files")
    manifest = read_manifest(artifact, check_files=False)
    facts = {key: value for key, value in manifest.facts.items() if key not in own}
    for name in ("manifest.json", "manifest.json.sha256", "manifest.sha256"):
        (artifact / name).unlink(missing_ok=True)
    write_manifest(artifact, manifest.status, manifest.name, facts)
    code, out, err = run("report", str(artifact))
    assert code == 0, err
    assert "drawn anew" in out
    assert (artifact / "report.html").read_text() == page
    opened = trtforge.open_artifact(artifact)
    assert opened.status == manifest.status
    assert dict(opened.manifest.files) == dict(read_manifest(artifact).files)
    assert [child.name for child in artifact.parent.iterdir()] == ["net"]


def test_an_altered_artifact_is_refused(run: Run, artifact: Path) -> None:
    (artifact / "report.html").write_text("not by trtforge")
    code, _, err = run("report", str(artifact))
    assert code == 5
    assert "was altered" in err


def test_a_folder_of_artifacts_gets_an_index(run: Run, artifact: Path) -> None:
    shutil.copytree(artifact, artifact.with_name("other"))
    code, out, err = run("report", str(artifact.parent), "--json")
    assert code == 0, err
    assert len(json.loads(out)["reports"]) == 2
    index = Path(json.loads(out)["index"]).read_text()
    assert 'href="net/report.html"' in index
    assert 'href="other/report.html"' in index
    assert "2 of 2 proved equal" in index
    assert run("report", str(artifact / "proof"))[0] == 5


def test_layers_do_not_depend_on_how_many_leave_at_once(artifact: Path) -> None:
    sides = []
    for name in ("reference.onnx", "model.onnx"):
        graph = load_graph(artifact / name)
        infer_types(graph)
        sides.append(Side(graph, run_with(open_onnx)))
    sample = GoldenSet.load(artifact / "proof").samples[0].inputs
    assert measure_layers(sides[0], sides[1], sample, budget=1) == measure_layers(sides[0], sides[1], sample)
    same = measure_layers(sides[0], sides[0], sample)
    assert {layer.sqnr_db for layer in same} == {float("inf")}
    assert {layer.to_json()["sqnr_db"] for layer in same} == {"inf"}


def test_fused_nodes_are_read_from_the_inspector() -> None:
    inspection = {
        "Layers": [
            {"Name": "__myl_Fc_1", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
             "Metadata": "[ONNX Layer: encoder.0/Gemm#0]\x1e[ONNX Layer: b/Relu#0]\x1e[ONNX Layer: a[0]/Add#1]"},
            "a bare name",
        ],
        "Bindings": ["x", "y"],
    }  # fmt: skip
    assert engine_layers(inspection) == [
        {"name": "__myl_Fc_1", "type": "gemm", "outputs": ["Half"],
         "nodes": ["encoder.0/Gemm#0", "b/Relu#0", "a[0]/Add#1"]},
        {"name": "a bare name", "type": "", "nodes": [], "outputs": []},
    ]  # fmt: skip
    assert engine_layers({}) == []
