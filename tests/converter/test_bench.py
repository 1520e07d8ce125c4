"""`trtforge bench` without a GPU: all but execution, over the fake session at the one seam; a real artifact."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from fake_gpu_clock import FakeClock
from fake_session import FakeSession

import trtforge
from trtforge.converter import cli
from trtforge.converter.artifact import Artifact, open_artifact
from trtforge.converter.bench import BenchResult, bench_sides, engine_sides, environment_facts
from trtforge.converter.bench_cases import choose_cases
from trtforge.converter.bench_command import Ask, measure, print_result
from trtforge.converter.bench_source import find_model
from trtforge.converter.progress import Stages
from trtforge.converter.report_files import add_to_report, report_folder
from trtforge.runtime.device import gpu_present
from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.peers import Side, as_tensors, float32_products
from trtforge.runtime.specs import DimRange, InputSpec
from trtforge.runtime.timing import Effort

CPU = torch.device("cpu")
SHORT = Effort(rounds=2, round_ms=1.0, warm_up=1)
CODE = """
import torch


class Affine(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return self.factor * x + 1


def affine(factor=2):
    return Affine(factor)
"""
CONFIG = """
version: 1
models:
  net:
    source: {factory: 'bench_affine:affine', kwargs: {factor: 2}}
    dims: {batch: [1, 2, 8]}
    inputs: {x: {shape: [batch, 4]}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code, configuration and artifact; what the fake session computes is what the model does."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bench_affine.py").write_text(CODE)
    (folder / "net.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trtforge", "convert", str(folder / "net.yaml"), "-o", str(folder)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code in (0, None)
    return folder


@pytest.fixture
def artifact(home: Path, tmp_path: Path) -> Artifact:
    shutil.copytree(home / "net", tmp_path / "net")
    return open_artifact(tmp_path / "net")


def _engines() -> tuple[Engine, Engine]:
    graphs, plain = FakeSession(), FakeSession()
    return Engine.over(graphs, CPU, lambda: 7), Engine.over(plain, CPU, lambda: 7, graphs=0)


def _run(artifact: Artifact, *peers: Side) -> BenchResult:
    result = BenchResult("net", environment_facts(artifact, "a fake"))
    cases = choose_cases(artifact.inputs, artifact.profiles)
    sides = [*engine_sides(*_engines()), *peers]
    bench_sides(artifact, cases, sides, FakeClock(1000.0), CPU, result, effort=SHORT)
    return result


def test_every_side_in_every_case_and_all_compute_the_same(artifact: Artifact, home: Path) -> None:
    ask = Ask(peers=("eager",), config=home / "net.yaml", rounds=1)
    result = measure(artifact, ask, _engines(), FakeClock(1000.0), CPU, "a fake", Stages())
    sides = ["engine", "engine, bound", "engine, no graph", "eager"]
    assert [(row.case, row.side) for row in result.rows] == [
        (f"batch {batch}", side) for batch in (1, 2, 8) for side in sides
    ]
    assert [row.batch for row in result.rows[::4]] == [1, 2, 8]
    assert all(row.cosine == pytest.approx(1.0, abs=1e-6) for row in result.rows)
    assert not result.absent
    assert result.host_bytes > 1 << 20
    assert result.facts["versions"]["torch"] == torch.__version__


def test_a_side_that_computes_something_else_shows(artifact: Artifact) -> None:
    result = _run(artifact, Side("other", lambda inputs: lambda: -inputs["x"] - 1))
    assert {round(row.cosine or 0, 3) for row in result.rows if row.side == "engine, bound"} == {1.0}
    assert all((row.cosine or 0) < 0 for row in result.rows if row.side == "other")


def test_what_is_missing_or_fails_is_named_with_the_reason(artifact: Artifact) -> None:
    def breaks(inputs):
        if inputs["x"].shape[0] == 8:
            raise RuntimeError("too large\nand more")
        return lambda: inputs["x"]

    from trtforge.runtime.peers import onnxruntime_side

    result = _run(artifact, onnxruntime_side(artifact.model), Side("fragile", breaks))
    assert result.absent.keys() == {"onnxruntime", "fragile, batch 8"}
    assert "no CUDA provider (pip install onnxruntime-gpu)" in result.absent["onnxruntime"]
    assert result.absent["fragile, batch 8"] == "RuntimeError: too large"
    assert [row.case for row in result.rows if row.side == "fragile"] == ["batch 1", "batch 2"]


def test_an_engine_that_fails_is_no_absent_peer(artifact: Artifact) -> None:
    session = FakeSession()
    session.fail_runs = 1
    engine = Engine.over(session, CPU, lambda: 7)
    result = BenchResult("net", {})
    cases = choose_cases(artifact.inputs, artifact.profiles)
    with pytest.raises(ArtifactError, match="the run fails"):
        bench_sides(artifact, cases, engine_sides(engine, engine), FakeClock(1000.0), CPU, result, effort=SHORT)


def test_memory_and_seconds_of_each_side(artifact: Artifact) -> None:
    clock = FakeClock(1000.0)

    def takes(inputs):
        clock.bytes += 5 << 20
        return lambda: inputs["x"]

    result = BenchResult("net", {})
    cases = choose_cases(artifact.inputs, artifact.profiles)[:1]
    bench_sides(artifact, cases, [*engine_sides(*_engines()), Side("greedy", takes)], clock, CPU, result, effort=SHORT)
    assert {row.side: row.gpu_bytes >> 20 for row in result.rows}["greedy"] == 5
    assert {row.side: row.gpu_bytes for row in result.rows}["engine"] == 0
    assert all(row.prepare_s > 0 for row in result.rows)


def test_batch_tuning_keeps_to_the_profile(artifact: Artifact) -> None:
    ask = Ask(peers=(), limit_ms=1000.0, rounds=1)
    tuned = measure(artifact, ask, _engines(), FakeClock(1000.0), CPU, "a fake", Stages()).tuned
    assert tuned is not None
    assert list(tuned.tried) == [1, 2, 4, 8]
    assert tuned.batch == 8
    with pytest.raises(ConfigError, match="a latency limit of -1"):
        measure(artifact, Ask(peers=(), limit_ms=-1.0, rounds=1), _engines(), FakeClock(1000.0), CPU, "", Stages())


def test_the_figures_are_kept_in_the_report_and_survive_a_new_page(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = Ask(peers=("torch-tensorrt", "onnxruntime"), limit_ms=9000.0, rounds=1)
    result = measure(artifact, ask, _engines(), FakeClock(1000.0), CPU, "a fake <GPU>", Stages())
    add_to_report(artifact.path, {"bench": result.to_json()})
    opened = open_artifact(artifact.path)
    assert opened.status == artifact.status
    assert opened.manifest.files["model.engine"] == artifact.manifest.files["model.engine"]
    page = (artifact.path / "report.html").read_text()
    assert "a fake &lt;GPU&gt;" in page
    assert "engine, no graph" in page
    assert "onnxruntime did not run" in page
    assert "Batch size 8 serves the most" in page
    assert json.loads((artifact.path / "report.json").read_text())["bench"]["rows"]
    (found,) = report_folder(artifact.path)
    assert not found.rewritten
    print_result(result)
    out = capsys.readouterr().out
    assert "did not run" in out
    assert "torch-tensorrt" in out
    assert "Batch size 8 serves the most within 9000 ms." in out


def test_the_model_is_made_again_from_what_was_recorded(
    artifact: Artifact, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    model = find_model(artifact, None, None)
    args, kwargs = model.bind([torch.ones(3, 4)])
    assert torch.equal(model.module(*args, **kwargs), torch.full((3, 4), 3.0))


def test_another_model_than_the_artifacts_is_refused(artifact: Artifact, home: Path) -> None:
    other = home / "other.yaml"
    other.write_text(CONFIG.replace("factor: 2", "factor: 3"))
    with pytest.raises(ConfigError, match="does not make the model of"):
        find_model(artifact, other, None)


def test_a_model_from_python_says_that_it_has_no_factory(tmp_path: Path) -> None:
    made = trtforge.convert(torch.nn.Linear(4, 3), torch.ones(2, 4), tmp_path / "live")
    result = measure(made, Ask(peers=("eager",), rounds=1), _linear_engines(), FakeClock(1000.0), CPU, "", Stages())
    assert "does not say which code makes its model" in result.absent["eager"]
    assert [row.side for row in result.rows] == ["engine", "engine, bound", "engine, no graph"]


def _linear_engines() -> tuple[Engine, Engine]:
    class Renamed(FakeSession):
        def __init__(self) -> None:
            super().__init__(profiles=((2, 2, 2),))
            (spec,) = self.inputs
            self.inputs = (type(spec)("input", spec.dtype, spec.shape),)
            self.profiles = tuple({"input": profile["x"], "x": profile["x"]} for profile in self.profiles)

    return Engine.over(Renamed(), CPU, lambda: 7), Engine.over(Renamed(), CPU, lambda: 7, graphs=0)


X = (InputSpec("x", "float32", ("batch", "seq", 4)),)
PROFILES = (
    {"batch": DimRange(1, 2, 4), "seq": DimRange(8, 16, 32)},
    {"batch": DimRange(1, 8, 16), "seq": DimRange(8, 8, 8)},
)


def _labels(*args, **kwargs) -> list[str]:
    return [case.label for case in choose_cases(X, PROFILES, *args, **kwargs)]


def test_cases_are_every_profiles_points_by_default() -> None:
    assert _labels() == ["batch 1, seq 8", "batch 2, seq 16", "batch 4, seq 32", "batch 8, seq 8", "batch 16, seq 8"]
    (fixed,) = choose_cases((InputSpec("x", "float32", (3, 4)),), ({},))
    assert (fixed.label, fixed.batch, fixed.sizes) == ("fixed", 3, {})


def test_cases_that_are_asked_for() -> None:
    assert _labels((1, 4)) == ["batch 1, seq 16", "batch 4, seq 16"]
    assert _labels((1, 4), ("seq=8", "seq=32")) == [
        "batch 1, seq 8", "batch 4, seq 8", "batch 1, seq 32", "batch 4, seq 32"
    ]  # fmt: skip
    assert _labels((), ("batch=16, seq=8",)) == ["batch 16, seq 8"]


@pytest.mark.parametrize(
    ("batches", "shapes", "says"),
    [
        ((16,), (), "no profile holds batch 16, seq 16"),
        ((), ("seq=33",), "no profile holds"),
        ((), ("sequ=8",), "no dynamic dimension 'sequ'"),
        ((), ("seq",), "is not NAME=SIZE"),
        ((), ("seq=x",), "is not NAME=SIZE"),
    ],
)
def test_sizes_that_cannot_be(batches, shapes, says) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_cases(X, PROFILES, batches, shapes)


def test_a_batch_size_where_the_batch_is_fixed() -> None:
    with pytest.raises(ConfigError, match="the engine's batch is fixed"):
        choose_cases((InputSpec("x", "float32", (3, "n")),), ({"n": DimRange(1, 2, 3)},), (1,))


def test_results_of_any_nesting_are_tensors() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    assert as_tensors({"a": one, "b": [(two,), None]}) == [one, two]
    assert torch.equal(as_tensors(two.numpy())[0], two)


@pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
def test_without_a_gpu_the_exit_code_is_5(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for args, code, says in (
        ((), 5, "runs on a GPU alone, and there is none here"),
        (("--peers", "eagre"), 2, "did you mean 'eager'?"),
        (("--batch", "9"), 2, "no profile holds batch 9"),
    ):
        monkeypatch.setattr(sys, "argv", ["trtforge", "bench", str(artifact.path), *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        assert says in capsys.readouterr().err


def test_float32_products_are_the_engines_and_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        with float32_products(tf32=tf32):
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cudnn.allow_tf32 is tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
