"""`trtforge bisect` finds the layer that was broken on purpose, its line, and the exception that mends it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtforge.converter import cli
from trtforge.converter.carry import carry_out
from trtforge.converter.manifest import read_manifest
from trtforge.runtime.graph import describe_model, graph_hash, load_graph
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.trt.backend import find_backend

CASES = Path(__file__).parents[1] / "cases" / "blame_models.py"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process, in `tmp_path`; gives exit code, stdout and stderr."""
    shutil.copy(CASES, tmp_path)
    (tmp_path / "blame_data.py").write_text(
        "import numpy as np\n"
        "def images():\n"
        "    rng = np.random.default_rng(0)\n"
        "    for _ in range(4):\n"
        "        yield rng.standard_normal((4, 3, 8, 8)).astype(np.float32)\n"
    )
    monkeypatch.chdir(tmp_path)
    for module in ("blame_models", "blame_data"):  # else the lines are those of an earlier test's copy
        monkeypatch.delitem(sys.modules, module, raising=False)

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trtforge", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def write(factory: str, *, shape: tuple[int | str, ...] = ("batch", 16), name: str = "x", **more: Any) -> str:
    model = {
        "source": {"factory": f"blame_models:{factory}"},
        "dims": {"batch": [1, 4, 8]},
        "inputs": {name: {"shape": list(shape)}},
        "precision": "fp16",
        "overflow_guard": False,
        **more,
    }
    path = Path("net.yaml")
    path.write_text(json.dumps({"version": 1, "models": {"net": model}}))  # JSON is YAML
    return str(path)


def line_of(text: str) -> str:
    lines = CASES.read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return f"blame_models.py:{number}"


@pytest.mark.parametrize(
    ("factory", "line", "op", "kind", "exception"),
    [
        ("layer_norm", "square = centred * centred", "Mul", "overflow", "module: norm, precision: fp32"),
        ("l2_norm", "(y * y).sum", "ReduceSum", "overflow", None),
        ("difference", "y - 1000.0", "Sub", "cancellation", None),
    ],
)
def test_it_names_the_layer_its_line_and_what_mends_it(
    run: Run, factory: str, line: str, op: str, kind: str, exception: str | None
) -> None:
    config = write(factory)
    code, _, err = run("convert", config)
    assert code == 4, err
    assert not Path("artifacts/net").exists()
    code, out, err = run("bisect", "artifacts/net.failed", "--plan", "mended.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    blame = found["blames"][0]
    assert (found["outcome"], blame["op"], blame["kind"], blame["line"]) == ("mended", op, kind, line_of(line))
    assert line in blame["code"]
    assert found["measured"]["after"]["passed"]
    if exception is not None:
        assert [b["rules"] for b in found["blames"]] == [[exception]]
    code, _, err = run("convert", write(factory, precision="mended.yaml"))
    assert code == 0, err
    assert not Path("artifacts/net.failed").exists()


def test_what_shows_in_other_samples_only_once_the_first_is_mended(run: Run) -> None:
    assert run("convert", write("two_overflows"))[0] == 4
    code, out, err = run("bisect", "artifacts/net.failed", "--plan", "mended.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["outcome"] == "mended"
    assert [blame["kind"] for blame in found["blames"]] == ["overflow", "overflow"]
    first, second = (blame["code"] for blame in found["blames"])
    assert "y.pow(2)" in first
    assert "short.abs()" in second
    code, _, err = run("convert", write("two_overflows", precision="mended.yaml"))
    assert code == 0, err


def write_int8(**more: Any) -> str:
    settings: dict[str, Any] = {
        "precision": "int8",
        "calibration": {"loader": "blame_data:images", "method": "max"},
        "validation": {"loader": "blame_data:images", "tolerance": {"sqnr_db": 30}},
    }
    return write("outlier", shape=("batch", 3, 8, 8), name="input", **{**settings, **more})


def test_one_layer_that_int8_breaks(run: Run) -> None:
    code, _, err = run("convert", write_int8())
    assert code == 4, err
    code, out, err = run("bisect", "artifacts/net.failed", "--json")
    assert code == 0, err
    found = json.loads(out)
    print(out)
    assert found["outcome"] == "mended"
    (blame,) = found["blames"]
    assert (blame["op"], blame["module"], blame["kind"]) == ("Conv", "two", "rounding")
    assert blame["rules"] == ["module: two, op: Conv, precision: fp16"]
    assert found["measured"]["after"]["sqnr_db"] > 30 > found["measured"]["before"]["sqnr_db"]


def test_the_stored_plan_carried_out_again_is_the_same_graph(run: Run) -> None:
    """What an exception is measured on has to be what a conversion with it would make."""
    assert run("convert", write_int8())[0] == 4
    folder = Path("artifacts/net.failed")
    facts = read_manifest(folder).facts
    reference = describe_model(load_graph(folder / "reference.onnx"), folder / "reference.onnx")
    plan = PrecisionPlan.load(folder / "precision.yaml")
    half = find_backend("auto").capabilities.half_quantized_products
    carried = carry_out(reference, plan, folder, half_products=half)
    assert graph_hash(carried.model) == facts["graphs"]["model"]
    assert sorted(carried.used) == facts["used_precisions"]


def test_a_node_that_was_tampered_with(run: Run) -> None:
    """Two channels of one convolution swapped in model.onnx: the plan is innocent, and no exception mends it."""
    import onnx
    from onnx import numpy_helper

    assert run("convert", write_int8(validation={"tolerance": {"sqnr_db": 200}}, precision="fp16"))[0] == 4
    shutil.copytree("artifacts/net.failed", "copy.failed")
    model = onnx.load("copy.failed/model.onnx")
    (conv,) = [node for node in model.graph.node if node.name == "three/Conv#0"]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == conv.input[1]]
    array = numpy_helper.to_array(weight).copy()
    array[[0, 1]] = array[[1, 0]]
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, "copy.failed/model.onnx")
    code, out, err = run("bisect", "copy.failed", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["outcome"] == "graph"
    (blame,) = found["blames"]
    assert (blame["nodes"], blame["kind"], blame["rules"]) == (["three/Conv#0"], "graph", [])
    assert "its constant three.weight is another one" in blame["reason"]
    assert any("model.onnx is not the file" in note for note in found["notes"])
    assert found["measured"]["after"]["sqnr_db"] > 50  # what the plan makes of reference.onnx is no such graph
    assert "convert again" in run("bisect", "copy.failed")[1]
